"""The same model and its training step, written by hand in pure JAX.

Matmuls of two dims, layers unrolled, buffers donated, no Flax.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from step_benchmarks.measure import DIM, EPSILON, HEADS, LENGTH, VOCAB, Loop

HEAD = DIM // HEADS
CHUNKS = 4  # Of queries in attention, as the trainer's model has.


def pure_loop(
    model: Any, tx: optax.GradientTransformation, tokens: jax.Array, num_microbatches: int
) -> Loop:
    """A loop from the trainer's own parameters."""
    params = jax.tree.map(jnp.copy, pure_params(model))
    leaves, treedef = jax.tree.flatten((params, tx.init(params)))
    step = pure_step(treedef, tx, num_microbatches)

    def compile_step() -> Any:
        return jax.jit(step, donate_argnums=0).lower(leaves, tokens).compile()

    return Loop("pure JAX", compile_step, leaves, tokens)


def pure_params(model: Any) -> dict[str, Any]:
    """The trainer's parameters as the pure model has them."""

    def layer(layer: Any) -> dict[str, jax.Array]:
        attention, mlp = layer.attention, layer.mlp
        return {
            "norm1": layer.attention_norm.scale_D[...],
            "q": attention.query_DQH[...].reshape(DIM, DIM),
            "k": attention.key_DKH[...].reshape(DIM, DIM),
            "v": attention.value_DKH[...].reshape(DIM, DIM),
            "o": attention.out_QHD[...].reshape(DIM, DIM),
            "norm2": layer.mlp_norm.scale_D[...],
            "gate": mlp.gate_DF[...],
            "up": mlp.up_DF[...],
            "down": mlp.down_FD[...],
        }

    return {
        "embed": model.embedding_VD[...],
        "norm": model.norm.scale_D[...],
        "layers": [layer(each) for each in model.layers],
    }


def pure_step(treedef: Any, tx: optax.GradientTransformation, num_microbatches: int) -> Callable:
    """One update as one would write it by hand: (leaves, tokens) to (leaves, metrics)."""
    loss_and_grads = jax.value_and_grad(pure_loss)

    def mean(params: dict[str, Any], tokens: jax.Array) -> tuple[jax.Array, dict[str, Any]]:
        if num_microbatches == 1:
            return loss_and_grads(params, tokens)

        def add(sums: Any, tokens: jax.Array) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, sums, loss_and_grads(params, tokens)), None

        zeros = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, params))
        parts = tokens.reshape(num_microbatches, -1, tokens.shape[1])
        sums, _ = jax.lax.scan(add, zeros, parts)
        return jax.tree.map(lambda x: x / num_microbatches, sums)

    def step(leaves: list[jax.Array], tokens: jax.Array) -> tuple[list[jax.Array], dict]:
        params, opt_state = jax.tree.unflatten(treedef, leaves)
        loss, grads = mean(params, tokens)
        updates, opt_state = tx.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
        metrics = {"loss": loss, "grad_norm": optax.tree.norm(grads)}
        return jax.tree.leaves((params, opt_state)), metrics

    return step


def pure_loss(params: dict[str, Any], tokens: jax.Array) -> jax.Array:
    """Mean cross entropy of [B, LENGTH + 1] tokens."""
    targets = tokens[:, 1:].reshape(-1)
    x = params["embed"][tokens[:, :-1].reshape(-1)]
    frequency = 1e4 ** (-jnp.arange(0, HEAD, 2) / HEAD)
    angle = jnp.arange(LENGTH)[:, None] * frequency
    cos, sin = jnp.cos(angle), jnp.sin(angle)

    def norm(x: jax.Array, scale: jax.Array) -> jax.Array:
        return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + EPSILON) * scale

    def heads(x: jax.Array) -> jax.Array:
        return x.reshape(-1, LENGTH, HEADS, HEAD).transpose(0, 2, 1, 3)

    def turn(x: jax.Array) -> jax.Array:
        a, b = jnp.split(x, 2, -1)
        return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1)

    def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        outs, size = [], LENGTH // CHUNKS
        for start in range(0, LENGTH, size):
            end = start + size
            scores = jnp.einsum("bhld,bhmd->bhlm", q[:, :, start:end], k[:, :, :end])
            seen = jnp.arange(start, end)[:, None] >= jnp.arange(end)
            shares = jax.nn.softmax(jnp.where(seen, scores, -1e30), -1)
            outs.append(jnp.einsum("bhlm,bhmd->bhld", shares, v[:, :, :end]))
        return jnp.concatenate(outs, 2)

    for p in params["layers"]:
        y = norm(x, p["norm1"])
        q, k, v = heads(y @ p["q"]), heads(y @ p["k"]), heads(y @ p["v"])
        out = attend(turn(q) * HEAD**-0.5, turn(k), v)
        x = x + out.transpose(0, 2, 1, 3).reshape(-1, DIM) @ p["o"]
        y = norm(x, p["norm2"])
        x = x + (jax.nn.silu(y @ p["gate"]) * (y @ p["up"])) @ p["down"]
    logits = norm(x, params["norm"]) @ params["embed"].T
    hit = jnp.arange(VOCAB) == targets[:, None]
    target_logit = jnp.where(hit, logits, 0.0).sum(-1)
    return (jax.nn.logsumexp(logits, -1) - target_logit).mean()
