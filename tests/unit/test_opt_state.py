"""trainer.opt_state: every array of the optimizer's state laid out after its param."""

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P
from optax import contrib

from launch.spec import MeshSpec
from trainer.mesh import abstract_mesh
from trainer.opt_state import (
    ParamLayout,
    ShardedOptimizer,
    StateRules,
    aligned,
    owner_of,
    spec_of_state,
    split_more,
)
from trainer.sharding import DEFAULT_RULES

MESH = abstract_mesh(MeshSpec(data=2, fsdp=2, tensor=2))
PLAIN = StateRules(MESH, DEFAULT_RULES)
ZERO = StateRules(MESH, DEFAULT_RULES, ("data",))


@pytest.mark.parametrize(
    ("shape", "param", "dims"),
    [
        ((8, 16), (8, 16), [0, 1]),
        ((8,), (8, 16), [0]),
        ((16,), (8, 16), [1]),
        ((16, 32), (16, 4, 32), [0, 2]),
        ((8, 1), (8, 16), [0, None]),  # SM3.
        ((1, 16), (8, 16), [None, 1]),
        ((1, 16, 1), (8, 16, 4), [None, 1, None]),
        ((5, 8, 16), (8, 16), [None, 0, 1]),  # L-BFGS's history.
        ((8, 8, 16), (8, 16), [None, 0, 1]),
        ((5,), (8, 16), [None]),
        ((8, 4), (8, 16), [0, None]),  # GaLore's projector, and its moments.
        ((4, 16), (8, 16), [None, 1]),
        ((16, 8), (8, 16), [None, None]),  # Turned about: none of the dims is where it was.
        ((1,), (8, 16), [None]),
        ((), (8, 16), []),
        ((3,), (), [None]),
        ((3, 8), (4, 8), [None, 1]),
        ((128, 4, 7), (128, 4, 32), [0, 1, None]),
    ],
)
def test_dims_of_the_state_are_found_in_the_param(shape, param, dims):
    assert aligned(shape, param) == dims


@pytest.mark.parametrize(
    ("shape", "param", "rows", "columns"),
    [
        ((16,), (16, 16), [0], [1]),
        ((4, 16), (4, 16, 16), [0, 1], [0, 2]),  # Stacked layers.
        ((4, 2, 16), (4, 2, 16, 16), [0, 1, 2], [0, 1, 3]),
    ],
)
def test_of_equal_dims_a_column_is_the_last(shape, param, rows, columns):
    assert aligned(shape, param) == rows
    assert aligned(shape, param, from_end=True) == columns


@pytest.mark.parametrize(
    ("shape", "spec", "axes", "expected"),
    [
        ((8, 16), P("fsdp", "tensor"), (), P("fsdp", "tensor")),
        ((8, 16), P("fsdp", "tensor"), ("data",), P("fsdp", ("tensor", "data"))),
        ((8, 16), P("fsdp", None), ("data",), P("fsdp", "data")),
        ((8, 16), P(), ("data", "fsdp"), P("fsdp", "data")),
        ((32, 2), P(), ("data", "fsdp"), P(("data", "fsdp"), None)),
        ((16, 8), P(("fsdp", "tensor")), ("data",), P(("fsdp", "tensor"), "data")),
        ((8, 16), P("data"), ("data",), P("data", None)),  # Splits it already.
        ((3, 5), P(), ("data",), P(None, None)),  # Divides none.
        ((2, 5), P("fsdp"), ("data",), P("fsdp", None)),
        ((), P(), ("data",), P()),
        ((0, 3), P(), ("data",), P(None, None)),
    ],
)
def test_a_further_axis_splits_the_dim_with_the_longest_shard_that_it_divides(
    shape, spec, axes, expected
):
    assert split_more(shape, spec, axes, MESH) == expected


def test_an_axis_of_one_device_splits_nothing():
    assert split_more((8,), P(), ("data",), abstract_mesh(MeshSpec(data=1, fsdp=8))) == P(None)


def array(*shape, dtype="float32"):
    return jax.ShapeDtypeStruct(shape, dtype)


KERNEL = ParamLayout((8, 16), P("fsdp", "tensor"))


@pytest.mark.parametrize(
    ("leaf", "param", "path", "how", "expected"),
    [
        (array(8, 16), KERNEL, "mu.k", PLAIN, P("fsdp", "tensor")),
        (array(8, 16, dtype="bfloat16"), KERNEL, "mu.k", PLAIN, P("fsdp", "tensor")),
        (array(8), KERNEL, "v_row.k", PLAIN, P(("fsdp", "tensor"))),
        (array(6), ParamLayout((6, 16), P("fsdp", "tensor")), "v_row.k", PLAIN, P("fsdp")),
        (array(16), KERNEL, "v_col.k", PLAIN, P(("tensor", "fsdp"))),
        (
            array(16),
            ParamLayout((16, 16), P("fsdp", None)),
            "v_col.k",
            PLAIN,
            P("fsdp"),
        ),
        (array(3, 8, 16), KERNEL, "diff.k", PLAIN, P(None, "fsdp", "tensor")),
        (array(1), KERNEL, "v.k", PLAIN, P()),  # Adafactor's placeholder.
        (array(), KERNEL, "nu.k", PLAIN, P()),
        (array(dtype="int32"), None, "count", PLAIN, P()),
        (array(2, dtype="uint32"), None, "rng_key", PLAIN, P()),
        (array(64, dtype="int32"), None, "steps", PLAIN, P()),
        (array(64, 3), None, "flat", PLAIN, P("fsdp", None)),
        (array(64, 3), None, "flat", ZERO, P(("fsdp", "data"), None)),
    ],
)
def test_state_is_laid_out_after_its_shape_and_owner(leaf, param, path, how, expected):
    assert spec_of_state(leaf, param, path, how) == expected


