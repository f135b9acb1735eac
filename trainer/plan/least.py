"""What a parallelism has to move at the least, whatever the compiler makes of it.

Weights that `data` or `fsdp` split are gathered once in the forward pass and once in the backward,
in the dtype in which they are used; their gradients are reduced and scattered once. Over batch axes
that do not split them gradients are all-reduced, shard by shard. With `tensor` activations are
all-reduced, as the task says. Microbatches repeat the gathering and scattering, not the rest.
Between slices the same holds of what each device of a slice answers for.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax.numpy as jnp

from launch.spec import BATCH_AXES, MeshSpec, TrainSpec
from trainer.ledger import array_bytes
from trainer.sharding import as_tuple
from trainer.state import StateLayout
from trainer.task import Task


def least_bytes(spec: TrainSpec, task: Task, layout: StateLayout) -> dict[str, float]:
    """Bytes that each device must send in a step.

    Args:
      spec: resolved.
      task: says in which dtype weights are used, and what `tensor` moves.
      layout: of the train state.

    Returns:
      `ici` (or whatever links devices of a slice) and `dcn`.
    """
    mesh = spec.mesh
    width = task.compute_dtype()
    total = {"ici": 0.0, "dcn": 0.0}
    for name, leaf in zip(layout.names, layout.abstract, strict=True):
        if name not in layout.params:
            continue
        axes = {axis for entry in leaf.sharding.spec for axis in as_tuple(entry)}
        size = array_bytes(leaf)[0] / math.prod(
            layout.mesh.shape[axis] for axis in axes if axis not in BATCH_AXES
        )
        if width is not None:
            size *= min(1.0, dtype_width(width) / leaf.dtype.itemsize)
        shared = [axis for axis in BATCH_AXES if axis in axes]
        alike = [axis for axis in BATCH_AXES if axis not in axes]
        for link, sent in gathered_bytes(size, shared, mesh).items():
            total[link] += 3 * spec.num_microbatches * sent
        shard = size / math.prod(layout.mesh.shape[axis] for axis in shared)
        for link, sent in gathered_bytes(shard, alike, mesh).items():
            total[link] += 2 * sent  # An all-reduce is a scatter and a gather.
    activations = task.tensor_bytes_per_example()
    n = mesh.tensor
    if activations is not None and n > 1:
        examples = spec.global_batch_size / mesh.batch_shards
        total["ici"] += 2 * (n - 1) / n * activations * examples
    return total


def gathered_bytes(size: float, axes: Sequence[str], mesh: MeshSpec) -> dict[str, float]:
    """Bytes that a gather (or a scatter) of an array over some axes moves, by link."""
    within = math.prod(getattr(mesh, axis) for axis in axes)
    across = math.prod(getattr(mesh, f"dcn_{axis}") for axis in axes)
    # Each device of a slice exchanges its own part of the array with those of other slices.
    return {"ici": size * (within - 1) / within, "dcn": size / within * (across - 1) / across}


def dtype_width(dtype: str) -> int:
    """Bytes of an element."""
    return jnp.dtype(dtype).itemsize
