"""A config's `optimizer` section as an Optax transformation, by Optax's own names.

`optimizer.chain` lists transformations in the order they are applied, and `optimizer.NAME` holds
the keyword arguments of `optax.NAME`. Where an argument is a section with one entry, the entry
names a schedule of Optax: `learning_rate.warmup_cosine_decay_schedule.peak_value`.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import optax
from optax import contrib

from launch.spec import ConfigError, closest

FIELD = "config.optimizer"


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """An Optax transformation and what is worth showing of it.

    Attributes:
      tx: the chain.
      learning_rate: step -> learning rate of the first transformation that takes one; None when
        none does.
    """

    tx: optax.GradientTransformation
    learning_rate: Callable[[int], float] | None


def make_optimizer(config: Mapping[str, Any]) -> Optimizer:
    """Build the chain.

    Args:
      config: `chain`, a tuple of names, and one section of arguments per name that needs any.

    Raises:
      ConfigError: an unknown name or argument (with the closest match), a missing argument, a
        section that the chain does not use, or what Optax itself refuses.
    """
    chain = config.get("chain", ())
    if not isinstance(chain, tuple) or not chain:
        raise ConfigError(
            f"{FIELD}.chain", "must be a tuple of Optax names, e.g. ('adamw',)", chain
        )
    functions = {name: _lookup(name) for name in chain}
    for name in config:
        if name != "chain" and name not in chain:
            raise ConfigError(f"{FIELD}.{name}", f"not in the chain; {closest(name, chain)}")
    transformations: list[optax.GradientTransformation] = []
    learning_rate = None
    for name in chain:
        arguments = {
            key: _maybe_schedule(f"{FIELD}.{name}.{key}", value)
            for key, value in config.get(name, {}).items()
        }
        made = _call(f"{FIELD}.{name}", functions[name], arguments)
        if not isinstance(made, optax.GradientTransformation):
            raise ConfigError(f"{FIELD}.chain", f"optax.{name} does not make a transformation")
        transformations.append(made)
        if learning_rate is None and "learning_rate" in arguments:
            learning_rate = _as_schedule(arguments["learning_rate"])
    return Optimizer(optax.chain(*transformations), learning_rate)


def _lookup(name: str) -> Callable[..., optax.GradientTransformation]:
    for module in (optax, contrib):
        found = getattr(module, name, None)
        if inspect.isfunction(found) and not name.startswith("_"):
            return found
    known = [key for module in (optax, contrib) for key in vars(module) if not key.startswith("_")]
    raise ConfigError(f"{FIELD}.chain", f"Optax has no {name!r}; {closest(name, known)}")


def _maybe_schedule(field: str, value: Any) -> Any:
    """A section with one entry that names a schedule becomes that schedule."""
    if not isinstance(value, Mapping):
        return value
    if len(value) != 1:
        raise ConfigError(
            field, f"must be one schedule of Optax with its arguments; has {sorted(value)}"
        )
    ((name, arguments),) = value.items()
    schedule = getattr(optax, name, None)
    if not inspect.isfunction(schedule) or not name.endswith("schedule"):
        known = [key for key in vars(optax) if key.endswith("schedule")]
        raise ConfigError(f"{field}.{name}", f"Optax has no such schedule; {closest(name, known)}")
    return _call(f"{field}.{name}", schedule, arguments)


def _call(field: str, function: Callable[..., Any], arguments: Mapping[str, Any]) -> Any:
    """Call with keyword arguments, telling the user's mistakes from each other."""
    known = inspect.signature(function).parameters
    for name in arguments:
        if name not in known:
            raise ConfigError(f"{field}.{name}", f"no such argument; {closest(name, known)}")
    missing = [
        name
        for name, parameter in known.items()
        if parameter.default is parameter.empty
        and parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
        and name not in arguments
    ]
    if missing:
        raise ConfigError(f"{field}.{missing[0]}", "missing; the config must set it")
    try:
        result = function(**arguments)
    except (TypeError, ValueError) as error:
        raise ConfigError(field, f"Optax refuses it: {error}") from None
    return result


def _as_schedule(value: Any) -> Callable[[int], float]:
    return value if callable(value) else lambda step: value
