"""Rotary position embedding. Shapes as in `trainer.models.transformer`."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp


class Rope(NamedTuple):
    """Rotary position embedding: pairs of a head's dims are turned by position * frequency.

    Attributes:
      cos_LX, sin_LX: [L, H / 2] float32; dim i is paired with dim i + H / 2, as in Llama.
    """

    cos_LX: jax.Array
    sin_LX: jax.Array

    @classmethod
    def make(cls, length: int, head_dim: int, base: float) -> Rope:
        """The angles of positions 0 to length - 1."""
        frequency_X = base ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
        angle_LX = jnp.arange(length, dtype=jnp.float32)[:, None] * frequency_X
        return cls(jnp.cos(angle_LX), jnp.sin(angle_LX))

    def turn(self, x_LH: jax.Array, scale: float = 1.0) -> jax.Array:
        """Turn [..., L, H] and scale it, in float32; the dtype stays."""
        return _turn(self, x_LH, scale, 1.0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _turn(rope: Rope, x_LH: jax.Array, scale: float, direction: float) -> jax.Array:
    """Turn by direction (1 or -1) times the angles."""
    first, second = jnp.split(x_LH, 2, axis=-1)
    cos_LX, sin_LX = rope.cos_LX * scale, rope.sin_LX * (scale * direction)
    # Halves are cast one by one: XLA on TPU would write all of x out in float32.
    first32, second32 = first.astype(jnp.float32), second.astype(jnp.float32)
    turned = [
        (first32 * cos_LX - second32 * sin_LX).astype(x_LH.dtype),
        (second32 * cos_LX + first32 * sin_LX).astype(x_LH.dtype),
    ]
    return jnp.concatenate(turned, axis=-1)


# A turn is linear, and its transpose is the turn back.
_turn.defvjp(
    lambda rope, x_LH, scale, direction: (_turn(rope, x_LH, scale, direction), rope),
    lambda scale, direction, rope, dx_LH: (None, _turn(rope, dx_LH, scale, -direction)),
)
