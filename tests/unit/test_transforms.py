"""trainer.transforms: what Muster puts around a chain, and the params to evaluate with."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax import contrib

from launch.spec import ConfigError
from trainer.optax_adapters import with_slow_params
from trainer.transforms import (
    SkipSpec,
    average_params,
    eval_params,
    master_weights,
    skip_bad_steps,
)

PARAMS = {"a": jnp.arange(4.0), "b": jnp.ones((2, 3))}
GRADS = {"a": jnp.full(4, 0.5), "b": jnp.full((2, 3), -1.0)}
NAN = jax.tree.map(lambda g: g.at[(0,) * g.ndim].set(jnp.nan), GRADS)


class Descent:
    """Params under a transformation, one update after the other."""

    def __init__(self, tx, params=PARAMS):
        self.params, self.state = params, tx.init(params)
        self._update = jax.jit(tx.update)

    def step(self, grads=GRADS, **extra):
        updates, self.state = self._update(grads, self.state, self.params, **extra)
        self.params = optax.apply_updates(self.params, updates)


def same(one, other):
    leaves = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return all(np.array_equal(a, b) for a, b in leaves)


@pytest.mark.parametrize(("grads", "loss"), [(NAN, 1.0), (GRADS, jnp.inf), (NAN, jnp.nan)])
def test_a_step_that_is_not_finite_changes_neither_params_nor_the_inner_state(grads, loss):
    descent = Descent(skip_bad_steps(optax.adam(0.1), SkipSpec()))
    plain = Descent(optax.adam(0.1))
    descent.step(value=1.0)
    plain.step()
    for _ in range(2):
        descent.step(grads, value=loss)
    assert same(descent.params, plain.params)
    assert same(descent.state.inner, plain.state)
    counts = [int(descent.state.taken), int(descent.state.nonfinite), int(descent.state.in_a_row)]
    assert counts == [1, 2, 2]
    descent.step(value=1.0)
    plain.step()
    assert same(descent.params, plain.params)
    assert int(descent.state.in_a_row) == 0
    assert int(descent.state.nonfinite) == 2
    assert np.isfinite(descent.state.loss.mean)


def test_with_nonfinite_off_a_nan_goes_through_and_the_statistics_stay_numbers():
    spec = SkipSpec(nonfinite=False, grad_norm_sigmas=6.0, window_steps=1)
    descent = Descent(skip_bad_steps(optax.sgd(0.1), spec))
    descent.step(value=1.0)
    descent.step(NAN, value=1.0)
    assert np.isnan(descent.params["a"][0])
    assert np.isfinite(descent.state.grad_norm.mean)
    assert int(descent.state.nonfinite) == 0


def test_a_spike_is_measured_against_the_steps_that_were_taken():
    spec = SkipSpec(loss_sigmas=4.0, window_steps=8)
    descent = Descent(skip_bad_steps(optax.sgd(0.0), spec))
    losses = [2.0, 2.2, 1.8, 2.1, 1.9, 2.0, 2.2, 1.8]
    descent.step(value=100.0)  # Too early for a rule: it only moves the statistics.
    for _ in range(12):
        for loss in losses:
            descent.step(value=loss)
    assert int(descent.state.spikes) == 0
    assert float(descent.state.loss.mean) == pytest.approx(2.0, abs=0.1)
    deviation = float(jnp.sqrt(descent.state.loss.variance))
    assert deviation == pytest.approx(np.std(losses), rel=0.5)
    before = descent.state.loss
    edge = float(before.mean) + 4 * deviation
    for _ in range(3):  # What is left out does not become normal.
        descent.step(value=edge + 0.01)
    assert [int(descent.state.spikes), int(descent.state.in_a_row)] == [3, 3]
    assert same(descent.state.loss, before)
    descent.step(value=edge - 0.01)
    assert int(descent.state.in_a_row) == 0


def test_a_spike_of_the_gradient_norm_is_left_out_too():
    spec = SkipSpec(grad_norm_sigmas=6.0, window_steps=4)
    descent = Descent(skip_bad_steps(optax.sgd(0.1), spec))
    for _ in range(6):
        descent.step(value=1.0)
    before = descent.params
    descent.step(optax.tree.scale(10.0, GRADS), value=1.0)
    assert same(descent.params, before)
    assert int(descent.state.spikes) == 1
    descent.step(optax.tree.scale(1.05, GRADS), value=1.0)  # A hundredth of the mean per sigma.
    assert int(descent.state.spikes) == 1
    descent.step(optax.tree.scale(jnp.inf, GRADS), value=1.0)  # Counted once, as not finite.
    assert [int(descent.state.spikes), int(descent.state.nonfinite)] == [1, 1]


def test_the_average_of_the_params_is_an_exponential_one_of_those_after_each_update():
    descent = Descent(average_params(optax.sgd(0.1), 0.8))
    expected = np.array(PARAMS["a"])
    for _ in range(3):
        descent.step()
        expected = 0.8 * expected + 0.2 * np.array(descent.params["a"])
    np.testing.assert_allclose(descent.state.average["a"], expected, rtol=1e-6)
    found = eval_params("ema", descent.params, {"deep": (descent.state,)})
    np.testing.assert_allclose(found["a"], expected, rtol=1e-6)


def test_small_updates_add_up_in_master_weights_and_are_lost_without():
    params = {"w": jnp.ones(3, jnp.bfloat16)}
    grads = {"w": jnp.ones(3, jnp.bfloat16)}
    plain = Descent(optax.sgd(1e-4), params)
    mastered = Descent(master_weights(optax.sgd(1e-4), jnp.float32), params)
    for _ in range(100):
        plain.step(grads)
        mastered.step(grads)
    assert float(plain.params["w"][0]) == 1.0
    assert mastered.params["w"].dtype == jnp.bfloat16
    np.testing.assert_allclose(mastered.state.master["w"], 0.99, rtol=1e-5)
    assert same(mastered.params["w"], mastered.state.master["w"].astype(jnp.bfloat16))


def test_the_inner_transformation_sees_the_master_weights():
    inner = optax.chain(optax.add_decayed_weights(1.0), optax.sgd(1.9e-3))
    descent = Descent(master_weights(inner, jnp.float32), {"w": jnp.ones(3, jnp.bfloat16)})
    for _ in range(2):
        descent.step({"w": jnp.zeros(3, jnp.bfloat16)})
        # The first step is rounded away in the params: decay of these would be the larger.
    np.testing.assert_allclose(descent.state.master["w"], (1 - 1.9e-3) ** 2, rtol=1e-6)


def test_lookahead_keeps_the_slow_params_that_optax_would_have_its_caller_keep():
    lookahead = optax.lookahead(optax.sgd(0.1), sync_period=2, slow_step_size=0.5)
    descent = Descent(with_slow_params(lookahead))
    pair = Descent(lookahead, optax.LookaheadParams.init_synced(PARAMS))
    for _ in range(5):
        descent.step()
        pair.step()
    assert same(descent.params, pair.params.fast)
    assert same(eval_params("lookahead", descent.params, descent.state), pair.params.slow)
    assert not same(pair.params.fast, pair.params.slow)


def test_schedule_free_is_evaluated_with_its_own_params():
    descent = Descent(contrib.schedule_free_sgd(0.1))
    for _ in range(3):
        descent.step()
    found = eval_params("schedule_free", descent.params, (descent.state,))
    assert same(found, contrib.schedule_free_eval_params(descent.state, descent.params))
    assert not same(found, descent.params)


def test_params_that_nothing_keeps_are_one_line():
    with pytest.raises(ConfigError) as caught:
        eval_params("ema", PARAMS, optax.sgd(0.1).init(PARAMS))
    expected = "config.eval.params='ema': nothing keeps them; config.optimizer.ema_decay"
    assert expected in str(caught.value)
    assert eval_params("params", PARAMS, ()) is PARAMS
