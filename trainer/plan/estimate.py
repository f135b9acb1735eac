"""What a step will about take on each device, without compiling it.

The state is that of the layout, exactly. Activations are the residuals that JAX's autodiff keeps of
the task's loss under the model's own remat, traced on one device, once with weights as half of them
would be on each of two devices along `tensor`. Then, of a microbatch of `b` examples a device:

    temporaries = b * kept                      what the forward pass keeps for the backward
                + b * widest                    the largest array of an example, and its gradient
                + gradients                     as the params are split; where microbatches add
                                                theirs up also as the optimizer's state is
                + gathered                      weights in use, whole over the batch axes

`docs/plan.md` has how far off this was.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from launch.spec import BATCH_AXES, TrainSpec
from launch.topology import Chip
from trainer.ledger import array_bytes
from trainer.plan.bound import bounds, largest, peaks_of
from trainer.plan.least import dtype_width, gathered_bytes
from trainer.plan.trace import Trace
from trainer.prepare import Prepared
from trainer.sharding import as_tuple
from trainer.state import StateLayout
from trainer.task import Task

_BUFFERED = 2  # Layers' weights at a time: one in use, the next on its way.


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Figures of a device, named as in a plan's record."""

    peak_bytes: int
    state_bytes: int
    temp_bytes: int
    temp_parts: Mapping[str, float]
    link_bytes: Mapping[str, float]
    bounds: Mapping[str, float | None]
    step_seconds_bound: float | None
    bound_by: str


def estimate(
    spec: TrainSpec, task: Task, prepared: Prepared, traced: Trace, chip: Chip | None
) -> Estimate:
    """The figures of a step.

    Args:
      spec: resolved.
      task: the model and its loss.
      prepared: on a mesh of the spec's shape.
      traced: of the task.
      chip: of the devices; None where it is not known.
    """
    layout, tensor = prepared.layout, spec.mesh.tensor
    examples = spec.global_batch_size / spec.mesh.batch_shards
    at_once = examples / spec.num_microbatches
    weights = Weights.of(layout, task)
    parts = {
        "kept": at_once * traced.kept.over(tensor),
        "widest": at_once * traced.widest.over(tensor),
        "gradients": weights.gradients + weights.summed * (spec.num_microbatches > 1),
        "gathered": weights.gathered,
    }
    temp = sum(parts.values())
    state = prepared.ledger.device_bytes
    links = {name: sent for name, sent in expected_bytes(spec, task, layout).items() if sent}
    peaks = peaks_of(chip) if chip else None
    seconds = bounds(peaks, examples * traced.flops.over(tensor), 2 * state, links)
    bound, by = largest(seconds)
    return Estimate(int(state + temp), state, int(temp), parts, links, seconds, bound, by)


def expected_bytes(spec: TrainSpec, task: Task, layout: StateLayout) -> dict[str, float]:
    """Bytes that each device will send in a step, by link.

    More than the least that is possible: the trainer reduces the gradients of each microbatch, in
    the dtype in which weights are used. Optimizer state that is split over more axes than its
    params has the new params gathered from there.
    """
    mesh, number = spec.mesh, spec.num_microbatches
    width = task.compute_dtype()
    total = {"ici": 0.0, "dcn": 0.0}

    def send(size: float, axes: Sequence[str]) -> None:
        for link, sent in gathered_bytes(size, axes, mesh).items():
            total[link] += sent

    shardings = iter(layout.gradients)
    for name, leaf in zip(layout.names, layout.abstract, strict=True):
        if name not in layout.params:
            continue
        axes = _axes(leaf.sharding)
        of_state = _axes(next(shardings))
        full = array_bytes(leaf)[1] * math.prod(
            layout.mesh.shape[axis] for axis in BATCH_AXES if axis in axes
        )
        narrow = 1.0 if width is None else min(1.0, dtype_width(width) / leaf.dtype.itemsize)
        shared = [axis for axis in BATCH_AXES if axis in axes]
        # Gathered forward and backward, and their gradients scattered.
        send(number * 3 * narrow * full, shared)
        shard = narrow * array_bytes(leaf)[1]
        for axis in BATCH_AXES:
            if axis in axes:
                continue
            # Scattered for each microbatch, and gathered once; or both for each of them.
            send(shard * (number + 1 if axis in of_state else 2 * number), [axis])
    activations = task.tensor_bytes_per_example()
    if activations is not None and mesh.tensor > 1:
        examples = spec.global_batch_size / mesh.batch_shards
        total["ici"] += 2 * (mesh.tensor - 1) / mesh.tensor * activations * examples
    return total


def _axes(sharding: Any) -> set[str]:
    """The mesh axes that split an array."""
    return {axis for entry in sharding.spec for axis in as_tuple(entry)}


class Weights(NamedTuple):
    """What a device has of the weights besides the state, in bytes: `gradients` of a microbatch,
    those of all `summed` up, and weights `gathered` over the batch axes, as many as are in use at a
    time."""

    gradients: float
    summed: float
    gathered: float

    @classmethod
    def of(cls, layout: StateLayout, task: Task) -> Weights:
        """Those of a layout."""
        gradients = summed = gathered = widest = 0.0
        width = task.compute_dtype()
        shards = iter(layout.gradients)
        for name, leaf in zip(layout.names, layout.abstract, strict=True):
            if name not in layout.params:
                continue
            total, device = array_bytes(leaf)
            shard = next(shards).shard_shape(tuple(leaf.shape))
            gradients += device
            summed += total * math.prod(shard) / max(1, leaf.size)
            axes = _axes(leaf.sharding)
            if axes.isdisjoint(BATCH_AXES):
                continue
            size = device * math.prod(layout.mesh.shape[a] for a in axes if a in BATCH_AXES)
            if width is not None:
                size *= min(1.0, dtype_width(width) / leaf.dtype.itemsize)
            layers = _layers(leaf)
            gathered += _BUFFERED * size / layers if layers > 1 else 0.0
            widest = max(widest, size / layers)
        return cls(gradients, summed, max(gathered, _BUFFERED * widest))


def _layers(leaf: Any) -> int:
    """How many layers a leaf holds: those that a scan goes through are stacked in front."""
    entries = leaf.sharding.spec
    return leaf.shape[0] if len(leaf.shape) > 2 and len(entries) and entries[0] is None else 1
