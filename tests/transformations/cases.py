"""A config's optimizer section for every gradient transformation that Optax has."""

from __future__ import annotations

import inspect
from typing import Any

import jax.numpy as jnp
import optax
from optax import contrib

RATE = {"learning_rate": 0.01}
ADAM = {"chain": ("adam",), "adam": RATE}
SGD = {"chain": ("sgd",), "sgd": {"learning_rate": 0.01, "momentum": 0.9}}


def alone(name: str, **arguments: Any) -> dict[str, Any]:
    """A chain of one."""
    return {"chain": (name,), name: arguments}


def scaled(name: str, **arguments: Any) -> dict[str, Any]:
    """A chain of one that does not know the learning rate, then the scale."""
    return {"chain": (name, "scale"), name: arguments, "scale": {"step_size": -0.01}}


HERE = "tests.transformations.cases"


def every_second(step: Any) -> Any:
    """For `conditionally_*`, which ask with the count of steps."""
    return step % 2 == 0


def add_one_percent(updates: Any, params: Any = None) -> Any:
    """For `stateless`."""
    del params
    return optax.tree.scale(1.01, updates)


def add_one_percent_leaf(update: Any, param: Any = None) -> Any:
    """For `stateless_with_tree_map`."""
    del param
    return update * 1.01


def measures() -> Any:
    """For `monitor`; called by nobody: `measures` wants a dict, which a config cannot give."""
    raise AssertionError


def norm_of(updates: Any, *args: Any, **kwargs: Any) -> Any:
    """For `measure_with_ema` and `snapshot`."""
    del args, kwargs
    return jnp.asarray(optax.tree.norm(updates))


WITH_RATE = """adabelief adadelta adafactor adagrad adam adamax adamaxw adamw adan amsgrad fromage lamb
lars lion noisy_sgd novograd optimistic_adam_v2 optimistic_gradient_descent radam rmsprop rprop
sgd sign_sgd signum sm3 yogi acprop ademamix adopt cocob dadapt_adamw dog dowg galore madgrad momo
momo_adam muon prodigy schedule_free_adamw schedule_free_sgd simplified_ademamix sophia"""

STATELESS = """centralize identity keep_params_nonnegative scale_by_sign zero_nans normalize
scale_by_param_block_norm scale_by_param_block_rms scale_by_trust_ratio normalize_by_update_norm"""

SCALE_BY = """scale_by_acprop scale_by_adadelta scale_by_adam scale_by_adamax scale_by_adan
scale_by_ademamix scale_by_adopt scale_by_amsgrad scale_by_belief scale_by_cocob
scale_by_distance_over_gradients scale_by_factored_rms scale_by_galore scale_by_lbfgs scale_by_lion
scale_by_muon scale_by_novograd scale_by_optimistic_gradient scale_by_polyak scale_by_radam
scale_by_rms scale_by_rss scale_by_simplified_ademamix scale_by_sm3 scale_by_stddev scale_by_yogi
hutchinson_estimator_diag_hessian"""

