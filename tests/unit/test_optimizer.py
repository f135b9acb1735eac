"""trainer.optimizer: Optax by Optax's own names, and one line for every mistake."""

import copy

import jax.numpy as jnp
import optax
import pytest

from launch.spec import ConfigError
from trainer.optimizer import make_optimizer

SCHEDULE = {"init_value": 0.0, "peak_value": 1e-2, "warmup_steps": 10, "decay_steps": 100}
GOOD = {
    "chain": ("clip_by_global_norm", "adamw"),
    "clip_by_global_norm": {"max_norm": 1.0},
    "adamw": {
        "learning_rate": {"warmup_cosine_decay_schedule": SCHEDULE},
        "weight_decay": 0.1,
    },
}


def test_chain_is_what_optax_would_build():
    ours = make_optimizer(GOOD).tx
    theirs = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(optax.warmup_cosine_decay_schedule(**SCHEDULE), weight_decay=0.1),
    )
    params = {"a": jnp.arange(4.0), "b": jnp.ones((2, 3))}
    grads = {"a": jnp.full(4, 7.0), "b": jnp.full((2, 3), -2.0)}
    state, expected = ours.init(params), theirs.init(params)
    for _ in range(3):
        update, state = ours.update(grads, state, params)
        want, expected = theirs.update(grads, expected, params)
        assert (update["a"] == want["a"]).all()
        assert (update["b"] == want["b"]).all()


def test_learning_rate_is_the_schedule():
    rate = make_optimizer(GOOD).learning_rate
    assert float(rate(5)) == pytest.approx(0.005)
    assert float(rate(10)) == pytest.approx(0.01)


def test_order_of_the_chain_is_the_order_given():
    config = {"chain": ("scale", "clip_by_global_norm"), "scale": {"step_size": 10.0}}
    config["clip_by_global_norm"] = {"max_norm": 1.0}
    tx = make_optimizer(config).tx
    update, _ = tx.update({"a": jnp.array([3.0])}, tx.init({"a": jnp.array([3.0])}))
    assert float(update["a"][0]) == pytest.approx(1.0)  # Clipped last; 10 if it were first.


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(chain=("adamww",)), "no 'adamww'; did you mean 'adamw'?"),
        (lambda c: c.update(chain=()), "must be a tuple of Optax names"),
        (lambda c: c.update(chain=("apply_updates",)), "apply_updates"),
        (lambda c: c.update(adam={}), "config.optimizer.adam: not in the chain"),
        (lambda c: c["adamw"].update(weigth_decay=1), "did you mean 'weight_decay'?"),
        (lambda c: c["clip_by_global_norm"].clear(), "clip_by_global_norm.max_norm: missing"),
        (lambda c: c["adamw"].update(learning_rate={"cosine": {}}), "no such schedule"),
        (
            lambda c: c["adamw"]["learning_rate"]["warmup_cosine_decay_schedule"].update(
                decay_steps=5
            ),
            "decay_steps=5: must be more than warmup_steps=10: it counts the warm-up too",
        ),
    ],
)
def test_a_mistake_is_one_line(change, message):
    config = copy.deepcopy(GOOD)
    change(config)
    with pytest.raises(ConfigError) as caught:
        make_optimizer(config)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
