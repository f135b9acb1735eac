"""Every gradient transformation of Optax: sharded over the mesh, with one device's results."""

from __future__ import annotations

import math
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from launch.spec import CheckpointSpec, ConfigError, MeshSpec
from tests.transformations.cases import CASES, FROZEN, names_in_optax
from trainer.checkpoint import Checkpointer
from trainer.ledger import make_ledger
from trainer.mesh import make_mesh
from trainer.opt_state import owner_of
from trainer.optax_names import REFUSED
from trainer.optimizer import make_optimizer
from trainer.prepare import check_optimizer
from trainer.sharding import make_rules, mesh_axes_of
from trainer.state import init_state, make_layout
from trainer.step import compile_train_step, make_train_step
from trainer.task import Task

BATCH = 8


class Net(nnx.Module):
    """A kernel, a square, a bias, and a kernel of three dims, all of them named."""

    def __init__(self, rngs: nnx.Rngs):
        # Constants: a generator of random numbers takes longer to compile than all the rest.
        rng = np.random.default_rng(1)

        def param(shape: tuple[int, ...], names: tuple[str, ...]) -> nnx.Param:
            value = rng.normal(size=shape) / math.sqrt(shape[0])
            return nnx.Param(jnp.asarray(value, jnp.float32), out_sharding=names)

        self.kernel = param((8, 16), ("embed", "mlp"))
        self.bias = param((16,), ("mlp",))
        self.square = param((16, 16), ("mlp", "embed"))
        self.deep = param((16, 2, 4), ("embed", "heads", "head_dim"))

    def __call__(self, x: jax.Array) -> jax.Array:
        x = jax.nn.gelu(x @ self.kernel[...] + self.bias[...]) @ self.square[...]
        return jnp.einsum("bi,ihd->bhd", x, self.deep[...])


class Small(Task):
    def make_model(self, rngs: nnx.Rngs) -> Net:
        return Net(rngs)

    def loss(self, model: Net, batch: Any) -> jax.Array:
        return jnp.mean((model(batch["x"]) - batch["y"]) ** 2)

    def train_data(self, seed: int) -> grain.MapDataset:
        raise NotImplementedError


TASK = Small(model={}, data={})
RNG = np.random.default_rng(0)
ROWS = {
    "x": RNG.normal(size=(BATCH, 8)).astype(np.float32),
    "y": RNG.normal(size=(BATCH, 2, 4)).astype(np.float32),
}
MESH = make_mesh(MeshSpec(data=2, fsdp=2, tensor=2))
OTHER_MESH = make_mesh(MeshSpec(data=1, fsdp=4, tensor=2))
ONE = make_mesh(MeshSpec(data=1, fsdp=1, tensor=1), jax.devices()[:1])


def layout_of(section: dict[str, Any], mesh: Any, **options: Any) -> Any:
    optimizer = make_optimizer(section)
    layout = make_layout(TASK, optimizer.tx, mesh, make_rules((), mesh), seed=0, **options)
    check_optimizer(optimizer, layout)
    return layout


def train(layout: Any, leaves: list[jax.Array], steps: int = 3) -> list[jax.Array]:
    """The state after some steps on the same batch."""
    where = NamedSharding(layout.mesh, P(("data", "fsdp")))
    batch = {name: jax.device_put(value, where) for name, value in ROWS.items()}
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), batch)
    step = compile_train_step(make_train_step(TASK, layout), layout, abstract)
    for _ in range(steps):
        leaves, _ = step(leaves, batch)
    return leaves


@pytest.mark.parametrize("name", CASES)
def test_state_is_sharded_trains_like_on_one_device_and_is_restored_on_another_mesh(name, tmp_path):
    layout = layout_of(CASES[name], MESH)
    check_specs(layout)
    alone = layout_of(CASES[name], ONE)
    assert alone.names == layout.names
    leaves = init_state(layout)
    first = [plain(leaf) for leaf in leaves]
    # A program of its own to make them is not worth its compiling.
    expected = train(alone, jax.device_put(leaves, alone.shardings, may_alias=False))
    leaves = train(layout, leaves)
    check_arrays(layout, leaves)
    for leaf_name, ours, theirs in zip(layout.names, leaves, expected, strict=True):
        np.testing.assert_allclose(
            plain(ours), plain(theirs), rtol=2e-3, atol=2e-5, err_msg=leaf_name
        )
    still = {
        leaf_name.removeprefix("model.")
        for leaf_name, now, before in zip(layout.names, leaves, first, strict=True)
        if leaf_name.startswith("model.") and np.array_equal(plain(now), before)
    }
    assert still == FROZEN.get(name, set())

    other = layout_of(CASES[name], OTHER_MESH)
    with_all = layout.as_dict(leaves)
    saver = Checkpointer(tmp_path, CheckpointSpec(), config={})
    saver.save(3, with_all, {}, final=True)
    restored = saver.restore(other.as_dict(other.abstract))
    saver.close()
    assert restored is not None
    for leaf_name, leaf in restored.state.items():
        np.testing.assert_array_equal(plain(leaf), plain(with_all[leaf_name]), err_msg=leaf_name)
    check_arrays(other, other.from_dict(restored.state))


def check_specs(layout: Any) -> None:
    """State of a param's shape lies as the param; other state is split where it can be."""
    params = {
        name.removeprefix("model."): leaf
        for name, leaf in zip(layout.names, layout.abstract, strict=True)
        if name.startswith("model.")
    }
    for name, leaf in zip(layout.names, layout.abstract, strict=True):
        if not name.startswith("optimizer.") or not jnp.issubdtype(leaf.dtype, jnp.inexact):
            continue
        spec = leaf.sharding.spec
        owner = owner_of(name.removeprefix("optimizer.opt_state."), params)
        if owner and leaf.shape == params[owner].shape:
            assert spec == params[owner].sharding.spec, name
            continue
        wanted = mesh_axes_of(params[owner].sharding.spec) if owner else {"fsdp"}
        local = leaf.sharding.shard_shape(leaf.shape)
        for axis in wanted - mesh_axes_of(spec):
            size = layout.mesh.shape[axis]
            assert not any(n > 1 and n % size == 0 for n in local), (name, leaf.shape, spec)


def check_arrays(layout: Any, leaves: list[jax.Array]) -> None:
    """What lies on the devices is what the layout says and the ledger counts."""
    entries = make_ledger(layout).entries
    for entry, wanted, leaf in zip(entries, layout.abstract, leaves, strict=True):
        assert leaf.sharding.is_equivalent_to(wanted.sharding, leaf.ndim), entry.name
        if not jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            shard = leaf.addressable_shards[0].data
            assert shard.size * leaf.dtype.itemsize == entry.device_bytes, entry.name


def plain(leaf: jax.Array) -> np.ndarray:
    if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    return np.asarray(leaf, np.float32) if leaf.dtype == jnp.bfloat16 else np.asarray(leaf)


def test_the_table_has_every_transformation_of_optax_but_those_refused_by_name():
    assert names_in_optax() - set(CASES) - set(REFUSED) == set()
    assert not set(CASES) & set(REFUSED)


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_work_is_refused_by_name_with_the_reason(name):
    with pytest.raises(ConfigError, match=f"optax.{name} cannot be used here: "):
        make_optimizer({"chain": (name,)})
