"""Rotary position embedding. Shapes as in `trainer.models.transformer`."""

from __future__ import annotations

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
        first, second = jnp.split(x_LH.astype(jnp.float32), 2, axis=-1)
        cos_LX, sin_LX = self.cos_LX * scale, self.sin_LX * scale
        turned = [first * cos_LX - second * sin_LX, second * cos_LX + first * sin_LX]
        return jnp.concatenate(turned, axis=-1).astype(x_LH.dtype)
