"""The boundary where ConfigDicts become frozen dataclasses.

`build` checks names and types against the dataclass's annotations; the dataclass's own
`__post_init__` checks the rules, raising ConfigError with the field's short name.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

from launch.errors import ConfigError, closest

T = TypeVar("T")


def plain(values: Any) -> Any:
    """ConfigDicts (with references resolved) and lists as plain dicts and tuples, recursively."""
    if hasattr(values, "to_dict"):
        values = values.to_dict()
    if isinstance(values, Mapping):
        return {str(key): plain(value) for key, value in values.items()}
    if isinstance(values, (list, tuple)):
        return tuple(plain(value) for value in values)
    return values


def build(cls: type[T], values: Any, where: str = "") -> T:
    """Make a frozen dataclass from a mapping (a ConfigDict, say).

    Args:
      cls: a dataclass whose annotations are int, float, bool, str, Mapping, Any, `X | None`,
        `tuple[X, ...]` or another such dataclass.
      values: the mapping; a missing key takes the field's default.
      where: dotted prefix of the fields in messages, e.g. `config.mesh`.

    Raises:
      ConfigError: unknown key (with the closest match), missing key, wrong type, broken rule.
    """
    values = plain(values)
    if not isinstance(values, dict):
        names = ", ".join(field.name for field in dataclasses.fields(cls) if field.init)  # type: ignore[arg-type]
        raise ConfigError(where, f"must be a section with fields of {names}", values)
    hints = typing.get_type_hints(cls)
    known = {field.name: field for field in dataclasses.fields(cls) if field.init}  # type: ignore[arg-type]
    for key in values:
        if key not in known:
            name = f"{where}.{key}" if where else key
            raise ConfigError(name, f"no such field; {closest(key, known)}")
    kwargs = {}
    for name, field in known.items():
        full = f"{where}.{name}" if where else name
        if name in values:
            kwargs[name] = _convert(hints[name], values[name], full)
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise ConfigError(full, "missing; the config must set it")
    try:
        return cls(**kwargs)
    except ConfigError as error:
        raise (error.below(where) if where else error) from None


def _convert(hint: Any, value: Any, where: str) -> Any:
    """Check one value against one annotation; int becomes float where a float is wanted."""
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        options = typing.get_args(hint)
        if value is None and type(None) in options:
            return None
        rest = [option for option in options if option is not type(None)]
        return _convert(rest[0], value, where)
    if dataclasses.is_dataclass(hint):
        return build(hint, value, where)  # type: ignore[arg-type]
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if origin is tuple:
        if not isinstance(value, tuple):
            raise ConfigError(where, "must be a tuple", value)
        return tuple(_convert(typing.get_args(hint)[0], item, where) for item in value)
    wanted = origin or hint
    if wanted is Any:
        return value
    wrong_bool = isinstance(value, bool) and wanted is not bool
    if wrong_bool or not isinstance(value, wanted):
        name = "a section" if wanted not in (int, float, bool, str) else wanted.__name__
        raise ConfigError(where, f"must be {name}, is {type(value).__name__}", value)
    return value


def require(ok: bool, field: str, value: object, rule: str) -> None:
    """Raise ConfigError for `field` unless `ok`."""
    if not ok:
        raise ConfigError(field, rule, value)