@pytest.mark.parametrize(
    ("path", "owner"),
    [
        ("0.mu.layers.0.kernel", "layers.0.kernel"),
        ("inner_states.kernel.inner_state.0.nu.norm", "norm"),
        ("inner_states.norm.inner_state.0.nu.kernel", "kernel"),  # A group with a param's name.
        ("inner_states.norm.inner_state.0.count", "norm"),
        ("0.mu.deep.layers.0.kernel", "deep.layers.0.kernel"),
        ("1.v_row.kernel.0", "kernel"),  # SM3 keeps a list.
        ("count", None),
        ("0.mu.kernels", None),
    ],
)
def test_state_belongs_to_the_param_with_the_longest_path_in_its_own(path, owner):
    params = {"layers.0.kernel", "deep.layers.0.kernel", "kernel", "norm"}
    assert owner_of(path, params) == owner


class Net(nnx.Module):
    """A square kernel, layers stacked for a scan, and a norm that names a layout of its state."""

    def __init__(self):
        def param(shape, *names, **metadata):
            return nnx.Param(jnp.zeros(shape), out_sharding=names, **metadata)

        self.square = param((16, 16), "embed", "mlp")
        self.stacked = param((3, 16, 16), "layers", "mlp", "embed")
        self.norm = param((32,), "norm", optimizer_sharding=("embed",))


def specs_of(tx, how=PLAIN):
    """Path of the state -> PartitionSpec, of all arrays with more than one element."""

    def make():
        with nnx.use_eager_sharding(False):
            return ShardedOptimizer(Net(), tx, nnx.Param, how)

    state = nnx.state(nnx.eval_shape(make))
    with nnx.logical_axis_rules(tuple(how.rules.items())):
        specs = nnx.get_partition_spec(state)
    is_spec = {"is_leaf": lambda leaf: isinstance(leaf, P)}
    return {
        ".".join(str(key) for key in path[1:]): variable.get_value()
        for path, variable in nnx.to_flat_state(specs)
        if jax.tree.leaves(variable, **is_spec)[0] != P()
    }


@pytest.mark.parametrize(
    ("tx", "how", "expected"),
    [
        (
            optax.sgd(0.1, momentum=0.9),
            PLAIN,
            {
                "0.trace.square": P("fsdp", "tensor"),
                "0.trace.stacked": P(None, "tensor", "fsdp"),
                "0.trace.norm": P("fsdp"),
            },
        ),
        (
            optax.sgd(0.1, momentum=0.9),
            ZERO,
            {
                "0.trace.square": P(("fsdp", "data"), "tensor"),
                "0.trace.stacked": P(None, ("tensor", "data"), "fsdp"),
                "0.trace.norm": P(("fsdp", "data")),
            },
        ),
        (
            optax.scale_by_factored_rms(min_dim_size_to_factor=4),
            PLAIN,
            {
                "v_row.square": P(("fsdp", "tensor")),
                "v_col.square": P(("tensor", "fsdp")),
                "v_row.stacked": P(None, ("tensor", "fsdp")),
                "v_col.stacked": P(None, ("fsdp", "tensor")),
                "v.norm": P("fsdp"),
            },
        ),
        (
            optax.scale_by_sm3(b1=0.0),
            PLAIN,
            {
                "mu.square.0": P(("fsdp", "tensor")),
                "mu.square.1": P(("fsdp", "tensor")),
                "mu.stacked.0": P(None),
                "mu.stacked.1": P(("tensor", "fsdp")),
                "mu.stacked.2": P(("tensor", "fsdp")),
                "mu.norm.0": P("fsdp"),
                "nu.square": P("fsdp", "tensor"),
                "nu.stacked": P(None, "tensor", "fsdp"),
                "nu.norm": P("fsdp"),
            },
        ),
        (
            optax.scale_by_lbfgs(memory_size=3),
            PLAIN,
            {
                **{
                    f"{name}.{param}": P(*[None] * (name.startswith("diff")), *spec)
                    for name in ("params", "updates", "diff_params_memory", "diff_updates_memory")
                    for param, spec in {
                        "square": ("fsdp", "tensor"),
                        "stacked": (None, "tensor", "fsdp"),
                        "norm": ("fsdp",),
                    }.items()
                },
                "weights_memory": P(None),
            },
        ),
        (
            contrib.scale_by_galore(rank=4),
            PLAIN,
            {
                "projector.square": P(("fsdp", "tensor"), None),  # [16, 4]
                **{
                    f"base_optimizer_state.{moment}.{param}": spec
                    for moment in ("mu", "nu")
                    for param, spec in {
                        "square": P(None, ("tensor", "fsdp")),  # [4, 16]
                        "stacked": P(None, "tensor", "fsdp"),
                        "norm": P("fsdp"),
                    }.items()
                },
            },
        ),
    ],
)
def test_optaxs_own_state_is_split_where_it_can_be(tx, how, expected):
    assert specs_of(tx, how) == expected
