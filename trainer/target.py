"""What a step is traced for: the rules of its layout, and the platform of its mesh.

`trainer.step.compile_step` says it while it traces a step. A model that wants more than its arrays
can tell (how its params lie, which kernels there are) asks for it here: what a program is compiled
for need not be what this process runs on.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from trainer.sharding import MeshAxes


class Target(NamedTuple):
    """What the program being traced will run on.

    Attributes:
      rules: logical axis -> mesh axis, of the params.
      platform: of the mesh's devices: `cpu`, `gpu` or `tpu`.
    """

    rules: Mapping[str, MeshAxes]
    platform: str


_CURRENT: contextvars.ContextVar[Target | None] = contextvars.ContextVar("target", default=None)


@contextlib.contextmanager
def tracing_for(mesh: Any, rules: Mapping[str, MeshAxes]) -> Iterator[None]:
    """Say what a step is traced for, meanwhile. `mesh` has devices, which need not be here."""
    platform = mesh.devices.flat[0].platform
    platform = "gpu" if platform in ("cuda", "rocm") else platform
    token = _CURRENT.set(Target(rules, platform))
    try:
        yield
    finally:
        _CURRENT.reset(token)


def current() -> Target | None:
    """What is being traced for; None outside of `tracing_for`."""
    return _CURRENT.get()
