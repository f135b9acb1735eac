"""Names in a config resolved in Optax, and called with every mistake told in one line."""

from __future__ import annotations

import collections.abc
import inspect
import re
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any, TypeGuard

import jax
import jax.numpy as jnp
import numpy as np
import optax
from optax import contrib

from launch.spec import ConfigError, closest

# Gradient transformations that a config cannot ask for, and why.
_EACH = "it needs the gradient of every single example, and the trainer has that of the batch"
_CHAIN = "write a section with a `chain` where a transformation is wanted"
REFUSED = {
    "chain": _CHAIN,
    "named_chain": _CHAIN,
    "differentially_private_aggregate": _EACH,
    "dpsgd": _EACH,
    "monitor": "its state has another structure after the first update than before, which no "
    "compiled step can take; `snapshot` keeps one measurement",
    "measure_with_ema": "it turns the updates into measurements, which is for `monitor` alone",
}

# What the annotation of an argument has that is a number.
_NUMBERS = {int, float, complex, bool, type(None), jax.Array, np.ndarray, np.bool, np.number}
_A_SCHEDULE = "e.g. {'cosine_decay_schedule': {'init_value': 1e-3, 'decay_steps': 1000}}"

_IMPORT_PATH = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


def function_of(entry: str) -> str:
    """The name in `NAME` or `NAME@LABEL`."""
    return entry.partition("@")[0]


def check_names(field: str, names: Any, rule: str) -> None:
    """Refuse what is no tuple of names, or has one twice.

    Raises:
      ConfigError: `rule`, or how to give the second one a label.
    """
    if not isinstance(names, tuple) or not names or not all(isinstance(n, str) for n in names):
        raise ConfigError(field, rule, names)
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice:
        label = f"{function_of(twice)}@last"
        rule = f"{twice!r} comes twice; call one {label!r}, say, and its section too"
        raise ConfigError(field, rule, names)


def find_transformation(field: str, name: str) -> Callable[..., Any]:
    """The function of `optax` or `optax.contrib` with this name.

    Raises:
      ConfigError: there is none (with the closest match), or it is one of REFUSED.
    """
    if name in REFUSED:
        raise ConfigError(field, f"optax.{name} cannot be used here: {REFUSED[name]}", name)
    for module in (optax, contrib):
        found = getattr(module, name, None)
        if not name.startswith("_") and (found is optax.MultiSteps or _may_make(found)):
            return found
    known = [
        key
        for module in (optax, contrib)
        for key, value in vars(module).items()
        if not key.startswith("_") and key not in REFUSED and _may_make(value, certain=True)
    ]
    guess = closest(name, known, most=8)
    if inspect.isfunction(getattr(optax, name, None)):
        raise ConfigError(field, f"optax.{name} makes no gradient transformation; {guess}")
    raise ConfigError(field, f"Optax has no {name!r}; {guess}")


def _may_make(found: Any, certain: bool = False) -> TypeGuard[Callable[..., Any]]:
    """Whether something is a function that makes a transformation, by what it says it returns."""
    if not inspect.isfunction(found):
        return False
    returned = inspect.signature(found).return_annotation
    if returned is inspect.Signature.empty:
        return not certain
    return "GradientTransformation" in str(returned)


def is_schedule(name: str) -> bool:
    """Whether Optax has a function of this name that makes a schedule."""
    made = inspect.isfunction(getattr(optax.schedules, name, None))
    return made and not name.startswith(("_", "inject_"))


def find_schedule(field: str, name: str) -> Callable[..., Any]:
    """Optax's function of this name that makes a schedule.

    Raises:
      ConfigError: there is none, with the closest match.
    """
    if not is_schedule(name):
        known = [key for key in vars(optax.schedules) if is_schedule(key)]
        raise ConfigError(field, f"Optax has no such schedule; {closest(name, known, most=6)}")
    return getattr(optax.schedules, name)


def is_import_path(value: Any) -> bool:
    """Whether a value is written `package.module:function`."""
    return isinstance(value, str) and _IMPORT_PATH.fullmatch(value) is not None


