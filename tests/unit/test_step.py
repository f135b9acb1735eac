"""One update is the same however its batch is split, compiles once, and keeps its layout."""

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax import monitoring
from jax.sharding import PartitionSpec as P

from launch.spec import MeshSpec
from trainer.evaluate import compile_eval_step, make_eval_step
from trainer.ledger import make_ledger
from trainer.mesh import batch_sharding, make_mesh
from trainer.sharding import make_rules
from trainer.state import init_state, make_layout
from trainer.step import (
    compile_train_step,
    make_train_step,
)
from trainer.task import Loss, Task
from trainer.transforms import SkipSpec, average_params, skip_bad_steps

BATCH, WIDTH = 16, 8


def wave(key, shape, dtype, **_):
    """Unlike numbers, quicker to compile than random ones."""
    return jnp.cos(3.0 * jnp.arange(np.prod(shape), dtype=dtype)).reshape(shape)


class Net(nnx.Module):
    """Two layers, and between them what a test asks for."""

    def __init__(self, rngs, dropout=0.0, sow=False):
        self.inner = nnx.Linear(WIDTH, 16, kernel_init=wave, rngs=rngs)
        self.outer = nnx.Linear(16, 1, kernel_init=wave, rngs=rngs)
        self.dropout = nnx.Dropout(dropout, rngs=rngs) if dropout else None
        self.should_sow = sow

    def __call__(self, x):
        x = jnp.tanh(self.inner(x))
        if self.should_sow:
            self.sow(nnx.Intermediate, "hidden", x)
        if self.dropout:
            x = self.dropout(x)
        return self.outer(x)[..., 0]


class Fit(Task):
    """Squared error weighted by example, or the plain mean as a scalar."""

    def __init__(self, scalar=False, **net):
        super().__init__({}, {})
        self.scalar, self.net = scalar, net

    def make_model(self, rngs):
        model = Net(rngs, **self.net)
        model.eval()  # As a user may leave it; a step must not depend on it.
        return model

    def loss(self, model, batch):
        errors = jnp.square(model(batch["x"]) - batch["y"])
        if self.scalar:
            return errors.mean()
        return Loss(jnp.sum(errors * batch["weight"]), jnp.sum(batch["weight"]))

    def train_data(self, seed):
        return grain.MapDataset.range(1)


def batch_of(seed=0):
    rng = np.random.default_rng(seed)
    # Most of the weight is on the first rows: no two parts of the batch weigh the same.
    weight = np.arange(BATCH, 0, -1, dtype=np.float32) ** 2
    return {
        "x": rng.normal(size=(BATCH, WIDTH)).astype(np.float32),
        "y": rng.normal(size=BATCH).astype(np.float32),
        "weight": weight,
    }


class Run:
    """A task's state and compiled step on a mesh."""

    def __init__(self, task, mesh_spec=None, tx=None, optimizer_axes=(), **options):
        spec = mesh_spec or MeshSpec(data=1)
        num_devices = spec.data * spec.fsdp * spec.tensor
        mesh = make_mesh(spec, jax.devices()[:num_devices])
        tx = tx or optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(0.1))
        self.task = task
        rules = make_rules((), mesh)
        self.layout = make_layout(task, tx, mesh, rules, seed=0, optimizer_axes=optimizer_axes)
        self.leaves = init_state(self.layout)
        self.batch = jax.device_put(batch_of(), batch_sharding(mesh))
        step = make_train_step(task, self.layout, **options)
        self.compiled = compile_train_step(step, self.layout, self.abstract_batch())

    def abstract_batch(self):
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), self.batch
        )

    def step(self, count=1):
        """Metrics of each of `count` steps."""
        rows = []
        for _ in range(count):
            self.leaves, metrics = self.compiled(self.leaves, self.batch)
            rows.append({name: float(value) for name, value in metrics.items()})
        return rows

    def evaluate(self):
        """[total, weight] of the batch."""
        step = make_eval_step(self.task, self.layout)
        compiled = compile_eval_step(step, self.layout, self.abstract_batch())
        return [float(part) for part in compiled(self.leaves, self.batch)]

    def state(self):
        return {
            name: np.asarray(jax.random.key_data(leaf) if is_key(leaf) else leaf)
            for name, leaf in self.layout.as_dict(self.leaves).items()
        }


def is_key(leaf):
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def assert_same_training(run, other, steps=3):
    for metrics, expected in zip(run.step(steps), other.step(steps), strict=True):
        assert metrics == pytest.approx(expected, rel=1e-5)
    expected = other.state()
    for name, leaf in run.state().items():
        np.testing.assert_allclose(leaf, expected[name], rtol=1e-4, atol=1e-6, err_msg=name)


@pytest.fixture(scope="module")
def whole():
    """Metrics and state after three steps on one device with the batch in one piece."""
    run = Run(Fit())
    return run.step(3), run.state()


