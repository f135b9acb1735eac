"""trainer.sharding, trainer.state and trainer.ledger: names to layouts, and what they cost."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import PartitionSpec

from launch.spec import ConfigError, MeshSpec
from trainer.ledger import check_replication, make_ledger
from trainer.mesh import make_mesh
from trainer.sharding import make_rules
from trainer.state import init_state, make_layout
from trainer.task import Task


def named(initializer, *names):
    return nnx.with_partitioning(initializer, names)


class Named(nnx.Module):
    """Two linear layers with logical names, and a norm."""

    def __init__(self, rngs, names=("embed", "mlp"), width=16):
        init = nnx.initializers.lecun_normal()
        self.up = nnx.Linear(8, width, rngs=rngs, kernel_init=named(init, *names), use_bias=False)
        self.norm = nnx.RMSNorm(
            width, rngs=rngs, scale_init=named(nnx.initializers.ones_init(), "norm")
        )
        self.dropout = nnx.Dropout(0.1, rngs=rngs)


class Unnamed(nnx.Module):
    """What anybody writes: no names at all, and a bias that nothing divides."""

    def __init__(self, rngs):
        self.conv = nnx.Conv(3, 8, kernel_size=(3, 3), rngs=rngs)
        self.head = nnx.Linear(8, 3, rngs=rngs)


class OneModel(Task):
    def make_model(self, rngs):
        return self.model_config["make"](rngs)

    def loss(self, model, batch):
        raise NotImplementedError

    def train_data(self, seed):
        raise NotImplementedError


def layout_of(make, sizes, rules=(), tx=None):
    mesh = make_mesh(MeshSpec(**sizes).resolve(8))
    task = OneModel({"make": make}, {})
    return make_layout(task, tx or optax.adamw(1e-3), mesh, make_rules(rules, mesh), seed=0)


def specs(layout):
    pairs = zip(layout.names, layout.shardings, strict=True)
    return {name: sharding.spec for name, sharding in pairs}


def test_named_dims_follow_the_rules_and_moments_follow_their_params():
    found = specs(layout_of(Named, {"data": 1, "fsdp": 4, "tensor": 2}))
    for name in ("model.up.kernel", "optimizer.opt_state.0.mu.up.kernel"):
        assert found[name] == PartitionSpec("fsdp", "tensor")
    assert found["optimizer.opt_state.0.nu.up.kernel"] == PartitionSpec("fsdp", "tensor")
    assert found["model.norm.scale"] == PartitionSpec(None)
    assert found["optimizer.opt_state.0.count"] == PartitionSpec()


def test_a_model_without_names_is_split_over_fsdp_by_its_largest_dim_that_divides():
    found = specs(layout_of(Unnamed, {"data": 2, "fsdp": 4}))
    assert found["model.conv.kernel"] == PartitionSpec(None, None, None, "fsdp")
    assert found["model.head.kernel"] == PartitionSpec("fsdp", None)
    assert found["optimizer.opt_state.0.mu.head.kernel"] == PartitionSpec("fsdp", None)
    assert found["model.head.bias"] == PartitionSpec()  # 3 entries, 4 devices.


def test_a_rule_from_the_config_wins_over_the_table():
    found = specs(
        layout_of(Named, {"data": 1, "fsdp": 8}, rules=(("mlp", "fsdp"), ("embed", None)))
    )
    assert found["model.up.kernel"] == PartitionSpec(None, "fsdp")


@pytest.mark.parametrize(
    ("make", "rules", "message"),
    [
        (lambda r: Named(r, names=("embed", "mpl")), (), "no rule for logical axis 'mpl'.*'mlp'"),
        (lambda r: Named(r, width=15), (), r"tensor = 2 does not divide dim 1 \('mlp', 15\).*up"),
        (
            lambda r: Named(r, names=("embed", "embed")),
            (),
            "up.kernel would use mesh axis 'fsdp' tw",
        ),
        (lambda r: Named(r, names=("embed",)), (), "up.kernel has shape"),
        (Named, (("mlp", "tensr"),), "no mesh axis 'tensr'; did you mean 'tensor'"),
        (Named, ("mlp",), "must be a pair"),
    ],
)
def test_what_cannot_be_laid_out_is_refused_by_name(make, rules, message):
    with pytest.raises(ConfigError, match=message):
        layout_of(make, {"data": 1, "fsdp": 4, "tensor": 2}, rules)


@pytest.mark.parametrize(
    "sizes", [{"data": 8}, {"data": 1, "fsdp": 8}, {"data": 2, "fsdp": 2, "tensor": 2}]
)
def test_initial_numbers_do_not_depend_on_the_mesh_and_lie_where_the_layout_says(sizes):
    layout = layout_of(Named, sizes)
    leaves = init_state(layout)
    with nnx.use_eager_sharding(False):
        model = Named(nnx.Rngs(0))
    state = layout.as_dict(leaves)
    np.testing.assert_array_equal(state["model.up.kernel"], model.up.kernel.get_value())
    for leaf, abstract in zip(leaves, layout.abstract, strict=True):
        assert leaf.sharding.is_equivalent_to(abstract.sharding, leaf.ndim)
        assert (leaf.shape, leaf.dtype) == (abstract.shape, abstract.dtype)


def test_merge_and_leaves_of_are_inverse():
    layout = layout_of(Named, {"data": 8})
    leaves = init_state(layout)
    again = layout.leaves_of(*layout.merge(leaves))
    for one, two in zip(leaves, again, strict=True):
        assert one is two or jnp.all(one == two)


def test_ledger_names_what_is_under_sharded_largest_first():
    ledger = make_ledger(layout_of(Unnamed, {"data": 2, "fsdp": 4}))
    worst = ledger.under_sharded()
    assert worst[0].name.endswith("head.bias")
    assert {entry.missing_axes for entry in worst} == {("fsdp",)}
    assert worst[0].excess_bytes == 9  # 12 bytes, of which 3 would do.
    # 3*3*3*8 and 8 and 8*3 floats split by 4, 3 floats whole; twice more for the moments; 2 counts.
    assert ledger.device_bytes == 3 * 4 * (216 // 4 + 8 // 4 + 24 // 4 + 3) + 2 * 4
    assert ledger.copies == 2
    assert "head.bias" in ledger.as_text()


def test_ledger_equals_the_arguments_of_a_compiled_step():
    layout = layout_of(Named, {"data": 2, "fsdp": 2, "tensor": 2})
    compiled = jax.jit(lambda leaves: leaves, out_shardings=layout.shardings).lower(layout.abstract)
    size = compiled.compile().memory_analysis().argument_size_in_bytes
    assert make_ledger(layout).device_bytes == size


def test_too_much_replication_is_an_error_before_the_first_step():
    ledger = make_ledger(layout_of(Unnamed, {"data": 2, "fsdp": 4}))
    check_replication(ledger, None)
    check_replication(ledger, ledger.excess_bytes)
    with pytest.raises(ConfigError, match=r"max_replicated_bytes=10: 27 bytes.*head.bias"):
        check_replication(ledger, 10)
