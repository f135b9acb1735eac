"""Schedules by Optax's names, and the mistakes in them that Optax lets pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeGuard

import jax
import jax.numpy as jnp
import numpy as np
import optax

from launch.spec import ConfigError
from trainer.import_path import import_path
from trainer.optax_names import (
    call,
    check_names,
    check_values,
    find_schedule,
    function_of,
    is_import_path,
)

Schedule = Callable[[Any], Any]  # Count of updates before a step -> value.


def _own(arguments: Any) -> bool:
    """Whether a schedule is somebody's own, `function` being the import path of what makes it."""
    return isinstance(arguments, Mapping) and is_import_path(arguments.get("function"))


def make_schedule(field: str, section: Mapping[str, Any]) -> Schedule:
    """A section with one entry, a schedule's name with its arguments, as that schedule.

    Raises:
      ConfigError: no such schedule or argument, or one that cannot mean what it says.
    """
    if len(section) != 1:
        rule = "must have one entry, a schedule's name with its arguments"
        raise ConfigError(field, f"{rule}; has {', '.join(sorted(section)) or 'none'}")
    ((name, arguments),) = section.items()
    return _named(f"{field}.{name}", name, arguments)


def _named(field: str, entry: str, arguments: Any) -> Schedule:
    name = function_of(entry)
    if _own(arguments):
        function = import_path(f"{field}.function", arguments["function"], callable, "function")
        arguments = {key: value for key, value in arguments.items() if key != "function"}
    else:
        function = find_schedule(field, name)
    if not isinstance(arguments, Mapping):
        raise ConfigError(field, f"must be a section with the arguments of {name}", arguments)
    if function is optax.join_schedules:
        arguments = _joined(field, arguments)
    else:
        check_values(field, function, arguments)
        _check_steps(field, arguments)
        arguments = {key: _int_keys(f"{field}.{key}", value) for key, value in arguments.items()}
    return call(field, function, arguments)


def _joined(field: str, section: Mapping[str, Any]) -> dict[str, Any]:
    """`schedules` holds names; each has its arguments in a section of that name beside it."""
    names = section.get("schedules", ())
    rule = "must be a tuple of names, each with a section beside it"
    check_names(f"{field}.schedules", names, rule)
    rest = {k: v for k, v in section.items() if k != "schedules" and k not in names}
    boundaries = rest.get("boundaries", ())
    wanted = len(names) - 1
    right = isinstance(boundaries, tuple) and all(map(_number, boundaries))
    if not right or len(boundaries) != wanted:
        rule = f"must be a tuple of {wanted} step(s), where each of the {len(names)} schedules but"
        raise ConfigError(f"{field}.boundaries", f"{rule} the first begins", boundaries)
    starts = (0, *boundaries)
    for before, after in zip(starts, boundaries, strict=False):
        if after <= before:
            raise ConfigError(f"{field}.boundaries", "must grow, from above 0", boundaries)
    for name, start, end in zip(names, starts, boundaries, strict=False):
        length = _length(section.get(name, {}))
        if length is not None and length > end - start:
            rule = f"takes {length} steps, but its part is over after {end - start} (boundaries)"
            raise ConfigError(f"{field}.{name}", rule)
    schedules = [_named(f"{field}.{name}", name, section.get(name, {})) for name in names]
    return {**rest, "schedules": schedules}


def _check_steps(field: str, arguments: Mapping[str, Any]) -> None:
    """Refuse what Optax takes and turns into something else."""
    decay, warmup = arguments.get("decay_steps"), arguments.get("warmup_steps")
    if _number(decay) and _number(warmup) and decay <= warmup:
        rule = f"must be more than warmup_steps={warmup}: it counts the warm-up too"
        raise ConfigError(f"{field}.decay_steps", f"{rule}; use {decay + warmup}?", decay)
    for name in ("decay_steps", "transition_steps"):
        steps = arguments.get(name)
        if _number(steps) and steps <= 0:
            raise ConfigError(f"{field}.{name}", "must be at least 1: nothing would move", steps)
    for name in ("warmup_steps", "transition_begin"):
        steps = arguments.get(name)
        if _number(steps) and steps < 0:
            raise ConfigError(f"{field}.{name}", "must be at least 0", steps)
    start, final = arguments.get("pct_start", 0.3), arguments.get("pct_final", 0.85)
    for name, share in (("pct_start", start), ("pct_final", final)):
        if _number(share) and not 0 < share <= 1:
            raise ConfigError(f"{field}.{name}", "a share of the steps, must be in (0, 1]", share)


def _length(arguments: Any) -> float | None:
    """Steps until a schedule has come to its end, where its arguments tell."""
    if not isinstance(arguments, Mapping):
        return None
    steps = arguments.get("decay_steps", arguments.get("transition_steps"))
    return steps + arguments.get("transition_begin", 0) if _number(steps) else None


def _number(value: Any) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _int_keys(field: str, value: Any) -> Any:
    """{'100': 0.1} as {100: 0.1}: a config's keys are text, `boundaries_and_scales` has steps."""
    if not isinstance(value, Mapping):
        return value
    for key in value:
        if not str(key).isdigit():
            raise ConfigError(field, f"its keys must be steps, {key!r} is none", value)
    return {int(key): item for key, item in value.items()}


def remarks(schedules: Sequence[tuple[str, Schedule]], num_steps: int) -> list[str]:
    """Lines about decays that end far from `num_steps`. Computes; not before JAX is set up."""
    lines = []
    for field, schedule in schedules:
        values_at = _compiled(schedule)
        end = _end_of_decay(values_at, num_steps)
        if end is None or 0.9 * num_steps <= end <= 1.1 * num_steps:
            continue
        at_end = f"{values_at(np.full(_POINTS, num_steps - 1))[0]:.3g}"
        if end < num_steps:
            told = f"has decayed by step {end}, and stays at {at_end} until num_steps={num_steps}"
        else:
            told = f"decays until step {end}, but is cut at num_steps={num_steps}, at {at_end}"
        lines.append(f"warning: {field} {told}")
    return lines


_POINTS = 512  # Counts per call: one shape is one program, and op by op takes most of a second.


def _compiled(schedule: Schedule) -> Callable[[np.ndarray], np.ndarray]:
    """The schedule as a function of [_POINTS] counts to float64 values."""
    compiled = jax.jit(jax.vmap(schedule))

    def values_at(counts: np.ndarray) -> np.ndarray:
        values = compiled(jnp.asarray(counts.astype(np.int32)))
        return np.asarray(values, np.float64)

    return values_at


def _end_of_decay(values_at: Callable[[np.ndarray], np.ndarray], num_steps: int) -> int | None:
    """The step from which a falling schedule is constant; None for one that does not end so.

    A staircase has no end of this kind, and neither has one that falls for ever. In runs of more
    than some ten thousand steps it is found to within a 5,000th of them.
    """
    # Where it is still moving at 20 times the run, it is not meant to end.
    counts = np.concatenate([np.linspace(0, m * num_steps, _POINTS // 2) for m in (1, 20)])
    counts = np.sort(counts.astype(np.int64))
    values = values_at(counts)
    moving = np.flatnonzero(values[1:] != values[:-1])
    if len(moving) == 0 or moving[-1] == _POINTS - 2 or len(np.unique(values)) < 12:
        return None
    last = int(moving[-1])
    if values[last] < values[last + 1]:
        return None  # It ends with a rise: a warm-up.
    counts = np.linspace(counts[last], counts[last + 1], _POINTS).astype(np.int64)
    return int(counts[np.flatnonzero(values_at(counts) == values[-1])[0]])
