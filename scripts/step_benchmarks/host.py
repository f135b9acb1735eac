"""What calling the step costs the host, with many leaves."""

from __future__ import annotations

import statistics
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from step_benchmarks.measure import (
    BATCH,
    Loop,
    Trained,
    in_turns,
    one_device_mesh,
    report,
    some_tokens,
)
from trainer.optimizer import make_optimizer
from trainer.task import Task

PLAIN = {"chain": ("adamw",), "adamw": {"learning_rate": 1e-3}}
GROUPS = {
    "chain": ("partition",),
    "partition": {
        "param_labels": ((r"[01]$", "few"), (r"[2-4]$", "some"), (r".*", "rest")),
        "transforms": {
            "few": {"chain": ("sgd",), "sgd": {"learning_rate": 1e-2}},
            "some": {"chain": ("adam",), "adam": {"learning_rate": 1e-3}},
            "rest": {"chain": ("adamw",), "adamw": {"learning_rate": 1e-3}},
        },
    },
}  # fmt: skip


class ManyParams(nnx.Module):
    """`num` vectors of eight numbers."""

    def __init__(self, num: int):
        self.vectors = nnx.List([nnx.Param(jnp.ones(8)) for _ in range(num)])


class ManyTask(Task):
    """Draw many vectors to the batch's mean: hardly any work for the device."""

    def __init__(self, num: int):
        super().__init__({}, {})
        self.num = num

    def make_model(self, rngs: nnx.Rngs) -> ManyParams:
        return ManyParams(self.num)

    def loss(self, model: Any, batch: Any) -> jax.Array:
        return far_off([vector[...] for vector in model.vectors], batch["tokens"])

    def train_data(self, seed: int) -> Any:
        raise NotImplementedError


def far_off(vectors: list[jax.Array], tokens: jax.Array) -> jax.Array:
    """Mean square distance of all vectors from the tokens' mean."""
    mean = tokens.astype(jnp.float32).mean()
    return sum(jnp.mean((vector - mean) ** 2) for vector in vectors) / len(vectors)


def bench_host(rounds: int) -> None:
    """Print a step's time against a bare call that does the same, without groups and with three."""
    mesh = one_device_mesh()
    tokens = some_tokens(BATCH, mesh)
    for num, section, bare_tx in (
        (100, PLAIN, optax.adamw(1e-3)),
        (400, PLAIN, optax.adamw(1e-3)),
        (100, GROUPS, bare_groups(100)),
        (400, GROUPS, bare_groups(400)),
    ):
        what = f"{num} parameters" + (" in 3 groups" if section is GROUPS else "")
        ours = Trained(ManyTask(num), make_optimizer(section).tx, mesh).loop("trainer", tokens)
        bare = bare_loop(num, bare_tx, tokens)
        times = in_turns([ours.run, bare.run], 3 * rounds, steps=50)
        for loop, column in zip((ours, bare), times, strict=True):
            micros = 1e6 * statistics.median(seconds.wall for seconds in column)
            print(f"host: {what}, {loop.name:9} {micros:7.0f} us a step, "
                  f"compiled in {loop.compile_seconds:.1f} s")  # fmt: skip
        report("host", f"{what}, trainer / bare call", times[0], times[1], "at most 1.1")


def bare_groups(num: int) -> optax.GradientTransformation:
    """What GROUPS says, over a list of `num` parameters."""
    groups = {"few": optax.sgd(1e-2), "some": optax.adam(1e-3), "rest": optax.adamw(1e-3)}
    names = ["few" if i % 10 < 2 else "some" if i % 10 < 5 else "rest" for i in range(num)]
    return optax.partition(groups, names)


def bare_loop(num: int, tx: optax.GradientTransformation, tokens: jax.Array) -> Loop:
    """An ahead-of-time compiled update of `num` plain arrays."""
    params = [jnp.ones(8) for _ in range(num)]
    leaves, treedef = jax.tree.flatten((params, tx.init(params)))

    def step(leaves: list[jax.Array], tokens: jax.Array) -> tuple[list[jax.Array], dict]:
        params, opt_state = jax.tree.unflatten(treedef, leaves)
        loss, grads = jax.value_and_grad(far_off)(params, tokens)
        updates, opt_state = tx.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
        metrics = {"loss": loss, "grad_norm": optax.tree.norm(grads)}
        return jax.tree.leaves((params, opt_state)), metrics

    def compile_step() -> Any:
        return jax.jit(step, donate_argnums=0).lower(leaves, tokens).compile()

    return Loop("bare call", compile_step, leaves, tokens)
