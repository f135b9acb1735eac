"""The MLP, whole or a part of its width at a time. Shapes as in `trainer.models.transformer`.

In whole, its arrays [N, F] are the widest of a layer: a backward pass has six of them at once. In
chunks of the width F neither they nor the weights are ever whole; each chunk's weights are gathered
and its gradients scattered by themselves, and only [N, D] sums go from one to the next.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from trainer.models.chunks import chunks, join_dim, scan_gathered, split_dim
from trainer.models.gather import Gather
from trainer.models.place import Place
from trainer.models.transformer_config import TransformerConfig
from trainer.models.weights import (
    RMSNorm,
    inverse_rms,
    make_weight,
    residual_fan_in,
    rms_norm,
    scaled,
)

_Weights = tuple[jax.Array, jax.Array, jax.Array]


class MLP(nnx.Module):
    """SwiGLU: silu(x gate) * (x up), projected down, of a normed x; added to x."""

    def __init__(self, config: TransformerConfig, rngs: nnx.Rngs):
        D, F = config.dim, config.mlp_dim
        self.dtype = config.dtype
        self.chunk = config.mlp_chunk
        self.gate_DF = make_weight(config, rngs, (D, F), ("embed", "mlp"), D)
        self.up_DF = make_weight(config, rngs, (D, F), ("embed", "mlp"), D)
        fan_in = residual_fan_in(config, F)
        self.down_FD = make_weight(config, rngs, (F, D), ("mlp", "embed"), fan_in)

    def __call__(self, x_ND: jax.Array, norm: RMSNorm, place: Place) -> jax.Array:
        """[N, D] to [N, D]: the input, and to it the MLP of what `norm` makes of it."""
        F = self.gate_DF.get_value().shape[1]
        if self.chunk and self.chunk < F and place.is_local:
            num, size = chunks(F, self.chunk, place.align)
            how = _Chunked(num, size, place.gather(self.gate_DF, self.dtype), norm.epsilon, place)
            weights = (self.gate_DF[...], self.up_DF[...], self.down_FD[...])
            scale_D = place.weight(norm.scale_D, "float32")
            return _swiglu(how, x_ND, scale_D, weights)
        normed_ND = place.enter(norm(x_ND, place))
        gate_NF = jax.nn.silu(normed_ND @ place.weight(self.gate_DF, self.dtype))
        up_NF = normed_ND @ place.weight(self.up_DF, self.dtype)
        return x_ND + place.leave((gate_NF * up_NF) @ place.weight(self.down_FD, self.dtype))


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
      epsilon: of the norm in front.
      place: where the MLP is computed.
    """

    num: int
    size: int
    gather: Gather
    epsilon: float
    place: Place

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
def _swiglu(how: _Chunked, x_ND: jax.Array, scale_D: jax.Array, weights: _Weights) -> jax.Array:
    """The input plus the MLP of its norm, chunk by chunk. Keeps its input alone.

    Args:
      how: the chunks.
      x_ND: [N, D], of the compute dtype, not normed yet.
      scale_D: of the norm, [D] float32.
      weights: this device's shards.
    """
    X = how.size
    normed_ND = rms_norm(x_ND, scale_D, how.epsilon)

    def use(sum_ND: jax.Array, whole_DY: jax.Array, number: jax.Array) -> tuple[jax.Array, None]:
        del number
        hidden_NX = _gated(normed_ND @ whole_DY[:, : 2 * X])
        return sum_ND + _dot32(hidden_NX, whole_DY[:, 2 * X :].T), None

    # The sum begins with the residual, on one device of `tensor`. (From zeros, XLA on TPU sets them
    # up before the attention.)
    tensor = how.place.tensor
    first_ND = jnp.where(jax.lax.axis_index(tensor) == 0, x_ND, 0) if tensor else x_ND
    start_ND = first_ND.astype(jnp.float32)
    sum_ND, _ = scan_gathered(use, start_ND, how.shards(weights), how.gather.gather)
    return how.place.leave(sum_ND.astype(x_ND.dtype))


def _swiglu_forward(
    how: _Chunked, x_ND: jax.Array, scale_D: jax.Array, weights: _Weights
) -> tuple[jax.Array, tuple[jax.Array, jax.Array, _Weights]]:
    return _swiglu(how, x_ND, scale_D, weights), (x_ND, scale_D, weights)


