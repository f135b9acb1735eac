"""Learning rate schedules as sections of a config, in the grammar of docs/optimizer.md.

    config.optimizer.adamw.learning_rate = schedules.warmup_cosine(1e-3, num_steps=1000)

Of every schedule:
    peak          the highest rate, reached after `warmup_steps`
    num_steps     updates in all, when `end` is reached
    warmup_steps  updates with a linearly growing rate; None for a tenth of `num_steps`
    end           the last rate, which is kept
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ml_collections import ConfigDict

from launch.spec import ConfigError, closest


def warmup_cosine(
    peak: float, num_steps: int, warmup_steps: int | None = None, end: float = 0.0
) -> ConfigDict:
    """Linearly from 0 to `peak`, then half a cosine down to `end`."""
    arguments = ConfigDict({"init_value": 0.0, "peak_value": peak, "end_value": end})
    arguments.warmup_steps = _tenth(num_steps) if warmup_steps is None else warmup_steps
    arguments.decay_steps = num_steps  # Optax counts the warm-up too.
    return ConfigDict({"warmup_cosine_decay_schedule": arguments})


def warmup_stable_decay(
    peak: float,
    num_steps: int,
    warmup_steps: int | None = None,
    decay_steps: int | None = None,
    end: float = 0.0,
) -> ConfigDict:
    """Linearly from 0 to `peak`, there for most of the run, and linearly down to `end` at last.

    The decay takes the last `decay_steps`, by default a fifth of all. Where to stop need not be
    known before it begins: what comes before is the same for every `num_steps`.
    """
    warmup_steps = _tenth(num_steps) if warmup_steps is None else warmup_steps
    decay_steps = 2 * _tenth(num_steps) if decay_steps is None else decay_steps
    up = {"init_value": 0.0, "end_value": peak, "transition_steps": warmup_steps}
    down = {"init_value": peak, "end_value": end, "transition_steps": decay_steps}
    joined = ConfigDict()
    joined.schedules = ("linear_schedule@warmup", "constant_schedule", "linear_schedule@decay")
    joined["linear_schedule@warmup"] = ConfigDict(up)
    joined["constant_schedule"] = ConfigDict({"value": peak})
    joined["linear_schedule@decay"] = ConfigDict(down)
    joined.boundaries = (warmup_steps, num_steps - decay_steps)
    return ConfigDict({"join_schedules": joined})


def inverse_sqrt(peak: float, num_steps: int, warmup_steps: int | None = None) -> ConfigDict:
    """Linearly from 0 to `peak`, then as 1 / sqrt(step): whatever `num_steps`."""
    warmup_steps = _tenth(num_steps) if warmup_steps is None else warmup_steps
    arguments = ConfigDict({"peak_value": peak, "warmup_steps": warmup_steps})
    arguments.function = "configs.schedules:inverse_sqrt_schedule"  # Optax 0.2.8 has none.
    return ConfigDict({"inverse_sqrt": arguments})


def one_cycle(peak: float, num_steps: int) -> ConfigDict:
    """From `peak` / 25 up to `peak` in three tenths of the steps, then down to `peak` / 250,000.

    Both along half a cosine: the shape of PyTorch's OneCycleLR.
    """
    arguments = {"transition_steps": num_steps, "peak_value": peak}
    return ConfigDict({"cosine_onecycle_schedule": ConfigDict(arguments)})


def inverse_sqrt_schedule(peak_value: float, warmup_steps: int) -> Callable[[Any], Any]:
    """The schedule itself, which Optax 0.2.8 does not have. Computes with jax.

    Args:
      peak_value: reached after `warmup_steps`, at least 1.
      warmup_steps: linear, from 0; then the rate is peak_value * sqrt(warmup_steps / step).
    """
    if warmup_steps < 1:
        rule = "must be at least 1: the rate falls as sqrt(warmup_steps / step)"
        raise ConfigError("warmup_steps", rule, warmup_steps)

    def schedule(count: Any) -> Any:
        import jax.numpy as jnp  # Here: the launcher reads configs too, and has no jax.

        rising = count / warmup_steps
        falling = jnp.sqrt(warmup_steps / jnp.maximum(count, 1))
        return peak_value * jnp.minimum(rising, falling)

    return schedule


def by_name(name: str, peak: float, num_steps: int) -> ConfigDict:
    """One of this file's schedules, with the defaults of its other arguments.

    Raises:
      ConfigError: no such schedule.
    """
    known = {
        make.__name__: make
        for make in (warmup_cosine, warmup_stable_decay, inverse_sqrt, one_cycle)
    }
    if name not in known:
        rule = f"configs/schedules.py has no such schedule; {closest(name, known)}"
        raise ConfigError("config", rule, name)
    return known[name](peak, num_steps)


def _tenth(num_steps: int) -> int:
    return max(1, num_steps // 10)