CASES: dict[str, dict[str, Any]] = {
    **{name: alone(name, **RATE) for name in WITH_RATE.split()},
    **{name: scaled(name) for name in (STATELESS + " " + SCALE_BY).split()},
    # Factored moments need dims of at least this length to be factored at all.
    "adafactor": alone("adafactor", learning_rate=0.01, min_dim_size_to_factor=4),
    "scale_by_factored_rms": scaled("scale_by_factored_rms", min_dim_size_to_factor=4),
    "galore": alone("galore", learning_rate=0.01, rank=4),
    "scale_by_galore": scaled("scale_by_galore", rank=4),
    "lbfgs": alone("lbfgs", memory_size=3),
    "scale_by_lbfgs": scaled("scale_by_lbfgs", memory_size=3),
    "noisy_sgd": alone("noisy_sgd", learning_rate=0.01, key=0),
    "add_noise": scaled("add_noise", eta=0.01, gamma=0.55, key=0),
    "optimistic_adam": alone("optimistic_adam", learning_rate=0.01, optimism=0.01),
    "polyak_sgd": alone("polyak_sgd", max_learning_rate=0.01),
    "scale_by_rprop": scaled("scale_by_rprop", learning_rate=0.01),
    "scale_by_madgrad": alone("scale_by_madgrad", learning_rate=0.01),
    "adaptive_grad_clip": scaled("adaptive_grad_clip", clipping=0.1),
    "add_decayed_weights": scaled("add_decayed_weights", weight_decay=0.1),
    "apply_every": scaled("apply_every", k=2),
    "clip": scaled("clip", max_delta=0.1),
    "clip_by_block_rms": scaled("clip_by_block_rms", threshold=0.1),
    "clip_by_global_norm": scaled("clip_by_global_norm", max_norm=0.1),
    "ema": scaled("ema", decay=0.9),
    "trace": scaled("trace", decay=0.9),
    "scale": alone("scale", step_size=-0.01),
    "scale_by_learning_rate": alone("scale_by_learning_rate", learning_rate=0.01),
    "scale_by_schedule": alone(
        "scale_by_schedule", step_size_fn={"constant_schedule": {"value": -0.01}}
    ),
    "set_to_zero": alone("set_to_zero"),
    "freeze": {"chain": ("adam", "freeze"), "adam": RATE, "freeze": {"mask": ("bias",)}},
    "masked": alone("masked", inner=ADAM, mask=("kernel", "square")),
    "selective_transform": alone("selective_transform", optimizer=ADAM, freeze_mask=("bias",)),
    "flatten": alone("flatten", inner=ADAM),
    "apply_if_finite": alone("apply_if_finite", inner=ADAM, max_consecutive_errors=3),
    "lookahead": alone("lookahead", fast_optimizer=ADAM, sync_period=2, slow_step_size=0.5),
    "mechanize": alone("mechanize", base_optimizer=ADAM),
    "sam": alone("sam", optimizer=SGD, adv_optimizer=alone("sgd", learning_rate=0.05)),
    "schedule_free": alone("schedule_free", base_optimizer=SGD, learning_rate=0.01),
    "split_real_and_imaginary": alone("split_real_and_imaginary", inner=ADAM),
    "with_extra_args_support": alone("with_extra_args_support", tx=ADAM),
    "MultiSteps": alone("MultiSteps", opt=ADAM, every_k_schedule=2),
    "inject_hyperparams": alone("inject_hyperparams", inner_factory={"adamw": RATE}),
    "inject_stateful_hyperparams": alone(
        "inject_stateful_hyperparams", inner_factory={"adamw": RATE}
    ),
    "conditionally_mask": alone(
        "conditionally_mask", inner=ADAM, should_transform_fn=f"{HERE}:every_second"
    ),
    "conditionally_transform": alone(
        "conditionally_transform", inner=ADAM, should_transform_fn=f"{HERE}:every_second"
    ),
    "stateless": {
        "chain": ("stateless", "adam"),
        "stateless": {"f": f"{HERE}:add_one_percent"},
        "adam": RATE,
    },
    "stateless_with_tree_map": {
        "chain": ("stateless_with_tree_map", "adam"),
        "stateless_with_tree_map": {"f": f"{HERE}:add_one_percent_leaf"},
        "adam": RATE,
    },
    "measure_with_ema": scaled("measure_with_ema", measure=f"{HERE}:norm_of", decay=0.9),
    "snapshot": scaled("snapshot", measure_name="norm", measure=f"{HERE}:norm_of"),
    "reduce_on_plateau": {"chain": ("adam", "reduce_on_plateau"), "adam": RATE},
    "scale_by_backtracking_linesearch": {
        "chain": ("sgd", "scale_by_backtracking_linesearch"),
        "sgd": {"learning_rate": 1.0},
        "scale_by_backtracking_linesearch": {"max_backtracking_steps": 5},
    },
    "scale_by_zoom_linesearch": {
        "chain": ("sgd", "scale_by_zoom_linesearch"),
        "sgd": {"learning_rate": 1.0},
        "scale_by_zoom_linesearch": {"max_linesearch_steps": 5},
    },
    **{
        name: alone(
            name,
            param_labels=(("bias", "biases"), ("deep", "frozen"), (".*", "kernels")),
            transforms={
                "biases": SGD,
                "frozen": alone("set_to_zero"),
                "kernels": alone("muon", **RATE),
            },
        )
        for name in ("partition", "multi_transform")
    },
    # What people put together.
    "MultiSteps(partition(muon, adam))": alone(
        "MultiSteps",
        opt=alone(
            "partition",
            param_labels=(("kernel|square", "matrices"), (".*", "rest")),
            transforms={"matrices": alone("muon", **RATE), "rest": ADAM},
        ),
        every_k_schedule=2,
    ),
    "everything around": {
        **alone("adamw", learning_rate=0.01, mu_dtype="bfloat16", weight_decay=0.1),
        "no_decay": ("bias",),
        "ema_decay": 0.9,
        "master_dtype": "float32",
        "skip": {"loss_sigmas": 6.0},
    },
}


def names_in_optax() -> set[str]:
    """All functions of Optax that say they return a gradient transformation."""
    found = set()
    for module in (optax, contrib):
        for name, value in vars(module).items():
            if inspect.isfunction(value) and not name.startswith("_"):
                returned = str(inspect.signature(value).return_annotation)
                if "GradientTransformation" in returned:
                    found.add(name)
    return found