def _swiglu_backward(
    how: _Chunked, kept: tuple[jax.Array, jax.Array, _Weights], dy_ND: jax.Array
) -> tuple[jax.Array, jax.Array, _Weights]:
    x_ND, scale_D, weights = kept
    X = how.size
    inverse_N1 = inverse_rms(x_ND, how.epsilon)

    def use(dnormed_ND: jax.Array, whole_DY: jax.Array, number: jax.Array) -> tuple[jax.Array, Any]:
        del number
        # Normed anew for every chunk, as it is read: the barrier keeps it from being done once in
        # front of the loop, and kept.
        here_ND, whole_DY = jax.lax.optimization_barrier((x_ND, whole_DY))
        normed_ND = scaled(here_ND, inverse_N1, scale_D)
        wide_DY, down_DX = whole_DY[:, : 2 * X], whole_DY[:, 2 * X :]
        hidden_NX, pull_back = jax.vjp(_gated, normed_ND @ wide_DY)
        (dwide_NY,) = pull_back(dy_ND @ down_DX)
        gradient_DY = jnp.concatenate([normed_ND.T @ dwide_NY, dy_ND.T @ hidden_NX], axis=1)

        # Gate and up in one product: with two, XLA keeps a float32 sum between them.
        def add(sum_XD: jax.Array, dwide_XY: jax.Array) -> jax.Array:
            return sum_XD + _dot32(dwide_XY, wide_DY.T)

        return _over(dnormed_ND, add, dwide_NY), how.gather.scatter(gradient_DY)

    # Summed in float32, but rounded for each chunk: a float32 sum costs as much as two activations.
    zeros_ND = jnp.zeros(x_ND.shape, x_ND.dtype)
    dnormed_ND, gradients_CDY = scan_gathered(use, zeros_ND, how.shards(weights), how.gather.gather)
    gate_DF, up_DF, down_FD = weights
    dgate, dup, ddown = jnp.split(gradients_CDY, 3, axis=2)
    gradients = (how.join(dgate, gate_DF), how.join(dup, up_DF), how.join(ddown, down_FD.T).T)
    # All of it now: else XLA puts the last chunk's off, and keeps what they need meanwhile.
    dnormed_ND, gradients = jax.lax.optimization_barrier((dnormed_ND, gradients))
    dnormed_ND = how.place.enter_backward(dnormed_ND)
    dscale_D = jnp.sum(x_ND.astype(jnp.float32) * inverse_N1 * dnormed_ND, axis=0)

    def add_norms(dy_XD: jax.Array, x_XD: jax.Array, dnormed_XD: jax.Array) -> jax.Array:
        _, pull_back = jax.vjp(lambda x_XD: rms_norm(x_XD, scale_D, how.epsilon), x_XD)
        return dy_XD + pull_back(dnormed_XD)[0]

    return _over(dy_ND, add_norms, x_ND, dnormed_ND), dscale_D, gradients


_swiglu.defvjp(_swiglu_forward, _swiglu_backward)


def _gated(wide_NY: jax.Array) -> jax.Array:
    """[N, 2 X], gate and up, to [N, X]."""
    gate_NX, up_NX = jnp.split(wide_NY, 2, axis=1)
    return jax.nn.silu(gate_NX) * up_NX


def _over(sum_ND: jax.Array, add: Callable[..., jax.Array], *terms_NX: jax.Array) -> jax.Array:
    """`add(sum, *terms)`, a quarter of the rows at a time, each written over those of the sum.

    In whole, XLA on TPU would make another array for what comes of it.
    """
    rows = sum_ND.shape[0]
    num = 4 if rows % 4 == 0 else 1

    def step(number: jax.Array, sum_ND: jax.Array) -> jax.Array:
        start, size = number * (rows // num), rows // num
        parts = [jax.lax.dynamic_slice_in_dim(x, start, size) for x in (sum_ND, *terms_NX)]
        new_XD = add(*parts).astype(sum_ND.dtype)
        return jax.lax.dynamic_update_slice_in_dim(sum_ND, new_XD, start, 0)

    return jax.lax.fori_loop(0, num, step, sum_ND)


def _dot32(x: jax.Array, y: jax.Array) -> jax.Array:
    """A product that is summed up further, in float32."""
    return jnp.dot(x, y, preferred_element_type=jnp.float32)
