"""The trainer's steady step against a hand-written one, and against itself with more to do."""

from __future__ import annotations

from typing import Any

import optax

from step_benchmarks.measure import (
    BATCH,
    Trained,
    compare,
    language_model,
    one_device_mesh,
    some_tokens,
)
from step_benchmarks.pure import pure_loop
from trainer.optimizer import make_optimizer

# As a config's `optimizer`, and below by hand over the pure model's parameters.
PLAIN = {
    "chain": ("clip_by_global_norm", "adamw"),
    "clip_by_global_norm": {"max_norm": 1.0},
    "adamw": {"learning_rate": 1e-3},
}
GROUPS = {
    "chain": ("partition",),
    "partition": {
        "param_labels": ((r"norm", "norms"), (r"embedding", "embedding"), (r".*", "matrices")),
        "transforms": {
            "norms": {"chain": ("adam",), "adam": {"learning_rate": 1e-3}},
            "embedding": {"chain": ("adamw",), "adamw": {"learning_rate": 3e-4}},
            "matrices": {"chain": ("adamw",), "adamw": {"learning_rate": 1e-3}},
        },
    },
}
SCHEDULE = {"init_value": 0.0, "peak_value": 1e-3, "warmup_steps": 20, "decay_steps": 200}
ALL = {
    "chain": ("clip_by_global_norm", "partition"),
    "clip_by_global_norm": {"max_norm": 1.0},
    "partition": {
        **GROUPS["partition"],
        "transforms": {
            name: {"chain": ("adamw",), "adamw": {
                "learning_rate": {"warmup_cosine_decay_schedule": SCHEDULE},
                "weight_decay": decay,
            }}
            for name, decay in (("norms", 0.0), ("embedding", 0.01), ("matrices", 0.1))
        },
    },
}  # fmt: skip
EXTRAS = {
    "skip": {"loss_sigmas": 6.0, "grad_norm_sigmas": 6.0},
    "ema_decay": 0.999,
}


def bench_loop(case: str, rounds: int) -> None:
    """Print the speed of the trainer's step to that of one in pure JAX.

    Both start from the same parameters and must see the same losses.

    Args:
      case: a key of CASES.
      rounds: twice as many turns are taken, each of one step.
    """
    section, by_hand, num_microbatches = CASES[case]
    mesh = one_device_mesh()
    tokens = some_tokens(BATCH, mesh)
    trained = Trained(language_model(), make_optimizer(section).tx, mesh)
    pure = pure_loop(trained.model(), by_hand(), tokens, num_microbatches)
    ours = trained.loop("trainer", tokens, num_microbatches=num_microbatches)
    for number in range(4):  # The optimizers' work is seen from the second on.
        losses = [float(loop.step()["loss"]) for loop in (pure, ours)]
        if abs(losses[0] - losses[1]) > 1e-4 * losses[0]:
            raise AssertionError(f"{case}: losses {losses} of step {number} should be the same")
    flops = [loop.call.cost_analysis()["flops"] for loop in (pure, ours)]
    print(f"{case}: losses of step {number}: {losses[0]:.5f} and {losses[1]:.5f}, "
          f"XLA counts {flops[1] / flops[0]:.3f} times the FLOPs")  # fmt: skip
    compare(case, [pure, ours], 2 * rounds, "at least 0.97")


def bench_extras(rounds: int) -> None:
    """Print the speed of the trainer's step with what may be put around an optimizer."""
    mesh = one_device_mesh()
    tokens = some_tokens(BATCH, mesh)
    loops = []
    for names in ((), ("skip",), ("ema_decay",), ("skip", "ema_decay")):
        section = PLAIN | {name: EXTRAS[name] for name in names}
        trained = Trained(language_model(), make_optimizer(section).tx, mesh)
        loops.append(trained.loop(" and ".join(names) or "neither", tokens))
    compare("extras", loops, 2 * rounds, "-")


def plain_by_hand() -> optax.GradientTransformation:
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))


def groups_by_hand() -> optax.GradientTransformation:
    groups = {
        "norms": optax.adam(1e-3),
        "embedding": optax.adamw(3e-4),
        "matrices": optax.adamw(1e-3),
    }
    return optax.partition(groups, group_of_each)


def all_by_hand() -> optax.GradientTransformation:
    rate = optax.warmup_cosine_decay_schedule(**SCHEDULE)
    groups = {
        "norms": optax.adamw(rate, weight_decay=0.0),
        "embedding": optax.adamw(rate, weight_decay=0.01),
        "matrices": optax.adamw(rate, weight_decay=0.1),
    }
    return optax.chain(optax.clip_by_global_norm(1.0), optax.partition(groups, group_of_each))


def group_of_each(params: dict[str, Any]) -> dict[str, Any]:
    """The groups' names, for the pure model's parameters."""

    def of_layer(layer: dict[str, Any]) -> dict[str, str]:
        return {name: "norms" if name.startswith("norm") else "matrices" for name in layer}

    layers = [of_layer(layer) for layer in params["layers"]]
    return {"embed": "embedding", "norm": "norms", "layers": layers}


# Name: the optimizer, the same by hand, and the number of microbatches.
CASES = {
    "loop": (PLAIN, plain_by_hand, 1),
    "groups": (GROUPS, groups_by_hand, 1),
    "accumulation": (PLAIN, plain_by_hand, 4),
    "together": (ALL, all_by_hand, 4),
}