def bound(field: str, function: Callable[..., Any], arguments: Mapping[str, Any]) -> dict[str, Any]:
    """All arguments of a call, defaults included.

    Raises:
      ConfigError: an argument is unknown (with the closest match and those there are) or missing.
    """
    name = getattr(function, "__name__", str(function))
    known = {
        key: parameter
        for key, parameter in inspect.signature(function).parameters.items()
        if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
    }
    takes = f"{name} takes {', '.join(known) or 'no arguments'}"
    for key in arguments:
        if key not in known:
            guess = closest(key, known)
            guess = f"{guess} " if guess.startswith("did you mean") else ""
            raise ConfigError(f"{field}.{key}", f"no such argument; {guess}{takes}")
    for key, parameter in known.items():
        if parameter.default is parameter.empty and key not in arguments:
            raise ConfigError(f"{field}.{key}", f"missing, and it has no default; {takes}")
    defaults = {key: parameter.default for key, parameter in known.items()}
    return {**defaults, **arguments}


def check_values(
    field: str, function: Callable[..., Any], arguments: Mapping[str, Any], scheduled: bool = False
) -> None:
    """Refuse values of a kind that an argument cannot have, as its annotation says.

    Without it they would fail somewhere in a trace, where nobody knows the argument any more.

    Args:
      field: of the config.
      function: takes the arguments.
      arguments: as in the config.
      scheduled: whether every number may be a schedule instead.

    Raises:
      ConfigError: text where a number belongs, a dtype that is none, a section where there is to be
        a number, or something else where there is to be a transformation.
    """
    for key, parameter in inspect.signature(function).parameters.items():
        if key in arguments and (wrong := _what_is_wrong(parameter, arguments[key], scheduled)):
            raise ConfigError(f"{field}.{key}", wrong, arguments[key])


def _what_is_wrong(parameter: inspect.Parameter, value: Any, scheduled: bool) -> str:
    """What an argument must be, when it is not that; "" when nothing can be said against it."""
    if parameter.name.endswith("dtype") and isinstance(value, str):
        return "" if is_dtype(value) else "not a dtype; e.g. 'float32' or 'bfloat16'"
    union = typing.get_origin(parameter.annotation) in (typing.Union, types.UnionType)
    kinds = typing.get_args(parameter.annotation) if union else (parameter.annotation,)
    if optax.GradientTransformation in kinds:
        if isinstance(value, Mapping) and "chain" in value:
            return ""
        may_be_none = type(None) in kinds and value is None
        return "" if may_be_none else "must be a section with a `chain`, e.g. {'chain': ('adam',)}"
    if kinds == (bool,):
        return "must be True or False" if isinstance(value, str) else ""
    callables = [kind for kind in kinds if typing.get_origin(kind) is collections.abc.Callable]
    if not {int, float} & set(kinds) or not set(kinds) - set(callables) <= _NUMBERS:
        return ""  # Not of numbers alone.
    if callables or scheduled:
        wrong = isinstance(value, (str, tuple)) and not is_import_path(value)
        wrong |= value is None and type(None) not in kinds and parameter.default is not None
        return f"must be a number or a schedule, {_A_SCHEDULE}" if wrong else ""
    if isinstance(value, Mapping):
        return "must be a number; with inject_hyperparams around it, it can be a schedule"
    return "must be a number" if isinstance(value, (str, tuple)) else ""


def is_dtype(name: Any) -> bool:
    """Whether this names a dtype."""
    try:
        jnp.dtype(name)
    except TypeError:
        return False
    return True


def call(field: str, function: Callable[..., Any], arguments: Mapping[str, Any]) -> Any:
    """Call with keyword arguments, telling the user's mistakes from each other.

    Raises:
      ConfigError: an argument is unknown, missing, or of a value that Optax refuses.
    """
    bound(field, function, arguments)
    try:
        return function(**arguments)
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(field, f"Optax refuses it: {in_a_line(error)}") from error


def in_a_line(error: BaseException, limit: int = 200) -> str:
    """An error's kind and text in one line, its beginning where it is long."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text if len(text) <= limit else text[: limit - 3] + "..."
