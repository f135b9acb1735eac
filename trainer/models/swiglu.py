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

from trainer.models.chunks import chunks, join_dim, scan_gathered, split_dim
from trainer.models.gather import Gather
from trainer.models.place import Place
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
            num, size = chunks(F, self.chunk, place.align)
            how = _Chunked(num, size, place.gather(self.gate_DF, self.dtype))
            weights = (self.gate_DF[...], self.up_DF[...], self.down_FD[...])
            return place.leave(_swiglu(how, x_ND, weights))
        gate_NF = jax.nn.silu(x_ND @ place.weight(self.gate_DF, self.dtype))
        up_NF = x_ND @ place.weight(self.up_DF, self.dtype)
        return place.leave((gate_NF * up_NF) @ place.weight(self.down_FD, self.dtype))


@dataclasses.dataclass(frozen=True)
class _Chunked:
    """How the MLP is cut up. Hashable.

    A chunk of all three weights travels as one array [D, 3 X]: gate, up, and down transposed. Many
    small arrays would be slower, and libtpu gathers very small shards by an all-reduce.

    Attributes:
      num: chunks, C.
      size: of the width in each, X; the last one's may go beyond the weights and is filled with
        zeros, which add nothing.
      gather: how a chunk travels.
    """

    num: int
    size: int
    gather: Gather

    def shards(self, weights: _Weights) -> jax.Array:
        """The weights' shards as [C, D, 3 X] of the compute dtype."""
        gate_DF, up_DF, down_FD = weights
        parts = [self.split(weight_DF) for weight_DF in (gate_DF, up_DF, down_FD.T)]
        # Cast last: what is cast first, XLA casts for all layers in front of the loop over them.
        return jnp.concatenate(parts, axis=2).astype(self.gather.dtype)

    def split(self, weight_DF: jax.Array) -> jax.Array:
        """[D, F] as [C, D, X]."""
        padding = self.num * self.size - weight_DF.shape[1]
        return split_dim(jnp.pad(weight_DF, ((0, 0), (0, padding))), 1, self.num)

    def join(self, parts_CDX: jax.Array, like_DF: jax.Array) -> jax.Array:
        """What `split` took apart, of the shape and dtype of another."""
        return join_dim(parts_CDX, 1)[:, : like_DF.shape[1]].astype(like_DF.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _swiglu(how: _Chunked, x_ND: jax.Array, weights: _Weights) -> jax.Array:
    """The MLP chunk by chunk. Keeps its input alone for the backward pass.

    Args:
      how: the chunks.
      x_ND: [N, D], of the compute dtype.
      weights: this device's shards.
    """
    X = how.size

    def use(sum_ND: jax.Array, whole_DY: jax.Array, number: jax.Array) -> tuple[jax.Array, None]:
        del number
        hidden_NX = _gated(x_ND @ whole_DY[:, : 2 * X])
        return sum_ND + _dot32(hidden_NX, whole_DY[:, 2 * X :].T), None

    zeros_ND = jnp.zeros(x_ND.shape, jnp.float32)
    sum_ND, _ = scan_gathered(use, zeros_ND, how.shards(weights), how.gather.gather)
    return sum_ND.astype(x_ND.dtype)


def _swiglu_forward(
    how: _Chunked, x_ND: jax.Array, weights: _Weights
) -> tuple[jax.Array, tuple[jax.Array, _Weights]]:
    return _swiglu(how, x_ND, weights), (x_ND, weights)


def _swiglu_backward(
    how: _Chunked, kept: tuple[jax.Array, _Weights], dy_ND: jax.Array
) -> tuple[jax.Array, _Weights]:
    x_ND, weights = kept
    X = how.size

    def use(dx_ND: jax.Array, whole_DY: jax.Array, number: jax.Array) -> tuple[jax.Array, Any]:
        del number
        wide_DY, down_DX = whole_DY[:, : 2 * X], whole_DY[:, 2 * X :]
        hidden_NX, pull_back = jax.vjp(_gated, x_ND @ wide_DY)
        (dwide_NY,) = pull_back(dy_ND @ down_DX)
        # Gate and up in one product: with two, XLA keeps a float32 sum between them.
        dx_ND = (dx_ND + _dot32(dwide_NY, wide_DY.T)).astype(x_ND.dtype)
        gradient_DY = jnp.concatenate([x_ND.T @ dwide_NY, dy_ND.T @ hidden_NX], axis=1)
        return dx_ND, how.gather.scatter(gradient_DY)

    # Summed in float32, but rounded for each chunk: a float32 sum costs as much as two activations.
    zeros_ND = jnp.zeros(x_ND.shape, x_ND.dtype)
    dx_ND, gradients_CDY = scan_gathered(use, zeros_ND, how.shards(weights), how.gather.gather)
    gate_DF, up_DF, down_FD = weights
    dgate, dup, ddown = jnp.split(gradients_CDY, 3, axis=2)
    gradients = (how.join(dgate, gate_DF), how.join(dup, up_DF), how.join(ddown, down_FD.T).T)
    # All of it now: else XLA puts the last chunk's off, and keeps what they need meanwhile.
    return jax.lax.optimization_barrier((dx_ND, gradients))


_swiglu.defvjp(_swiglu_forward, _swiglu_backward)


def _gated(wide_NY: jax.Array) -> jax.Array:
    """[N, 2 X], gate and up, to [N, X]."""
    gate_NX, up_NX = jnp.split(wide_NY, 2, axis=1)
    return jax.nn.silu(gate_NX) * up_NX


def _dot32(x: jax.Array, y: jax.Array) -> jax.Array:
    """A product that is summed up further, in float32."""
    return jnp.dot(x, y, preferred_element_type=jnp.float32)
