"""Names in a config resolved in Optax, and called with every mistake told in one line."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Callable, Mapping
from typing import Any

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

_IMPORT_PATH = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


def function_of(entry: str) -> str:
    """The name in `NAME` or `NAME@LABEL`."""
    return entry.partition("@")[0]


def find_transformation(field: str, name: str) -> Callable[..., Any]:
    """The function of `optax` or `optax.contrib` with this name.

    Raises:
      ConfigError: there is none (with the closest match), or it is one of REFUSED.
    """
    if name in REFUSED:
        raise ConfigError(field, f"optax.{name} cannot be used here: {REFUSED[name]}", name)
    for module in (optax, contrib):
        found = getattr(module, name, None)
        if not name.startswith("_") and (inspect.isfunction(found) or found is optax.MultiSteps):
            return found
    known = [
        key
        for module in (optax, contrib)
        for key, value in vars(module).items()
        if inspect.isfunction(value) and not key.startswith("_") and not is_schedule(key)
    ]
    raise ConfigError(field, f"Optax has no {name!r}; {closest(name, known, most=8)}")


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
        raise ConfigError(field, f"Optax has no such schedule; {closest(name, known)}")
    return getattr(optax.schedules, name)


def is_import_path(value: Any) -> bool:
    """Whether a value is written `package.module:function`."""
    return isinstance(value, str) and _IMPORT_PATH.fullmatch(value) is not None


def import_function(field: str, path: str) -> Callable[..., Any]:
    """Import `package.module:function`.

    Raises:
      ConfigError: no such module or function.
    """
    module_name, name = path.split(":")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise ConfigError(field, f"no module {error.name!r}; is it on PYTHONPATH?", path) from None
    found = getattr(module, name, None)
    if not callable(found):
        known = [key for key, value in vars(module).items() if inspect.isfunction(value)]
        rule = f"{module_name} has no function {name!r}; {closest(name, known)}"
        raise ConfigError(field, rule, path)
    return found


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
        what = " ".join(f"{type(error).__name__}: {error}".split())
        raise ConfigError(field, f"Optax refuses it: {what}") from error
