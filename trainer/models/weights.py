"""How parameters begin, and the norm. Shapes as in `trainer.models.transformer`."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from trainer.models.place import Place
from trainer.models.transformer_config import TransformerConfig


def make_weight(
    config: TransformerConfig,
    rngs: nnx.Rngs,
    shape: tuple[int, ...],
    names: tuple[str, ...],
    fan_in: int,
) -> nnx.Param:
    """A parameter of variance 1 / fan_in, its dims named for the sharding rules."""
    value = jax.random.normal(rngs.params(), shape, config.param_dtype)
    return nnx.Param(value * fan_in**-0.5, out_sharding=names)


def residual_fan_in(config: TransformerConfig, fan_in: int) -> int:
    """What is added to the residual stream is made smaller the more layers add to it (GPT-2)."""
    return fan_in * 2 * config.num_layers


class RMSNorm(nnx.Module):
    """Divide by the root mean square and scale. Computed in float32, whatever comes in."""

    def __init__(self, config: TransformerConfig):
        self.epsilon = config.norm_epsilon
        ones = jnp.ones((config.dim,), config.param_dtype)
        self.scale_D = nnx.Param(ones, out_sharding=("norm",))

    def __call__(self, x_ND: jax.Array, place: Place) -> jax.Array:
        """[N, D] to [N, D], of the same dtype."""
        return rms_norm(x_ND, place.weight(self.scale_D, "float32"), self.epsilon)


def rms_norm(x_ND: jax.Array, scale_D: jax.Array, epsilon: float) -> jax.Array:
    """[N, D] to [N, D], of the same dtype; see RMSNorm."""
    return scaled(x_ND, inverse_rms(x_ND, epsilon), scale_D)


def inverse_rms(x_ND: jax.Array, epsilon: float) -> jax.Array:
    """[N, D] to [N, 1] float32, the inverse root mean square of each row."""
    square_ND = jnp.square(x_ND.astype(jnp.float32))
    return jax.lax.rsqrt(jnp.mean(square_ND, axis=-1, keepdims=True) + epsilon)


def scaled(x_ND: jax.Array, inverse_N1: jax.Array, scale_D: jax.Array) -> jax.Array:
    """What RMSNorm makes of x, given the inverse root mean square of its rows."""
    return (x_ND.astype(jnp.float32) * inverse_N1 * scale_D).astype(x_ND.dtype)
