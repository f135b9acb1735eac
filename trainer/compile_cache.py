"""XLA's compiled programs, kept on disk from one start to the next."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import jax
from jax._src import distributed as jax_distributed


def use(directory: str) -> None:
    """Keep compiled programs in a directory; "" for not at all."""
    if directory:
        jax.config.update("jax_compilation_cache_dir", os.path.expanduser(directory))
        # The default, 1 s, leaves out programs that together take seconds.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


@contextlib.contextmanager
def written_by_all() -> Iterator[None]:
    """Let every process of a CPU gang write what it compiles inside to the cache.

    JAX lets only process 0 write, since elsewhere all processes' programs have one key. On CPU the
    key has the process in it (the topology's fingerprint, jax 0.10.2 to 0.12.0), so that all others
    would compile anew at every start. JAX asks this private field of its own and nothing else does
    while compiling; drop this when a CPU gang's keys are alike.
    """
    state = jax_distributed.global_state
    process_id = state.process_id
    if jax.default_backend() == "cpu":
        state.process_id = 0
    try:
        yield
    finally:
        state.process_id = process_id
