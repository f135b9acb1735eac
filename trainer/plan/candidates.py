"""The ways to run a training step on a cluster that a search goes through. Pure."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

from launch.spec import MeshSpec, TrainSpec

# What a layer keeps for its backward pass, from all to nothing: names of TransformerConfig.remat.
# A policy that the task does not know is passed over.
REMAT = (
    *("none", "keep_all_but_mlp", "keep_qkv", "keep_attention"),
    *("dots_with_no_batch_dims_saveable", "full"),
)
OPTIMIZER_AXES = ((), ("data",))
_MOST_MICROBATCHES = 64


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One way.

    Attributes:
      mesh: resolved.
      remat: `config.model.remat`; None where the model has no such field.
      num_microbatches, optimizer_axes, global_batch_size: fields of the config.
    """

    mesh: MeshSpec
    remat: str | None
    num_microbatches: int
    optimizer_axes: tuple[str, ...]
    global_batch_size: int

    def spec(self, spec: TrainSpec, num_devices: int) -> TrainSpec:
        """A training's spec with this in it.

        Raises:
          ConfigError: it does not multiply out.
        """
        model = dict(spec.model)
        if self.remat is not None:
            model["remat"] = self.remat
        sharding = dataclasses.replace(spec.sharding, optimizer_axes=self.optimizer_axes)
        changed = dataclasses.replace(
            spec,
            model=model,
            mesh=self.mesh,
            sharding=sharding,
            num_microbatches=self.num_microbatches,
            global_batch_size=self.global_batch_size,
        )
        return changed.resolve(num_devices)

    def fields(self) -> dict[str, Any]:
        """The config's fields that it sets, dotted, below `config`."""
        found = {f"mesh.{name}": size for name, size in dataclasses.asdict(self.mesh).items()}
        if self.remat is not None:
            found["model.remat"] = self.remat
        return {
            **found,
            "num_microbatches": self.num_microbatches,
            "sharding.optimizer_axes": self.optimizer_axes,
            "global_batch_size": self.global_batch_size,
        }


def meshes(num_devices: int, slices: int) -> Iterator[MeshSpec]:
    """All meshes of so many devices in so many slices."""
    each = num_devices // slices
    for dcn_data in _divisors(slices):
        for tensor, fsdp in itertools.product(_divisors(each), repeat=2):
            if each % (tensor * fsdp) == 0:
                data = each // (tensor * fsdp)
                yield MeshSpec(data, fsdp, tensor, dcn_data, slices // dcn_data)


def candidates(
    mesh: MeshSpec,
    *,
    remat: Sequence[str | None],
    global_batch_sizes: Sequence[int],
) -> Iterator[Candidate]:
    """All ways on one mesh, those left out that are the same as others.

    Args:
      mesh: resolved.
      remat: what to try.
      global_batch_sizes: what to try; one that the mesh does not divide gives none.
    """
    # Optimizer state that is split over `data` already, or has no data axis to be split over.
    all_axes = OPTIMIZER_AXES if mesh.data * mesh.dcn_data > 1 else OPTIMIZER_AXES[:1]
    for batch in global_batch_sizes:
        if batch % mesh.batch_shards:
            continue
        each = batch // mesh.batch_shards
        for number in _divisors(each):
            if number > _MOST_MICROBATCHES:
                break
            for policy, axes in itertools.product(remat, all_axes):
                yield Candidate(mesh, policy, number, axes, batch)


def _divisors(number: int) -> list[int]:
    low = [n for n in range(1, math.isqrt(number) + 1) if number % n == 0]
    return sorted({*low, *(number // n for n in low)})
