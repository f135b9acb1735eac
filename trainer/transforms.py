"""What Muster puts around an Optax chain: skipped steps, master weights, averages of params.

Each is an ordinary Optax transformation, so its state is part of the optimizer's: sharded like the
params, checkpointed, restored.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from optax import contrib

from launch.spec import ConfigError, require
from trainer.optax_adapters import SlowState


@dataclasses.dataclass(frozen=True)
class SkipSpec:
    """Which updates to leave out (`config.optimizer.skip`).

    A spike is a value more than so many standard deviations above the running mean of the steps
    that were taken; 0 turns its rule off.

    Attributes:
      nonfinite: leave out a step whose loss or gradient norm is not finite.
      loss_sigmas, grad_norm_sigmas: the rules for spikes; 6 is a cautious choice.
      window_steps: memory of the running mean and deviation; in a run's first no spike is seen.
      max_in_a_row: the run ends with an error when so many steps in a row were left out.
    """

    nonfinite: bool = True
    loss_sigmas: float = 0.0
    grad_norm_sigmas: float = 0.0
    window_steps: int = 128
    max_in_a_row: int = 10

    def __post_init__(self) -> None:
        for name in ("loss_sigmas", "grad_norm_sigmas"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "must be 0 (off) or more")
        for name in ("window_steps", "max_in_a_row"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "must be at least 1")


class Running(NamedTuple):
    """Exponentially weighted mean and variance, float32 scalars."""

    mean: jax.Array
    variance: jax.Array


class SkipState(NamedTuple):
    """State of `skip_bad_steps`.

    Attributes:
      taken: steps that were taken, int32 as the next three.
      nonfinite, spikes: steps that were left out, by reason.
      in_a_row: steps left out since the last one that was taken.
      loss, grad_norm: running statistics of the steps that were taken.
      inner: of the wrapped transformation.
    """

    taken: jax.Array
    nonfinite: jax.Array
    spikes: jax.Array
    in_a_row: jax.Array
    loss: Running
    grad_norm: Running
    inner: Any


def skip_bad_steps(
    inner: optax.GradientTransformation, spec: SkipSpec
) -> optax.GradientTransformationExtraArgs:
    """Leave out bad updates: params and the inner state stay as they are.

    The loss and the gradients are those of the whole batch, so every process decides alike.
    `update` needs the loss as `value`.
    """
    inner = optax.with_extra_args_support(inner)

    def init(params: optax.Params) -> SkipState:
        # Arrays of their own: donated buffers must not be one and the same.
        def running() -> Running:
            return Running(jnp.zeros((), jnp.float32), jnp.zeros((), jnp.float32))

        def zero() -> jax.Array:
            return jnp.zeros((), jnp.int32)

        return SkipState(zero(), zero(), zero(), zero(), running(), running(), inner.init(params))

    def update(
        updates: optax.Updates,
        state: SkipState,
        params: optax.Params | None = None,
        *,
        value: jax.Array,
        **extra: Any,
    ) -> tuple[optax.Updates, SkipState]:
        loss = jnp.asarray(value, jnp.float32)
        grad_norm = optax.tree.norm(updates).astype(jnp.float32)
        finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
        settled = state.taken >= spec.window_steps
        spike = settled & (
            _is_spike(loss, state.loss, spec.loss_sigmas)
            | _is_spike(grad_norm, state.grad_norm, spec.grad_norm_sigmas)
        )
        spike = spike & finite
        skip = spike | ~finite if spec.nonfinite else spike
        # A running mean that has taken in a NaN would be NaN for ever.
        uncounted = skip | ~finite
        window = jnp.minimum(state.taken + 1, spec.window_steps).astype(jnp.float32)
        new_updates, new_inner = inner.update(updates, state.inner, params, value=value, **extra)

        # One more pass over the state. `lax.cond` was measured to take three times as long on CPU:
        # it copies the state.
        def unless(left_out: jax.Array, old: Any, new: Any) -> Any:
            return jax.tree.map(lambda o, n: jnp.where(left_out, o, n), old, new)

        new_state = SkipState(
            taken=state.taken + ~skip,
            nonfinite=state.nonfinite + (skip & ~finite),
            spikes=state.spikes + spike,
            in_a_row=jnp.where(skip, state.in_a_row + 1, 0),
            loss=unless(uncounted, state.loss, _moved(state.loss, loss, window)),
            grad_norm=unless(
                uncounted, state.grad_norm, _moved(state.grad_norm, grad_norm, window)
            ),
            inner=unless(skip, state.inner, new_inner),
        )
        return unless(skip, optax.tree.zeros_like(new_updates), new_updates), new_state

    return optax.GradientTransformationExtraArgs(init, update)


def _moved(running: Running, value: jax.Array, window: jax.Array) -> Running:
    """West's update of an exponentially weighted mean and variance, with weight 1 / window."""
    difference = value - running.mean
    mean = running.mean + difference / window
    variance = (1 - 1 / window) * (running.variance + difference**2 / window)
    return Running(mean, variance)