def test_metrics_are_the_weighted_mean_loss_and_the_norm_of_its_gradient(whole):
    run, batch = Run(Fit()), batch_of()
    model, _ = run.layout.merge(run.leaves)

    def loss(model):
        errors = jnp.square(model(batch["x"]) - batch["y"])
        return jnp.sum(errors * batch["weight"]) / jnp.sum(batch["weight"])

    value, grads = nnx.value_and_grad(loss)(model)
    norm = np.sqrt(sum(np.sum(np.square(grad)) for grad in jax.tree.leaves(grads)))
    first = whole[0][0]
    assert first == pytest.approx({"loss": float(value), "grad_norm": norm}, rel=1e-5)
    assert whole[0][2]["loss"] < first["loss"]


SPLITS = {
    "four microbatches": ({}, {"num_microbatches": 4}),
    "eight devices": ({"data": 8}, {}),
    "fsdp and microbatches": ({"data": 2, "fsdp": 4}, {"num_microbatches": 2}),
    "tensor": ({"data": 2, "fsdp": 2, "tensor": 2}, {}),
    "one all-reduce": ({"data": 8}, {"one_all_reduce": True}),
    "one all-reduce, microbatches": ({"data": 8}, {"one_all_reduce": True, "num_microbatches": 2}),
}


@pytest.mark.parametrize("split", SPLITS)
def test_uneven_weights_train_the_same_however_the_batch_is_split(split, whole):
    sizes, options = SPLITS[split]
    run = Run(Fit(), MeshSpec(**{"data": 1, **sizes}), **options)
    for metrics, expected in zip(run.step(3), whole[0], strict=True):
        assert metrics == pytest.approx(expected, rel=1e-5)
    for name, leaf in run.state().items():
        np.testing.assert_allclose(leaf, whole[1][name], rtol=1e-4, atol=1e-6, err_msg=name)


def test_a_scalar_loss_is_the_mean_over_examples_in_microbatches_too():
    run = Run(Fit(scalar=True), num_microbatches=4)
    assert_same_training(run, Run(Fit(scalar=True)))
    assert run.evaluate()[1] == BATCH


def test_the_rows_of_a_batch_do_not_move_between_devices_to_form_microbatches():
    program = Run(Fit(), MeshSpec(data=8), num_microbatches=2).compiled.as_text()
    assert " all-reduce(" in program
    for move in ("all-to-all", "collective-permute", "all-gather"):
        assert f" {move}(" not in program


def test_a_loss_that_is_no_scalar_is_refused_by_the_tasks_name():
    class PerExample(Fit):
        def loss(self, model, batch):
            return model(batch["x"])

    with pytest.raises(TypeError, match=r"PerExample\.loss returned shape \(16,\)"):
        Run(PerExample())


def test_all_gradients_are_reduced_in_one_vector_and_only_the_weight_beside_it():
    program = Run(Fit(), MeshSpec(data=8), one_all_reduce=True).compiled.as_text()
    lines = [line for line in program.splitlines() if " all-reduce(" in line]
    shapes = sorted(line.split(" = ")[1].split("{")[0].split(" ")[0] for line in lines)
    num_params = WIDTH * 16 + 16 + 16 + 1
    # No tuple among them, whose parts would go over the wire one by one.
    assert shapes == [f"f32[{num_params + 1}]", "f32[]"]


def test_a_model_with_state_of_its_own_is_not_reduced_at_once():
    with pytest.raises(ValueError, match="besides its parameters"):
        Run(Fit(dropout=0.5), MeshSpec(data=8), one_all_reduce=True)


def test_nothing_is_compiled_again_and_no_sharding_drifts_in_three_steps():
    run = Run(Fit(), MeshSpec(data=2, fsdp=4))
    run.step()
    before = [leaf.sharding for leaf in run.leaves]
    compiled = []

    def record(name, *_args, **_kwargs):
        if name.endswith("backend_compile_duration"):
            compiled.append(name)

    monitoring.register_event_duration_secs_listener(record)
    try:
        run.step(3)
        assert compiled == []
        jax.jit(lambda x: x + 12345)(1)
        assert compiled  # The listener does hear of compilations.
    finally:
        monitoring.clear_event_listeners()
    assert [leaf.sharding for leaf in run.leaves] == before == run.layout.shardings


def test_the_step_donates_its_state():
    run = Run(Fit())
    old = list(run.leaves)
    run.step()
    assert all(leaf.is_deleted() for leaf in old)


@pytest.mark.parametrize("options", [{}, {"num_microbatches": 2}, {"num_microbatches": 4}])
def test_dropout_draws_anew_in_every_microbatch_and_its_count_is_state(options):
    run = Run(Fit(dropout=0.5), MeshSpec(data=8) if not options else None, frozen(), **options)
    losses = [row["loss"] for row in run.step(3)]
    assert len(set(losses)) == 3  # The parameters stand still: only the masks differ.
    counts = {name: leaf for name, leaf in run.state().items() if name.endswith("count")}
    drawn = [leaf for name, leaf in counts.items() if "dropout" in name]
    assert drawn == [3 * options.get("num_microbatches", 1)]


