"""trainer.mesh: sizes to devices, within and across slices."""

import types

import jax
import pytest
from jax.sharding import AxisType

from launch.spec import ConfigError, MeshSpec
from trainer.mesh import batch_sharding, make_mesh


def test_mesh_has_the_axes_of_the_spec_and_keeps_the_order_of_devices():
    mesh = make_mesh(MeshSpec(data=2, fsdp=2, tensor=2))
    assert dict(mesh.shape) == {"data": 2, "fsdp": 2, "tensor": 2}
    assert [device.id for device in mesh.devices.flat] == [d.id for d in jax.devices()]
    assert set(mesh.axis_types) == {AxisType.Auto}


def test_batch_is_split_over_data_and_fsdp():
    mesh = make_mesh(MeshSpec(data=2, fsdp=2, tensor=2))
    assert batch_sharding(mesh).shard_shape((8, 3)) == (2, 3)


def test_slices_are_the_outer_part_of_the_data_axis():
    # CPU devices have no slices: stand-ins carry what the mesh is made of.
    devices = [
        types.SimpleNamespace(
            id=i, slice_index=i // 4, process_index=i // 4, platform="cpu", device_kind="cpu"
        )
        for i in range(8)
    ]
    grid = make_mesh_grid(MeshSpec(data=2, fsdp=2, dcn_data=2), devices)
    assert grid.shape == (4, 2, 1)
    assert [d.slice_index for d in grid[:2].flat] == [0] * 4
    assert [d.slice_index for d in grid[2:].flat] == [1] * 4


def test_dcn_degrees_must_be_the_number_of_slices():
    with pytest.raises(ConfigError, match=r"dcn_data=2 \* dcn_fsdp=1 = 2.*form 1 slice"):
        make_mesh(MeshSpec(data=4, dcn_data=2))


def make_mesh_grid(spec, devices):
    """The grid of a mesh of stand-ins, which a real Mesh does not take."""
    from trainer import mesh

    return mesh.device_grid(spec, devices)


@pytest.mark.parametrize(
    ("spec", "devices", "expected"),
    [
        (MeshSpec(), 8, (8, 1, 1)),
        (MeshSpec(data=2, fsdp=-1, tensor=2), 8, (2, 2, 2)),
        (MeshSpec(data=-1, dcn_data=2), 8, (4, 1, 1)),
    ],
)
def test_minus_one_takes_what_is_left(spec, devices, expected):
    resolved = spec.resolve(devices)
    assert (resolved.data, resolved.fsdp, resolved.tensor) == expected


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"data": 3}, "data=3 = 3 devices, but the cluster has 8"),
        ({"fsdp": 3}, "fsdp=3 = 3 does not divide the 8 devices"),
        ({"fsdp": -1}, "only one size may be -1"),
        ({"tensor": 0}, "must be at least 1"),
    ],
)
def test_what_does_not_multiply_out_is_refused_with_the_numbers(sizes, message):
    with pytest.raises(ConfigError, match=message):
        MeshSpec(**sizes).resolve(8)
