"""A loop over layers that keeps their inputs alone, and its backward pass.

`jax.lax.scan` over `jax.checkpoint` does the same with more memory: it copies a layer's input out
of the stack of all inputs for as long as anything is left to do for the layer, and its stack of
gradients is of the parameters' dtype from the first layer on.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Input(NamedTuple):
    """A layer's input, to be read where it is needed.

    Attributes:
      x: the input; its gradient goes here.
      stack: the inputs of all layers, of which this is one, or None.
      number: which one.
    """

    x: jax.Array
    stack: jax.Array | None = None
    number: jax.Array | None = None

    def read(self) -> jax.Array:
        """The array: read anew from the stack, if there is one."""
        if self.stack is None:
            return self.x
        return _pick(self.x, self.stack, self.number)

    def within(self, x: jax.Array) -> Input:
        """The same with the gradient going to another array."""
        return self._replace(x=x)


@jax.custom_vjp
def _pick(x: jax.Array, stack: jax.Array, number: jax.Array) -> jax.Array:
    del x
    return jax.lax.dynamic_index_in_dim(stack, number, keepdims=False)


_pick.defvjp(lambda *args: (_pick(*args), None), lambda _, dx: (dx, None, None))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def loop_over_layers(
    apply: Callable[[Any, Input, Any], jax.Array], dtype: str, stacked: Any, x: jax.Array, rest: Any
) -> jax.Array:
    """Apply layers one after the other; the backward pass computes each from its input again.

    Args:
      apply: (a layer's state, its input, rest) -> its output, like the input.
      dtype: that gradients of two and more dims are rounded to by `apply` already; so they are kept
        until all are there.
      stacked: the states, arrays [layers, ...].
      x: input of the first layer.
      rest: arrays that every layer reads and none learns.
    """
    return jax.lax.scan(lambda x, state: (apply(state, Input(x), rest), None), x, stacked)[0]


def _forward(
    apply: Callable, dtype: str, stacked: Any, x: jax.Array, rest: Any
) -> tuple[jax.Array, tuple[Any, jax.Array, Any]]:
    y, stack = jax.lax.scan(lambda x, state: (apply(state, Input(x), rest), x), x, stacked)
    return y, (stacked, stack, rest)


def _backward(
    apply: Callable, dtype: str, kept: tuple[Any, jax.Array, Any], dy: jax.Array
) -> tuple[Any, jax.Array, None]:
    stacked, stack, rest = kept

    def step(dy: jax.Array, layer: tuple[Any, jax.Array]) -> tuple[jax.Array, Any]:
        state, number = layer

        # Computed for its gradients alone, and called by the names of a checkpoint's second pass.
        @functools.partial(jax.checkpoint, prevent_cse=False)
        def again(state: Any, x: jax.Array) -> jax.Array:
            return apply(state, Input(x, stack, number), rest)

        _, pull_back = jax.vjp(again, state, stack[0])
        dstate, dx = pull_back(dy)
        return dx, jax.tree.map(lambda d: d.astype(dtype) if d.ndim > 1 else d, dstate)

    numbers = jnp.arange(stack.shape[0])
    dx, gradients = jax.lax.scan(step, dy, (stacked, numbers), reverse=True)
    gradients = jax.tree.map(lambda d, like: d.astype(like.dtype), gradients, stacked)
    return gradients, dx, None


loop_over_layers.defvjp(_forward, _backward)
