"""A weight in chunks, each gathered while the chunk before it is used."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def chunks(size: int, limit: int, align: int = 1) -> tuple[int, int]:
    """Into how many chunks of which size to cut something up.

    Args:
      size: of all; together the chunks may be a little larger.
      limit: of a chunk, before it is rounded up.
      align: a chunk's size is a multiple of it, if there are several.
    """
    num = -(-size // limit)
    if num <= 1:
        return 1, size
    each = -(-size // num)
    each += -each % align
    return -(-size // each), each


def split_dim(x: jax.Array, dim: int, num: int) -> jax.Array:
    """[..., X, ...] as [num, ..., X / num, ...], where X is dim `dim`."""
    shape = (*x.shape[:dim], num, x.shape[dim] // num, *x.shape[dim + 1 :])
    return jnp.moveaxis(x.reshape(shape), dim, 0)


def join_dim(x: jax.Array, dim: int) -> jax.Array:
    """What `split_dim` took apart."""
    x = jnp.moveaxis(x, 0, dim)
    return x.reshape(*x.shape[:dim], -1, *x.shape[dim + 2 :])


def scan_gathered(
    use: Callable[[Any, Any, jax.Array], tuple[Any, Any]],
    start: Any,
    shards: Any,
    gather: Callable[[Any], Any],
) -> tuple[Any, Any]:
    """`jax.lax.scan` over chunks of weights, gathering each one step ahead of its use.

    So the gather of chunk i + 1 does not wait for the computation with chunk i, and two chunks are
    whole at a time. The last one is used behind the loop: nothing is gathered twice.

    Args:
      use: (carry, a whole chunk, its number) -> (carry, output).
      start: the first carry.
      shards: arrays [C, ...] of C >= 1 chunks.
      gather: makes a chunk of its shard.

    Returns:
      The last carry, and the outputs stacked to [C, ...].
    """
    num = jax.tree.leaves(shards)[0].shape[0]
    whole = gather(jax.tree.map(lambda x: x[0], shards))
    outs = []
    carry = start
    if num > 1:

        def step(state: tuple[Any, Any], inputs: tuple[Any, jax.Array]) -> tuple[Any, Any]:
            carry, whole = state
            shard, number = inputs
            ahead = gather(shard)
            carry, out = use(carry, whole, number)
            return (carry, ahead), out

        later = jax.tree.map(lambda x: x[1:], shards)
        (carry, whole), out = jax.lax.scan(step, (carry, whole), (later, jnp.arange(num - 1)))
        outs.append(out)
    carry, out = use(carry, whole, jnp.asarray(num - 1))
    outs.append(jax.tree.map(lambda x: x[None], out))
    return carry, jax.tree.map(lambda *parts: jnp.concatenate(parts), *outs)
