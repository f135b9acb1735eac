"""Compiler flags per platform, in one table; free of jax, since they must be set before it starts.

`trainer.main` and whoever plans call `put` on their environment. What the user has set stays: a
flag of the same name in `LIBTPU_INIT_ARGS` or `XLA_FLAGS` is left alone. A flag that a compiler
does not know ends the process, so the table holds few: each was seen to change the compiled
program (libtpu 0.0.42.1 and 0.0.52), or is long established.
"""

from __future__ import annotations

import os
from collections.abc import MutableMapping
from typing import NamedTuple


class Flag(NamedTuple):
    """A flag's value, and what it is for."""

    value: str
    reason: str


# In LIBTPU_INIT_ARGS. Without a TPU nobody reads it.
TPU = {
    "xla_tpu_enable_sparse_core_collective_offload_nd_reduce_scatter": Flag(
        "true",
        "A reduce-scatter over several dims of the torus stays one (v5e, v5p and v6e, with a "
        "SparseCore or without). By default it becomes an all-reduce of which each device keeps a "
        "part, and sends twice the bytes.",
    ),
    "xla_tpu_enable_sparse_core_collective_offload_reduce_scatter": Flag(
        "true",
        "Where there is a SparseCore (v5p, v6e) it carries reduce-scatters out beside the "
        "TensorCore's work. By default gradients' scatters stop the layer.",
    ),
}

# In XLA_FLAGS, on machines that have an NVIDIA GPU.
GPU = {
    "xla_gpu_enable_latency_hiding_scheduler": Flag(
        "true", "Gathers and scatters run beside the matmuls. JAX's own advice; not measured here."
    ),
}


def put(environment: MutableMapping[str, str], *, has_gpu: bool | None = None) -> None:
    """Add the table's flags to those of an environment, which win.

    Args:
      environment: `os.environ` of a process that has not imported jax, or one for a child.
      has_gpu: whether to add those for GPUs; by default, whether this machine has one.
    """
    _add(environment, "LIBTPU_INIT_ARGS", TPU)
    if os.path.exists("/dev/nvidiactl") if has_gpu is None else has_gpu:
        _add(environment, "XLA_FLAGS", GPU)


def _add(environment: MutableMapping[str, str], name: str, flags: dict[str, Flag]) -> None:
    given = environment.get(name, "").split()
    names = {flag.lstrip("-").split("=", 1)[0].removeprefix("no") for flag in given}
    ours = [f"--{key}={flag.value}" for key, flag in flags.items() if key not in names]
    environment[name] = " ".join([*given, *ours])
