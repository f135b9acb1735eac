"""Digests of arrays: the same on the host and on devices, however an array is sharded."""

from __future__ import annotations

import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from trainer import device_digest
from trainer.leaf_digest import can_digest, leaf_digest

DTYPES = ["float32", "bfloat16", "int32", "uint8", "bool", "float8_e4m3fn", "uint32"]
SPECS = [P(), P("a"), P(None, "a"), P("b", "a"), P(("a", "b")), P(None, ("b", "a"))]


def make(dtype: str, shape: tuple[int, ...]) -> np.ndarray:
    data = np.random.default_rng(len(shape)).normal(size=shape) * 100
    return np.asarray(jnp.asarray(data).astype(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("small", [0, 100])
def test_the_digest_of_devices_is_that_of_the_host(dtype, small, monkeypatch):
    monkeypatch.setattr(device_digest, "_SMALL", small)
    state = {f"{shape}": make(dtype, shape) for shape in [(), (7,), (24, 16), (2, 3, 4, 5)]}
    found = device_digest.digests({name: jnp.asarray(array) for name, array in state.items()})
    assert found == {name: leaf_digest(array) for name, array in state.items()}
    assert len(set(found.values())) == len(found)


def test_the_digest_does_not_depend_on_the_sharding(monkeypatch):
    monkeypatch.setattr(device_digest, "_SMALL", 0)
    mesh = Mesh(np.array(jax.devices()[:8]).reshape(4, 2), ("a", "b"))
    array, key = make("bfloat16", (16, 24)), jax.random.key(5)
    for spec in SPECS:
        state = {
            "array": jax.device_put(array, NamedSharding(mesh, spec)),
            "key": jax.device_put(key, NamedSharding(mesh, P())),
        }
        assert device_digest.digests(state) == {
            "array": leaf_digest(array),
            "key": leaf_digest(np.asarray(jax.random.key_data(key))),
        }, spec


def test_every_flipped_bit_and_every_exchange_of_two_words_changes_it():
    rng = random.Random(0)
    array = make("float32", (40, 50))
    right = leaf_digest(array)
    for _ in range(300):
        data = bytearray(array.tobytes())
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        assert leaf_digest(np.frombuffer(data, np.float32)) != right
        i, j = rng.sample(range(array.size), 2)
        changed = array.reshape(-1).copy()
        changed[[i, j]] = changed[[j, i]]
        assert leaf_digest(changed) != right


def test_what_has_no_digest_is_left_out():
    assert not can_digest("complex64")
    state = {"a": jnp.zeros(3, jnp.complex64), "b": jnp.zeros(3)}
    assert list(device_digest.digests(state)) == ["b"]
