"""The optimizers of a config do what PyTorch's do: the same parameters after each of 50 updates.

For those who come from PyTorch, each test is also a translation: its config on one side, the calls
of `torch.optim` on the other, and in its docstring where the two differ in convention. Both sides
start from the same parameters and compute the gradients of the same small network themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.testing.packages import required_package
from trainer.optimizer import make_optimizer

torch = required_package("torch")
torch.set_num_threads(1)  # The network is tiny.

NUM_STEPS = 50
RATE = 0.02
# Of float32 after 50 updates; at most 8e-6 apart was seen, of AdamW. Optax computes the bias
# correction 1 - b2**t in float32, PyTorch in float64.
TOLERANCE = {"rtol": 1e-4, "atol": 2e-5}

_random = np.random.default_rng(0)
X = _random.normal(size=(16, 4)).astype(np.float32)
Y = 2 * _random.normal(size=(16, 3)).astype(np.float32)
PARAMS = {
    "hidden": {
        "kernel": _random.normal(size=(4, 8)).astype(np.float32) / 2,
        "bias": _random.normal(size=(8,)).astype(np.float32) / 2,
    },
    "out": {
        "kernel": _random.normal(size=(8, 3)).astype(np.float32) / 2,
        "bias": _random.normal(size=(3,)).astype(np.float32) / 2,
    },
}
NAMES = [(layer, name) for layer in PARAMS for name in PARAMS[layer]]


def ours(config: Mapping[str, Any]) -> np.ndarray:
    """The parameters, flat, after each update by a config's optimizer: [NUM_STEPS, P] float32."""
    tx = make_optimizer(config).tx

    def loss(params):
        hidden = jnp.tanh(X @ params["hidden"]["kernel"] + params["hidden"]["bias"])
        return jnp.mean((hidden @ params["out"]["kernel"] + params["out"]["bias"] - Y) ** 2)

    def update(carry, _):
        params, state = carry
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        params = jax.tree.map(jnp.add, params, updates)
        return (params, state), params

    @jax.jit
    def run(params):
        return jax.lax.scan(update, (params, tx.init(params)), length=NUM_STEPS)[1]

    steps = run(jax.tree.map(jnp.asarray, PARAMS))
    flat = [np.asarray(steps[layer][name]).reshape(NUM_STEPS, -1) for layer, name in NAMES]
    return np.concatenate(flat, axis=1)


def theirs(
    optimizer: Callable[[Any], Any],
    scheduler: Callable[[Any], Any] | None = None,
    max_norm: float | None = None,
    groups: bool = False,
) -> np.ndarray:
    """The same by PyTorch.

    Args:
      optimizer: makes one from the list of parameters; with `groups`, from kernels and biases.
      scheduler: makes one from the optimizer.
      max_norm: for clip_grad_norm_.
      groups: whether `optimizer` takes {"kernel": [...], "bias": [...]}.
    """
    tensors = {key: torch.nn.Parameter(torch.tensor(PARAMS[key[0]][key[1]])) for key in NAMES}
    by_name = {
        name: [tensor for key, tensor in tensors.items() if key[1] == name]
        for name in ("kernel", "bias")
    }
    made = optimizer(by_name if groups else list(tensors.values()))
    schedule = scheduler(made) if scheduler else None
    steps = []
    for _ in range(NUM_STEPS):
        made.zero_grad()
        hidden = torch.tanh(
            torch.tensor(X) @ tensors["hidden", "kernel"] + tensors["hidden", "bias"]
        )
        output = hidden @ tensors["out", "kernel"] + tensors["out", "bias"]
        torch.nn.functional.mse_loss(output, torch.tensor(Y)).backward()
        if max_norm is not None:
            torch.nn.utils.clip_grad_norm_(list(tensors.values()), max_norm)
        made.step()
        if schedule is not None:
            schedule.step()
        steps.append(np.concatenate([tensors[key].detach().numpy().ravel() for key in NAMES]))
    return np.stack(steps)


def check_same(mine: np.ndarray, other: np.ndarray) -> None:
    """They agree at every step, on parameters that have moved."""
    np.testing.assert_allclose(mine, other, **TOLERANCE)
    assert np.abs(mine[-1] - mine[0]).max() > 0.01


def differ(mine: np.ndarray, other: np.ndarray) -> bool:
    """Whether they part by far more than the tolerance."""
    return bool(np.abs(mine - other).max() > 100 * TOLERANCE["atol"])


