"""Looking tokens up in a table whose rows and columns may be elsewhere."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from trainer.models.gather import Gather


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def look_up(gather: Gather, tensor: str | None, table: jax.Array, tokens_N: jax.Array) -> jax.Array:
    """The rows of the tokens, [N, D] of `gather.dtype`; of one outside the table they are NaN.

    Args:
      gather: how the table travels.
      tensor: the mesh axis that splits the vocabulary, or None.
      table: this device's shard of the table [V, D].
      tokens_N: [N] int32.
    """
    table_VD = gather.gather(table)
    if tensor is None:
        return jnp.take(table_VD, tokens_N, axis=0)
    V = table_VD.shape[0]
    size = V * jax.lax.axis_size(tensor)
    local_N = tokens_N - jax.lax.axis_index(tensor) * V
    is_here_N = (local_N >= 0) & (local_N < V)
    rows_ND = jnp.take(table_VD, jnp.where(is_here_N, local_N, 0), axis=0)
    rows_ND = jnp.where(is_here_N[:, None], rows_ND, 0)
    # One device has the row, the others add zeros to it.
    rows_ND = jax.lax.psum(rows_ND, tensor)
    is_token_N = (tokens_N >= 0) & (tokens_N < size)
    return jnp.where(is_token_N[:, None], rows_ND, jnp.nan)


def _forward(
    gather: Gather, tensor: str | None, table: jax.Array, tokens_N: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return look_up(gather, tensor, table, tokens_N), (table, tokens_N)


def _backward(
    gather: Gather, tensor: str | None, kept: tuple[jax.Array, jax.Array], drows_ND: jax.Array
) -> tuple[jax.Array, None]:
    table, tokens_N = kept
    V, D = table.shape[0], drows_ND.shape[1]
    first = jax.lax.axis_index(tensor) * V if tensor else 0
    local_N = tokens_N - first
    # Negative indices would count from the end; those behind it are dropped.
    local_N = jnp.where(local_N < 0, V, local_N)
    # In float32: a token that comes a thousand times is summed up a thousand times.
    dtable_VD = jnp.zeros((V, D), jnp.float32).at[local_N].add(drows_ND, mode="drop")
    return gather.scatter(dtable_VD.astype(gather.dtype)).astype(table.dtype), None


look_up.defvjp(_forward, _backward)