def frozen():
    return optax.sgd(0.0)


def test_what_modules_sow_does_not_become_state():
    run = Run(Fit(sow=True), num_microbatches=2)
    names = set(run.layout.names)
    assert_same_training(run, Run(Fit()))
    assert set(run.state()) == names


def test_evaluation_sees_no_dropout_and_changes_nothing():
    run, plain = Run(Fit(dropout=0.5), MeshSpec(data=4)), Run(Fit())
    plain.leaves = plain_leaves_from(run, plain)
    totals = [each.evaluate() for each in (run, run, plain)]
    assert totals[0] == totals[1] == pytest.approx(totals[2], rel=1e-6)
    assert totals[0][1] == batch_of()["weight"].sum()
    assert not any(leaf.is_deleted() for leaf in run.leaves)


def plain_leaves_from(run, plain):
    state = run.layout.as_dict(run.leaves)
    return [
        jax.device_put(np.asarray(state[name]), sharding)
        for name, sharding in zip(plain.layout.names, plain.layout.shardings, strict=True)
    ]


def bytes_of(run, group):
    return make_ledger(run.layout).group_bytes()[group]


def test_moments_split_over_the_data_axis_cost_less_and_train_the_same(whole):
    spec = MeshSpec(data=4, fsdp=2)
    copied, split = Run(Fit(), spec), Run(Fit(), spec, optimizer_axes=("data",))
    assert split.step(3) == [pytest.approx(metrics, rel=1e-5) for metrics in whole[0]]
    for name, leaf in split.state().items():
        np.testing.assert_allclose(leaf, whole[1][name], rtol=1e-4, atol=1e-6, err_msg=name)
    specs = dict(zip(split.layout.names, split.layout.shardings, strict=True))
    assert specs["model.inner.kernel"].spec == P(None, "fsdp")
    assert specs["optimizer.opt_state.1.0.mu.inner.kernel"].spec == P("data", "fsdp")
    for leaf, wanted in zip(split.leaves, split.layout.abstract, strict=True):
        assert leaf.sharding.is_equivalent_to(wanted.sharding, leaf.ndim)
    assert bytes_of(split, "params") == bytes_of(copied, "params")
    # All moments but those of the last bias, [1], and two counters.
    assert bytes_of(split, "optimizer")[1] - 16 == (bytes_of(copied, "optimizer")[1] - 16) / 4
    assert "splits the optimizer's state" in make_ledger(split.layout).as_text()


class Normed(Fit):
    """With batch statistics, and a loss that one row can spoil."""

    def make_model(self, rngs):
        model = Net(rngs, dropout=0.1)
        model.norm = nnx.BatchNorm(WIDTH, rngs=rngs)
        return model

    def loss(self, model, batch):
        return jnp.mean(jnp.square(model(model.norm(batch["x"])) - batch["y"]))


@pytest.mark.parametrize("mesh_spec", [MeshSpec(data=1), MeshSpec(data=2, fsdp=2)])
def test_a_skipped_step_leaves_params_moments_and_batch_statistics_alone(mesh_spec):
    tx = skip_bad_steps(optax.adam(0.1), SkipSpec())
    run = Run(Normed(), mesh_spec, tx)
    assert run.step(1)[0]["skipped_in_a_row"] == 0
    before, good = run.state(), run.batch
    spoiled = dict(good, x=good["x"].at[BATCH - 1, 0].set(jnp.nan))
    run.batch = jax.device_put(spoiled, batch_sharding(run.layout.mesh))
    metrics = run.step(2)[-1]
    assert [metrics["skipped_nonfinite"], metrics["skipped_in_a_row"]] == [2, 2]
    moved = {name for name, leaf in run.state().items() if not np.array_equal(leaf, before[name])}
    assert moved == {
        "model.dropout.rngs.count",
        "optimizer.step",
        "optimizer.opt_state.nonfinite",
        "optimizer.opt_state.in_a_row",
    }
    run.batch = good
    assert np.isfinite(run.step(1)[0]["loss"])
    assert not np.array_equal(run.state()["model.norm.mean"], before["model.norm.mean"])


def test_evaluation_with_averaged_params_is_that_of_the_average():
    run = Run(Fit(), tx=average_params(optax.sgd(0.1), 0.5))
    first = run.state()
    run.step(1)
    after = run.state()
    total = {}
    for which in ("params", "ema"):
        step = make_eval_step(run.task, run.layout, which)
        compiled = compile_eval_step(step, run.layout, run.abstract_batch())
        total[which] = float(compiled(run.leaves, run.batch).total)
    named = run.layout.as_dict(run.leaves)
    for name in named:
        if name.startswith("model."):
            named[name] = jnp.asarray(0.5 * first[name] + 0.5 * after[name])
    run.leaves = run.layout.from_dict(named)
    assert run.evaluate()[0] == pytest.approx(total["ema"], rel=1e-5)
    assert total["params"] != pytest.approx(total["ema"], rel=1e-3)