OPTIM = torch.optim
OPTIMIZERS = {
    # The velocity is m = momentum * m + g on both sides, without (1 - momentum) before g.
    "sgd, momentum": (
        {"chain": ("sgd",), "sgd": {"learning_rate": RATE, "momentum": 0.9}},
        lambda params: OPTIM.SGD(params, lr=RATE, momentum=0.9),
    ),
    "sgd, nesterov": (
        {"chain": ("sgd",), "sgd": {"learning_rate": RATE, "momentum": 0.9, "nesterov": True}},
        lambda params: OPTIM.SGD(params, lr=RATE, momentum=0.9, nesterov=True),
    ),
    # PyTorch adds the decay of SGD and Adam to the gradient (L2): a transformation before them.
    "sgd, L2": (
        {
            "chain": ("add_decayed_weights", "sgd"),
            "add_decayed_weights": {"weight_decay": 0.1},
            "sgd": {"learning_rate": RATE, "momentum": 0.9},
        },
        lambda params: OPTIM.SGD(params, lr=RATE, momentum=0.9, weight_decay=0.1),
    ),
    "adam": (
        {"chain": ("adam",), "adam": {"learning_rate": RATE, "b1": 0.8, "b2": 0.95, "eps": 1e-6}},
        lambda params: OPTIM.Adam(params, lr=RATE, betas=(0.8, 0.95), eps=1e-6),
    ),
    "adam, L2": (
        {
            "chain": ("add_decayed_weights", "adam"),
            "add_decayed_weights": {"weight_decay": 0.1},
            "adam": {"learning_rate": RATE},
        },
        lambda params: OPTIM.Adam(params, lr=RATE, weight_decay=0.1),
    ),
    # The decay of AdamW is scaled by the learning rate on both sides. Its default is 1e-4 in Optax
    # and 1e-2 in PyTorch.
    "adamw": (
        {"chain": ("adamw",), "adamw": {"learning_rate": RATE, "weight_decay": 0.1}},
        lambda params: OPTIM.AdamW(params, lr=RATE, weight_decay=0.1),
    ),
    # Optax takes the root of v + eps unless told to add eps to the root, as PyTorch does.
    # The default decay of v is 0.9 in Optax, alpha=0.99 in PyTorch.
    "rmsprop": (
        {
            "chain": ("rmsprop",),
            "rmsprop": {"learning_rate": RATE / 4, "decay": 0.9, "eps": 1e-3, "eps_in_sqrt": False},
        },
        lambda params: OPTIM.RMSprop(params, lr=RATE / 4, alpha=0.9, eps=1e-3),
    ),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_takes_torchs_path(name):
    """Where the conventions differ, the table says so.

    Alike on both sides: momentum without damping and Nesterov's look-ahead g + momentum * m; Adam's
    bias correction, with eps added to the root of the corrected second moment.
    """
    config, optimizer = OPTIMIZERS[name]
    check_same(ours(config), theirs(optimizer))


def test_without_translation_weight_decay_is_not_torchs():
    """Adam's `weight_decay` in PyTorch is L2, not AdamW's; leaving both defaults is no match."""
    adamw = ours({"chain": ("adamw",), "adamw": {"learning_rate": RATE, "weight_decay": 0.1}})
    assert differ(adamw, theirs(lambda params: OPTIM.Adam(params, lr=RATE, weight_decay=0.1)))
    default = ours({"chain": ("adamw",), "adamw": {"learning_rate": RATE}})
    assert differ(default, theirs(lambda params: OPTIM.AdamW(params, lr=RATE)))


def test_clipping_by_global_norm_is_clip_grad_norm():
    """PyTorch divides by norm + 1e-6, Optax by the norm: a millionth apart where the norm is one.

    The order matters in Optax: first in the chain, before the optimizer sees the gradients.
    """
    optimizer = {"sgd": {"learning_rate": RATE, "momentum": 0.9}}
    clip = {"clip_by_global_norm": {"max_norm": 0.5}}
    mine = ours({"chain": ("clip_by_global_norm", "sgd"), **optimizer, **clip})
    check_same(mine, theirs(lambda p: OPTIM.SGD(p, lr=RATE, momentum=0.9), max_norm=0.5))
    assert differ(mine, ours({"chain": ("sgd",), **optimizer}))


SCHEDULERS = OPTIM.lr_scheduler
SCHEDULES = {
    # At T_max PyTorch's turns round and rises again; Optax's stays. `alpha` is eta_min / lr.
    "CosineAnnealingLR": (
        {"cosine_decay_schedule": {"init_value": RATE, "decay_steps": 50, "alpha": 0.1}},
        lambda made: SCHEDULERS.CosineAnnealingLR(made, T_max=50, eta_min=RATE / 10),
    ),
    # LinearLR cannot start from 0 (start_factor > 0), Optax's can.
    "LinearLR, CosineAnnealingLR": (
        {
            "join_schedules": {
                "schedules": ("linear_schedule", "cosine_decay_schedule"),
                "linear_schedule": {
                    "init_value": RATE / 10,
                    "end_value": RATE,
                    "transition_steps": 10,
                },
                "cosine_decay_schedule": {"init_value": RATE, "decay_steps": 40},
                "boundaries": (10,),
            }
        },
        lambda made: SCHEDULERS.SequentialLR(
            made,
            [
                SCHEDULERS.LinearLR(made, start_factor=0.1, total_iters=10),
                SCHEDULERS.CosineAnnealingLR(made, T_max=40),
            ],
            milestones=[10],
        ),
    ),
    # The same by one name, whose `decay_steps` counts the warm-up too: 50, not 40.
    "LinearLR, CosineAnnealingLR by one name": (
        {
            "warmup_cosine_decay_schedule": {
                "init_value": RATE / 10,
                "peak_value": RATE,
                "warmup_steps": 10,
                "decay_steps": 50,
            }
        },
        lambda made: SCHEDULERS.SequentialLR(
            made,
            [
                SCHEDULERS.LinearLR(made, start_factor=0.1, total_iters=10),
                SCHEDULERS.CosineAnnealingLR(made, T_max=40),
            ],
            milestones=[10],
        ),
    ),
    # PyTorch peaks at step pct_start * total_steps - 1 and ends at total_steps - 1; Optax peaks at
    # pct_start * transition_steps and ends at transition_steps. So 50 steps with the peak at 15
    # are total_steps=51, pct_start=16/51 there. No cycling of momentum: Optax has none.
    "OneCycleLR": (
        {
            "cosine_onecycle_schedule": {
                "transition_steps": 50,
                "peak_value": RATE,
                "pct_start": 0.3,
                "div_factor": 10.0,
                "final_div_factor": 100.0,
            }
        },
        lambda made: SCHEDULERS.OneCycleLR(
            made,
            max_lr=RATE,
            total_steps=51,
            pct_start=16 / 51,
            div_factor=10.0,
            final_div_factor=100.0,
            cycle_momentum=False,
        ),
    ),
    "StepLR": (
        {
            "piecewise_constant_schedule": {
                "init_value": RATE,
                "boundaries_and_scales": {15: 0.5, 30: 0.5, 45: 0.5},
            }
        },
        lambda made: SCHEDULERS.StepLR(made, step_size=15, gamma=0.5),
    ),
    # By import path: a name that does not end in _schedule is no schedule of Optax's to a config.
    "StepLR by one number": (
        {
            "exponential_decay": {
                "init_value": RATE,
                "transition_steps": 15,
                "decay_rate": 0.5,
                "staircase": True,
            }
        },
        lambda made: SCHEDULERS.StepLR(made, step_size=15, gamma=0.5),
    ),
    "ExponentialLR": (
        {
            "exponential_decay": {
                "init_value": RATE,
                "transition_steps": 1,
                "decay_rate": 0.95,
            }
        },
        lambda made: SCHEDULERS.ExponentialLR(made, gamma=0.95),
    ),
}


def torch_rates(scheduler: Callable[[Any], Any], num_steps: int = NUM_STEPS) -> list[float]:
    """The learning rate of each update."""
    made = OPTIM.SGD([torch.nn.Parameter(torch.zeros(1))], lr=RATE)
    schedule = scheduler(made)
    rates = []
    for _ in range(num_steps):
        rates.append(made.param_groups[0]["lr"])
        made.step()
        schedule.step()
    return rates


def our_rates(schedule: Mapping[str, Any], num_steps: int = NUM_STEPS) -> list[float]:
    rate = make_optimizer({"chain": ("sgd",), "sgd": {"learning_rate": schedule}}).learning_rate
    return np.asarray(jax.jit(jax.vmap(rate))(jnp.arange(num_steps))).tolist()


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_takes_torchs_path(name):
    """Where the conventions differ, the table says so.

    Alike on both sides: the first update has the schedule's value at 0. In PyTorch that takes a
    `scheduler.step()` after each `optimizer.step()`; Optax counts by itself.
    """
    schedule, scheduler = SCHEDULES[name]
    np.testing.assert_allclose(our_rates(schedule), torch_rates(scheduler), rtol=2e-5, atol=1e-8)
    config = {"chain": ("sgd",), "sgd": {"learning_rate": schedule}}
    check_same(ours(config), theirs(lambda params: OPTIM.SGD(params, lr=RATE), scheduler))


def test_after_its_end_a_cosine_rises_again_in_torch_only():
    cosine = {"cosine_decay_schedule": {"init_value": RATE, "decay_steps": 20}}
    rates = torch_rates(lambda made: SCHEDULERS.CosineAnnealingLR(made, T_max=20), 41)
    assert rates[40] == pytest.approx(RATE)
    assert our_rates(cosine, 41)[20:] == [0.0] * 21


def test_one_cycle_of_the_same_numbers_is_a_step_ahead_in_torch():
    """`total_steps=50` there and `transition_steps=50` here differ: see the table.

    PyTorch's reaches its last value at step 49 and refuses to go past step 50; Optax's reaches it
    at step 50 and stays.
    """
    arguments = {"pct_start": 0.3, "div_factor": 25.0, "final_div_factor": 1e4}
    cycle = {"transition_steps": 50, "peak_value": RATE, **arguments}
    mine = our_rates({"cosine_onecycle_schedule": cycle}, 60)
    other = torch_rates(
        lambda made: SCHEDULERS.OneCycleLR(
            made, max_lr=RATE, total_steps=50, cycle_momentum=False, **arguments
        ),
        49,
    )
    assert (int(np.argmax(mine)), int(np.argmax(other))) == (15, 14)
    assert mine[0] == pytest.approx(other[0]) == pytest.approx(RATE / 25)
    assert mine[50:] == pytest.approx([RATE / 25 / 1e4] * 10, rel=1e-3)
    with pytest.raises(ValueError, match="Tried to step 51 times"):
        torch_rates(
            lambda made: SCHEDULERS.OneCycleLR(made, max_lr=RATE, total_steps=50), num_steps=51
        )


def test_parameter_groups_are_a_partition():
    """PyTorch lists the tensors of each group; a config names them by regular expressions.

    Each group has a schedule of its own here; PyTorch's scheduler works on the rates of all groups.
    The decay of AdamW follows the scheduled rate on both sides. Clipping comes before the
    partition, so that the norm is that of all gradients together, as in clip_grad_norm_ over
    model.parameters().
    """

    def group(rate: float, weight_decay: float) -> dict[str, Any]:
        cosine = {"cosine_decay_schedule": {"init_value": rate, "decay_steps": NUM_STEPS}}
        return {
            "chain": ("adamw",),
            "adamw": {"learning_rate": cosine, "weight_decay": weight_decay},
        }

    config = {
        "chain": ("clip_by_global_norm", "partition"),
        "clip_by_global_norm": {"max_norm": 0.5},
        "partition": {
            "param_labels": ((r"bias$", "biases"), (r".*", "kernels")),
            "transforms": {"biases": group(RATE / 5, 0.0), "kernels": group(RATE, 0.5)},
        },
    }

    def optimizer(params):
        return OPTIM.AdamW(
            [
                {"params": params["bias"], "lr": RATE / 5, "weight_decay": 0.0},
                {"params": params["kernel"], "lr": RATE, "weight_decay": 0.5},
            ]
        )

    check_same(
        ours(config),
        theirs(
            optimizer,
            lambda made: SCHEDULERS.CosineAnnealingLR(made, T_max=NUM_STEPS),
            max_norm=0.5,
            groups=True,
        ),
    )


def test_no_decay_is_a_group_without_weight_decay():
    """What takes two groups in PyTorch takes one line here."""
    config = {
        "chain": ("adamw",),
        "adamw": {"learning_rate": RATE, "weight_decay": 0.5},
        "no_decay": (r"bias$",),
    }

    def optimizer(params):
        return OPTIM.AdamW(
            [
                {"params": params["bias"], "weight_decay": 0.0},
                {"params": params["kernel"], "weight_decay": 0.5},
            ],
            lr=RATE,
        )

    check_same(ours(config), theirs(optimizer, groups=True))
