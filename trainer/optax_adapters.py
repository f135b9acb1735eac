"""Optax's transformations that want more of their caller than a chain gives, made to fit in one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from launch.spec import ConfigError
from trainer.optax_names import in_a_line


def adapted(name: str, tx: optax.GradientTransformation) -> optax.GradientTransformation:
    """The transformation that `optax.NAME` has made, as a chain can use it.

    The trainer's step calls every `update` with the loss of the whole batch as `value`, its
    gradient as `grad`, and the loss as a function of the params as `value_fn`.
    """
    if name == "lookahead":
        return with_slow_params(tx)
    if name in ("sophia", "hutchinson_estimator_diag_hessian"):
        return with_function(tx, "obj_fn", lambda value_fn: value_fn)
    if name == "sam":
        return with_function(tx, "grad_fn", lambda value_fn: lambda p, i: jax.grad(value_fn)(p))
    return tx


def with_function(
    tx: optax.GradientTransformation, name: str, made_of: Callable[..., Any]
) -> optax.GradientTransformationExtraArgs:
    """Give `update` an argument made of `value_fn`, and none besides that."""

    def update(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        *,
        value_fn: Callable[..., Any],
        **extra: Any,
    ) -> tuple[optax.Updates, Any]:
        del extra
        return tx.update(updates, state, params, **{name: made_of(value_fn)})

    return optax.GradientTransformationExtraArgs(tx.init, update)


def selective(
    optimizer: optax.GradientTransformation, freeze_mask: Callable[[Any], Any]
) -> optax.GradientTransformationExtraArgs:
    """`optax.selective_transform` for a mask that is a function of the params."""

    def labels(params: optax.Params) -> Any:
        return jax.tree.map(lambda frozen: "freeze" if frozen else "train", freeze_mask(params))

    return optax.partition({"train": optimizer, "freeze": optax.set_to_zero()}, labels)


class SlowState(NamedTuple):
    """State of `with_slow_params`: lookahead's slow params, and its own state."""

    slow: Any
    inner: Any


def with_slow_params(lookahead: optax.GradientTransformation) -> optax.GradientTransformation:
    """Keep the slow params of `optax.lookahead` in its state.

    Optax wants the caller to hold pairs of params; here the model has the fast ones alone.
    """

    def init(params: optax.Params) -> SlowState:
        slow = jax.tree.map(lambda p: jnp.array(p, copy=True), params)
        return SlowState(slow, lookahead.init(optax.LookaheadParams(fast=params, slow=slow)))

    def update(
        updates: optax.Updates, state: SlowState, params: optax.Params
    ) -> tuple[optax.Updates, SlowState]:
        pair = optax.LookaheadParams(fast=params, slow=state.slow)
        updates, inner = lookahead.update(updates, state.inner, pair)
        return updates.fast, SlowState(optax.apply_updates(state.slow, updates.slow), inner)

    return optax.GradientTransformation(init, update)


def blaming(field: str, tx: optax.GradientTransformation) -> optax.GradientTransformation:
    """The same transformation; what it refuses when it is traced, it refuses with its field.

    Of transformations within each other, the innermost that fails is named.
    """

    def told(function: Callable[..., Any], what: str) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            try:
                return function(*args, **kwargs)
            except ConfigError:
                raise
            except Exception as error:
                rule = f"Optax cannot {what} these parameters: {in_a_line(error)}"
                raise ConfigError(field, rule) from error

        return wrapped

    return type(tx)(told(tx.init, "make its state for"), told(tx.update, "update"))
