"""Regression: what the loss counts, what the rows are, and what is said of the result."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from launch.spec import ConfigError
from trainer.tasks.regression import NOT_MEASURED, DataConfig, Regression, friedman, make_rows


def small(**data):
    return Regression({"hidden": (8, 4)}, {"num_rows": 64, "num_eval_rows": 32, **data})


def test_the_loss_is_the_squared_error_of_the_rows_that_have_weight():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(6, 10)), rng.normal(size=6)
    weight = np.array([1, 0, 1, 1, 0, 1])
    batch = {k: jnp.asarray(v, jnp.float32) for k, v in (("x", x), ("y", y), ("weight", weight))}
    total, count = small().loss(lambda x_BI: x_BI[:, 2:3], batch)
    assert float(total) == pytest.approx(np.sum(weight * (x[:, 2] - y) ** 2), rel=1e-5)
    assert float(count) == 4


def test_a_masked_target_may_be_anything_at_all():
    rows = make_rows(DataConfig(num_rows=8, mask_fraction=0.5), 8, split=0)
    assert 0 < rows.weight.sum() < 8
    rows.y[rows.weight == 0] = np.nan

    def total(kernel):
        return small().loss(lambda x_BI: x_BI @ kernel, vars(rows)).total

    loss, grad = jax.jit(jax.value_and_grad(total))(jnp.ones((10, 1)))
    assert np.isfinite(loss)
    assert np.isfinite(grad).all()
    assert np.abs(grad).max() > 0


def test_a_row_is_the_same_whatever_the_number_of_rows_and_the_mask():
    few = make_rows(DataConfig(), 10, split=0)
    many = make_rows(DataConfig(mask_fraction=0.4), 1000, split=0)
    np.testing.assert_array_equal(few.x, many.x[:10])
    kept = many.weight == 1
    np.testing.assert_array_equal(few.y[kept[:10]], many.y[:10][kept[:10]])
    assert set(many.y[~kept]) == {np.float32(NOT_MEASURED)}
    assert 1 - kept.mean() == pytest.approx(0.4, abs=0.05)
    assert make_rows(DataConfig(seed=1), 10, split=0).x[0, 0] != few.x[0, 0]


def test_training_rows_come_in_a_seeds_order_and_none_is_held_out():
    first, again, other = (small().train_data(seed) for seed in (1, 1, 2))
    order = [float(first[i]["x"][0]) for i in range(128)]
    assert order == [float(again[i]["x"][0]) for i in range(128)]
    assert order[:64] != [float(other[i]["x"][0]) for i in range(64)]
    assert sorted(order[:64]) == sorted(order[64:])
    held_out = small().eval_data()
    assert len(held_out) == 32
    assert not {float(held_out[i]["x"][0]) for i in range(32)} & set(order)


def test_the_noise_has_the_variance_that_the_verdict_calls_the_floor():
    data = DataConfig(noise=2.0)
    rows = make_rows(data, 20_000, split=0)
    noise = rows.y - friedman(rows.x)
    assert np.var(noise) == pytest.approx(4.0, rel=0.05)
    assert abs(noise.mean()) < 0.05
    task = Regression({}, {"noise": 2.0})
    assert "held-out mean squared error 4.500 (noise 4.000, variance of" in task.verdict(4.5)
    assert "4.00 is the noise" in task.describe()


def test_r_squared_is_one_of_a_perfect_model_and_zero_of_the_mean():
    task = small(noise=0.0, mask_fraction=0.3)
    measured = task.eval_data()
    mean = np.mean([row["y"] for row in map(measured.__getitem__, range(32)) if row["weight"]])

    def r_squared(model):
        return float(task.finish(model, jax.random.key(0))["r_squared"])

    assert r_squared(lambda x: jnp.asarray(friedman(np.asarray(x)))[:, None]) == pytest.approx(1)
    assert r_squared(lambda x: jnp.full((len(x), 1), mean)) == pytest.approx(0, abs=1e-5)
    assert task.show({"r_squared": 0.5}) == "R^2 on held-out rows 0.5000 (the noise allows 1.0000)"


def test_flops_are_six_for_every_weight_of_a_kernel():
    task = small()
    with nnx.use_eager_sharding(False):
        model = nnx.eval_shape(lambda: task.make_model(nnx.Rngs(0)))
    assert task.flops_per_example(model) == 6 * (10 * 8 + 8 * 4 + 4 * 1)


@pytest.mark.parametrize(
    ("model", "data", "message"),
    [
        ({"hidden": (8, 0)}, {}, "config.model.hidden=(8, 0): every width must be at least 1"),
        ({"hiden": ()}, {}, "config.model.hiden: no such field; did you mean 'hidden'?"),
        ({}, {"num_inputs": 4}, "config.data.num_inputs=4: must be at least 5"),
        ({}, {"noise": -1.0}, "config.data.noise=-1.0: must be at least 0"),
        ({}, {"mask_fraction": 1.0}, "config.data.mask_fraction=1.0: must be in [0, 1)"),
    ],
)
def test_a_section_that_cannot_be_is_refused_by_name(model, data, message):
    with pytest.raises(ConfigError) as caught:
        Regression(model, data)
    assert str(caught.value).startswith(message)
