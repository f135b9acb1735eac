"""Axis sizes to a device mesh, within slices (ICI) and across them (DCN)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from launch.spec import AXES, BATCH_AXES, ConfigError, MeshSpec


def make_mesh(spec: MeshSpec, devices: Sequence[Any] | None = None) -> Mesh:
    """Lay devices out as a mesh with axes `data`, `fsdp`, `tensor`, all of type Auto.

    Within a slice the fastest links go to the innermost axis (`tensor`). Across slices only `data`
    and `fsdp` reach, by their `dcn_` degrees, as the outer part of the axis.

    Args:
      spec: a resolved MeshSpec: its sizes multiply out to the number of devices.
      devices: all devices of the gang; `jax.devices()` by default. Their order is the same on
        every process.

    Raises:
      ConfigError: the `dcn_` degrees are not the number of slices.
    """
    devices = jax.devices() if devices is None else list(devices)
    # Auto, because under jax.make_mesh's default (Explicit) a sharding constraint is only an
    # assertion and NNX layers do not trace.
    return Mesh(device_grid(spec, devices), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def abstract_mesh(spec: MeshSpec) -> Any:
    """The mesh of a resolved spec without its devices: enough to lay arrays out, not to run."""
    sizes = (spec.dcn_data * spec.data, spec.dcn_fsdp * spec.fsdp, spec.tensor)
    return AbstractMesh(sizes, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def device_grid(spec: MeshSpec, devices: Sequence[Any]) -> np.ndarray:
    """Devices as an array [data, fsdp, tensor], slices outermost; arguments as for `make_mesh`."""
    num_slices = len({getattr(device, "slice_index", 0) for device in devices})
    ici = (spec.data, spec.fsdp, spec.tensor)
    dcn = (spec.dcn_data, spec.dcn_fsdp, 1)
    dcn_size = spec.dcn_data * spec.dcn_fsdp
    if dcn_size != num_slices:
        raise ConfigError(
            "config.mesh",
            f"dcn_data={spec.dcn_data} * dcn_fsdp={spec.dcn_fsdp} = {dcn_size}, but the devices "
            f"form {num_slices} slice(s); make the product {num_slices}",
        )
    if devices[0].platform != "tpu" and num_slices == 1:
        # CPU and GPU devices come in order of process; keeping it puts the innermost axes inside
        # of a process and gives each process one contiguous block of the batch.
        return np.asarray(devices).reshape(ici)
    try:
        return _on_torus(ici, dcn, devices, split=False)
    except NotImplementedError:  # An axis is no whole dims of the torus; it may be a part of one.
        try:
            return _on_torus(ici, dcn, devices, split=True)
        except NotImplementedError as error:
            raise ConfigError(
                "config.mesh",
                f"data={spec.data} fsdp={spec.fsdp} tensor={spec.tensor} cannot be laid over the "
                f"chips' grid {'x'.join(map(str, _grid_of(devices)))}; choose sizes that are "
                "products of its dims or of their factors",
            ) from error


def _on_torus(
    ici: tuple[int, ...], dcn: tuple[int, ...], devices: Sequence[Any], split: bool
) -> np.ndarray:
    """Devices along the torus's dims, neighbours next to each other; slices outermost."""
    if dcn == (1, 1, 1):
        return mesh_utils.create_device_mesh(ici, devices=devices, allow_split_physical_axes=split)
    return mesh_utils.create_hybrid_device_mesh(
        ici, dcn, devices=devices, allow_split_physical_axes=split
    )


def _grid_of(devices: Sequence[Any]) -> list[int]:
    coordinates = [getattr(device, "coords", (0,)) for device in devices]
    return [len(set(line)) for line in zip(*coordinates, strict=True)]


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding of a batch: arrays [B, ...] split over `data` and `fsdp` on dim 0."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    """A whole copy on every device."""
    return NamedSharding(mesh, PartitionSpec())