def _is_spike(value: jax.Array, running: Running, sigmas: float) -> jax.Array:
    if not sigmas:
        return jnp.zeros((), bool)
    # A hundredth of the mean is no spike, however calm the steps before were.
    deviation = jnp.maximum(jnp.sqrt(running.variance), 0.01 * jnp.abs(running.mean))
    return value > running.mean + sigmas * deviation


class MasterState(NamedTuple):
    """State of `master_weights`: the params in full precision, and the inner state."""

    master: Any
    inner: Any


def master_weights(
    inner: optax.GradientTransformation, dtype: jax.typing.DTypeLike
) -> optax.GradientTransformationExtraArgs:
    """Let the inner transformation work on a copy of the params of another dtype.

    Small updates add up in the copy that rounding would lose in, say, bfloat16 params, which are
    always the copy rounded. Gradients are cast to `dtype` too.
    """
    inner = optax.with_extra_args_support(inner)

    def init(params: optax.Params) -> MasterState:
        master = optax.tree.cast(params, dtype)
        return MasterState(master, inner.init(master))

    def update(
        updates: optax.Updates, state: MasterState, params: optax.Params, **extra: Any
    ) -> tuple[optax.Updates, MasterState]:
        updates = optax.tree.cast(updates, dtype)
        if "grad" in extra:
            extra["grad"] = optax.tree.cast(extra["grad"], dtype)
        updates, inner_state = inner.update(updates, state.inner, state.master, **extra)
        master = optax.apply_updates(state.master, updates)
        # `apply_updates` adds in this dtype and rounds to the params' own.
        change = jax.tree.map(lambda m, p: m - p.astype(dtype), master, params)
        return change, MasterState(master, inner_state)

    return optax.GradientTransformationExtraArgs(init, update)


class AverageState(NamedTuple):
    """State of `average_params`: the average, float32, and the inner state."""

    average: Any
    inner: Any


def average_params(
    inner: optax.GradientTransformation, decay: float
) -> optax.GradientTransformationExtraArgs:
    """Keep average = decay * average + (1 - decay) * params, from the first params on."""
    inner = optax.with_extra_args_support(inner)

    def init(params: optax.Params) -> AverageState:
        # A copy even where the dtype is float32 already: donated buffers must not be shared.
        return AverageState(
            jax.tree.map(lambda p: jnp.array(p, jnp.float32, copy=True), params), inner.init(params)
        )

    def update(
        updates: optax.Updates, state: AverageState, params: optax.Params, **extra: Any
    ) -> tuple[optax.Updates, AverageState]:
        updates, inner_state = inner.update(updates, state.inner, params, **extra)
        average = jax.tree.map(
            lambda a, p: decay * a + (1 - decay) * p.astype(jnp.float32),
            state.average,
            optax.apply_updates(params, updates),
        )
        return updates, AverageState(average, inner_state)

    return optax.GradientTransformationExtraArgs(init, update)


def find_state(opt_state: Any, kind: type) -> Any:
    """The first part of an optimizer's state that is of this type; None when there is none."""
    parts = jax.tree.leaves(opt_state, is_leaf=lambda part: isinstance(part, kind))
    return next((part for part in parts if isinstance(part, kind)), None)


# What keeps the params that `config.eval.params` may ask for besides the trained ones.
_KEPT_BY = {
    "ema": "config.optimizer.ema_decay",
    "schedule_free": "a schedule_free transformation in config.optimizer.chain",
    "lookahead": "lookahead in config.optimizer.chain",
}


def eval_params(which: str, params: optax.Params, opt_state: Any) -> optax.Params:
    """The params to evaluate with, of the structure and dtypes of `params`.

    Args:
      which: as in `config.eval.params`.
      params: the trained ones.
      opt_state: the optimizer's state.

    Raises:
      ConfigError: the optimizer keeps no such params.
    """
    if which == "params":
        return params
    kind = {
        "ema": AverageState,
        "schedule_free": contrib.ScheduleFreeState,
        "lookahead": SlowState,
    }[which]
    state = find_state(opt_state, kind)
    if state is None:
        raise ConfigError("config.eval.params", f"nothing keeps them; {_KEPT_BY[which]}", which)
    if which == "ema":
        found = state.average
    elif which == "lookahead":
        found = state.slow
    else:
        found = contrib.schedule_free_eval_params(state, params)
    return jax.tree.map(lambda new, old: new.astype(old.dtype), found, params)
