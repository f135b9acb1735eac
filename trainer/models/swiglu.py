"""The MLP, whole or a part of its width at a time. Shapes as in `trainer.models.transformer`.

In whole, its arrays [N, F] are the widest of a layer: a backward pass has six of them at once. In
chunks of the width F neither they nor the weights are ever whole; each chunk's weights are gathered
and its gradients scattered by themselves, and only [N, D] sums go from one to the next.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from trainer.models.chunks import join_dim, largest_divisor, scan_gathered, split_dim
from trainer.models.place import Gather, Place
from trainer.models.transformer_config import TransformerConfig
from trainer.models.weights import make_weight, residual_fan_in

_Weights = tuple[jax.Array, jax.Array, jax.Array]


class MLP(nnx.Module):
    """SwiGLU: silu(x gate) * (x up), projected down."""

    def __init__(self, config: TransformerConfig, rngs: nnx.Rngs):
        D, F = config.dim, config.mlp_dim
        self.dtype = config.dtype
        self.chunk = config.mlp_chunk
        self.gate_DF = make_weight(config, rngs, (D, F), ("embed", "mlp"), D)
        self.up_DF = make_weight(config, rngs, (D, F), ("embed", "mlp"), D)
        fan_in = residual_fan_in(config, F)
        self.down_FD = make_weight(config, rngs, (F, D), ("mlp", "embed"), fan_in)

    def __call__(self, x_ND: jax.Array, place: Place) -> jax.Array:
        """[N, D] to [N, D]."""
        x_ND = place.enter(x_ND)
        F = self.gate_DF.get_value().shape[1]
        if self.chunk and self.chunk < F and place.is_local:
            how = _Chunked(
                F // largest_divisor(F, self.chunk),
                place.gather(self.gate_DF, self.dtype).behind(1),
                place.gather(self.down_FD, self.dtype),
            )
            weights = (self.gate_DF[...], self.up_DF[...], self.down_FD[...])
            return place.leave(_swiglu(how, x_ND, weights))
        gate_NF = jax.nn.silu(x_ND @ place.weight(self.gate_DF, self.dtype))
        up_NF = x_ND @ place.weight(self.up_DF, self.dtype)
        return place.leave((gate_NF * up_NF) @ place.weight(self.down_FD, self.dtype))


@dataclasses.dataclass(frozen=True)
class _Chunked:
    """In how many chunks, and how the weights [2, D, F] and [F, D] travel. Hashable."""

    num: int
    wide: Gather
    down: Gather

    def shards(self, weights: _Weights) -> tuple[jax.Array, jax.Array]:
        """The weights' shards as [C, 2, D, X] (gate and up) and [C, X, D], ready to travel."""
        # See Gather.gather about the barrier.
        weights = jax.lax.optimization_barrier(weights)
        gate_DF, up_DF, down_FD = (w.astype(self.wide.dtype) for w in weights)
        return split_dim(jnp.stack([gate_DF, up_DF]), 2, self.num), split_dim(down_FD, 0, self.num)

    def gather(self, shards: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        """One chunk, whole."""
        wide_CDX, down_XD = shards
        return self.wide.gather(wide_CDX), self.down.gather(down_XD)


    def scatter_wide(self, gradient_CDX: jax.Array) -> jax.Array:
        """Each of the two by itself: libtpu makes an all-reduce of a scatter of an inner dim."""
        one = dataclasses.replace(self.wide, dims=self.wide.dims[1:])
        return jnp.stack([one.scatter(gradient) for gradient in gradient_CDX])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _swiglu(how: _Chunked, x_ND: jax.Array, weights: _Weights) -> jax.Array:
    """The MLP chunk by chunk. Keeps its input alone for the backward pass.

    Args:
      how: the chunks.
      x_ND: [N, D], of the compute dtype.
      weights: this device's shards.
    """

    def use(sum_ND: jax.Array, whole: Any, number: jax.Array) -> tuple[jax.Array, None]:
        del number
        wide_CDX, down_XD = whole
        hidden_NX = _gated(jnp.einsum("ND,CDX->CNX", x_ND, wide_CDX))
        return sum_ND + _dot32(hidden_NX, down_XD), None

    zeros_ND = jnp.zeros(x_ND.shape, jnp.float32)
    sum_ND, _ = scan_gathered(use, zeros_ND, how.shards(weights), how.gather)
    return sum_ND.astype(x_ND.dtype)


def _swiglu_forward(
    how: _Chunked, x_ND: jax.Array, weights: _Weights
) -> tuple[jax.Array, tuple[jax.Array, _Weights]]:
    return _swiglu(how, x_ND, weights), (x_ND, weights)


def _swiglu_backward(
    how: _Chunked, kept: tuple[jax.Array, _Weights], dy_ND: jax.Array
) -> tuple[jax.Array, _Weights]:
    x_ND, weights = kept

    def use(dx_ND: jax.Array, whole: Any, number: jax.Array) -> tuple[jax.Array, Any]:
        del number
        wide_CDX, down_XD = whole
        hidden_NX, pull_back = jax.vjp(_gated, jnp.einsum("ND,CDX->CNX", x_ND, wide_CDX))
        (dwide_CNX,) = pull_back(dy_ND @ down_XD.T)
        # One product for gate and up: with two, XLA keeps a float32 sum between them.
        more_ND = jnp.einsum(
            "CNX,CDX->ND", dwide_CNX, wide_CDX, preferred_element_type=jnp.float32
        )
        return (dx_ND + more_ND).astype(x_ND.dtype), (
            how.scatter_wide(jnp.einsum("ND,CNX->CDX", x_ND, dwide_CNX)),
            how.down.scatter(jnp.einsum("ND,NX->XD", dy_ND, hidden_NX)),
        )

    # Summed in float32, rounded for each chunk: a float32 sum would cost as much as two activations.
    zeros_ND = jnp.zeros(x_ND.shape, x_ND.dtype)
    dx_ND, (dwide, ddown) = scan_gathered(use, zeros_ND, how.shards(weights), how.gather)
    joined = (*join_dim(dwide, 2), join_dim(ddown, 0))
    like = zip(joined, weights, strict=True)
    dgate_DF, dup_DF, ddown_FD = (gradient.astype(weight.dtype) for gradient, weight in like)
    gradients = (dx_ND, (dgate_DF, dup_DF, ddown_FD))
    # All of it now: else XLA puts the last chunk's off, and keeps what they need meanwhile.
    return jax.lax.optimization_barrier(gradients)


_swiglu.defvjp(_swiglu_forward, _swiglu_backward)


def _gated(wide_CNX: jax.Array) -> jax.Array:
    """[2, N, X], gate and up, to [N, X]."""
    return jax.nn.silu(wide_CNX[0]) * wide_CNX[1]


def _dot32(x: jax.Array, y: jax.Array) -> jax.Array:
    """A product that is summed up further, in float32."""
    return jnp.dot(x, y, preferred_element_type=jnp.float32)
