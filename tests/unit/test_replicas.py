"""Copies of a shard that differ are found wherever they are, and what is not a copy is let be."""

from __future__ import annotations

import ctypes
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from trainer import replicas
from trainer.replicas import ReplicaCheck, ReplicaError


@pytest.fixture
def state():
    """A layout and its leaves on 2 x 2 x 2 devices: whole, split over one axis, split over all."""
    mesh = Mesh(np.array(jax.devices()[:8]).reshape(2, 2, 2), ("data", "fsdp", "tensor"))
    specs = {
        "whole": (P(), jnp.arange(40.0)),
        "large": (P("fsdp"), jnp.arange(2.0**16).reshape(256, 256)),
        "halves": (P(None, "tensor"), jnp.ones((64, 1024), jnp.bfloat16)),
        "key": (P(), jax.random.key(3)),
        "all": (P(("data", "fsdp", "tensor")), jnp.arange(64)),
    }
    leaves = [jax.device_put(x, NamedSharding(mesh, spec)) for spec, x in specs.values()]
    abstract = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding) for x in leaves]
    layout = types.SimpleNamespace(mesh=mesh, names=list(specs), abstract=abstract)
    return layout, leaves


@pytest.fixture(autouse=True)
def at_once(monkeypatch):
    monkeypatch.setattr("trainer.agreement.time.sleep", lambda seconds: None)


def flip(leaf: jax.Array, device: int, byte: int) -> None:
    data = leaf.block_until_ready().addressable_shards[device].data
    ctypes.c_uint8.from_address(data.unsafe_buffer_pointer() + byte).value ^= 1


def test_equal_copies_pass(state):
    layout, leaves = state
    check = ReplicaCheck(layout, 10)
    assert [check.due(step) for step in (5, 10)] == [False, True]
    assert not ReplicaCheck(layout, 0).due(10)
    check.check(10, leaves)


@pytest.mark.parametrize("name", ["whole", "large", "halves"])
def test_one_bit_on_one_device_is_found(state, name):
    layout, leaves = state
    check = ReplicaCheck(layout, 10)
    check.check(10, leaves)
    flip(leaves[layout.names.index(name)], 5, 7)
    with pytest.raises(ReplicaError, match=f"at step 20 the copy of {name} on") as caught:
        check.check(20, leaves)
    assert "equal at step 10" in str(caught.value)
    odd = {group for groups in check._groups for group in groups.values()}
    assert len(odd) == 5  # One group of all eight, two of four each for either kind of halves.


def test_what_is_no_copy_has_nothing_to_be_compared_with(state):
    layout, leaves = state
    flip(leaves[layout.names.index("all")], 5, 3)
    ReplicaCheck(layout, 10).check(10, leaves)


def test_of_two_copies_neither_is_believed():
    assert replicas._odd({"a": [0], "b": [3]}) == ([0, 3], True)
    assert replicas._odd({"a": [0, 1], "b": [3]}) == ([3], False)
    assert replicas._odd({"a": [0, 1]}) == ([], False)
