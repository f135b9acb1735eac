"""What a step is traced for: the rules of its layout, and the platform of its mesh.

`trainer.step.compile_step` says it while it traces a step. A model that wants more than its arrays
can tell (how its params lie, which kernels there are) asks for it here: what a program is compiled
for need not be what this process runs on.
"""

from __future__ import annotations

import contextlib
import contextvars
import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from trainer.sharding import MeshAxes


class Target(NamedTuple):
    """What the program being traced will run on.

    Attributes:
      rules: logical axis -> mesh axis, of the params.
      platform: of the mesh's devices: `cpu`, `gpu` or `tpu`.
      lines: mesh axis -> how many devices one after the other make a line of a three-dim torus,
        for axes that fill one.
    """

    rules: Mapping[str, MeshAxes]
    platform: str
    lines: Mapping[str, int]


_CURRENT: contextvars.ContextVar[Target | None] = contextvars.ContextVar("target", default=None)


@contextlib.contextmanager
def tracing_for(mesh: Any, rules: Mapping[str, MeshAxes]) -> Iterator[None]:
    """Say what a step is traced for, meanwhile. `mesh` has devices, which need not be here."""
    platform = mesh.devices.flat[0].platform
    platform = "gpu" if platform in ("cuda", "rocm") else platform
    lines = {axis: size for axis in mesh.axis_names if (size := line_of_torus(mesh, axis))}
    token = _CURRENT.set(Target(rules, platform, lines))
    try:
        yield
    finally:
        _CURRENT.reset(token)


def current() -> Target | None:
    """What is being traced for; None outside of `tracing_for`."""
    return _CURRENT.get()


def line_of_torus(mesh: Any, axis: str) -> int | None:
    """How long the lines are that a mesh axis goes along, where it fills three dims of a torus.

    None, where it fills less, or does not go line by line.
    """
    number = mesh.axis_names.index(axis)
    along = np.moveaxis(mesh.devices, number, 0).reshape(mesh.shape[axis], -1)[:, 0]
    if len({getattr(device, "slice_index", 0) for device in along}) > 1:
        return None
    places = np.array([getattr(device, "coords", ()) for device in along])
    sizes = [len(set(column)) for column in places.T]
    if sum(size > 1 for size in sizes) < 3 or math.prod(sizes) != len(along):
        return None
    changing = [dim for dim in range(len(sizes)) if places[1][dim] != places[0][dim]]
    if len(changing) != 1:
        return None
    size = sizes[changing[0]]
    lines = places.reshape(-1, size, places.shape[1])
    others = [dim for dim in range(len(sizes)) if dim != changing[0]]
    straight = np.all(lines[:, :, others] == lines[:, :1, others])
    alike = np.all(lines[:, :, changing] == lines[:1, :, changing])
    return size if straight and alike else None
