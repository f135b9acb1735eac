"""Overrides: `--config.a.b=V` sets a field of a config on the command line.

A field must be in the file or be one that every config has (`launch.spec.job` and `.cluster`); its
type says how the value is read, by ml_collections. Two sections are open to any field:
`cluster.env`, which holds strings, and everything below `config.optimizer`, which holds the
arguments of functions that only the trainer knows. There a value is a Python literal, of any type
whatever the file has in its place.

The launcher hands its overrides on to the trainer, which applies them anew: what a config becomes
depends on the file and on the overrides in their order, and on nothing else.
"""

from __future__ import annotations

import ast
import dataclasses
import json
import re
import typing
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from launch.errors import ConfigError, closest
from launch.spec.cluster import Cluster
from launch.spec.job import TrainSpec

STRINGS = "cluster.env"
LITERALS = "config.optimizer"

_WORDS = {"true": True, "false": False, "none": None}


def is_override(flag: str, arg: str) -> bool:
    """Whether an argument overrides a field of the config that `--<flag>` names."""
    return _prefix(flag).match(arg) is not None


def apply_overrides(flag: str, config: Any, argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Set the fields that the command line overrides, in its order.

    Args:
      flag: the flag's name without dashes, `config` or `cluster`.
      config: the ConfigDict, changed in place.
      argv: arguments without the program's name; what follows `--` is left alone.

    Returns:
      The overrides, each written `--config.a.b=V`, and the other arguments; both in order.

    Raises:
      ConfigError: no such field, or a value that it cannot have.
    """
    overrides: list[str] = []
    rest: list[str] = []
    arguments = list(argv)
    while arguments:
        arg = arguments.pop(0)
        if arg == "--":
            rest += [arg, *arguments]
            break
        match = _prefix(flag).match(arg)
        if not match:
            rest.append(arg)
            continue
        field, equals, value = arg[match.end() :].partition("=")
        name = f"{flag}.{field}"
        kind = _type(config, name)
        if match.group(1):  # --noconfig.field
            if equals or kind is not bool:
                raise ConfigError(name, f"{arg}: only a bool can be turned off so")
            equals, value = "=", "false"
        elif not equals and kind is bool:
            equals, value = "=", "true"
        elif not equals:
            if not arguments or arguments[0].startswith("--"):
                raise ConfigError(name, f"needs a value; write {arg}=VALUE")
            value = arguments.pop(0)
        below = next((o for o in overrides if o.startswith(f"--{name}.")), None)
        if below:
            raise ConfigError(name, f"would undo {below} before it; swap the two")
        if _is_open(name):
            _set_literal(config, name, value, overrides)
        else:
            same = [o for o in overrides if o.startswith(f"--{name}=")]
            _set_typed(config, name, value, same)
        overrides.append(f"--{name}={value}")
    return overrides, rest


def _prefix(flag: str) -> re.Pattern[str]:
    return re.compile(rf"--?(no)?{flag}\.")


def _is_open(name: str) -> bool:
    return name == LITERALS or name.startswith(f"{LITERALS}.")


def _type(config: Any, name: str) -> type | None:
    """The type of a field; None where it has none yet, or only the library can tell (`a[0]`).

    Adds what is missing: a string in `cluster.env`, the default of a field that every config has.

    Raises:
      ConfigError: no such field, or one whose type the file does not say.
    """
    from ml_collections import config_dict

    done, *parts = name.split(".")
    node, kind = config, None
    for part in parts:
        if "[" in part and not _is_open(name):
            return None
        if not isinstance(node, config_dict.ConfigDict):
            if _is_open(name):
                return None
            rule = f"no such field; {done} is of type {type(node).__name__} and has none"
            raise ConfigError(name, rule)
        if part not in node:
            if _is_open(f"{done}.{part}"):
                return None
            known = {} if done == STRINGS else _known_fields(done)
            if done != STRINGS and part not in known:
                raise ConfigError(name, f"no such field; {closest(part, {*node, *known})}")
            with node.unlocked():
                node[part] = known.get(part, "")
        kind = node.get_type(part)
        node = node[part]
        done += f".{part}"
    if kind is type(None) and not _is_open(name):
        raise ConfigError(
            name,
            "is None in the file, so its type is not known; write it there as "
            "config_dict.placeholder(TYPE)",
        )
    return kind


def _known_fields(section: str) -> dict[str, Any]:
    """The fields that `config`, `config.mesh` or another section always has, with their defaults.

    As a ConfigDict holds them: an empty section, or a placeholder that knows its type.
    """
    from ml_collections import config_dict

    flag, *parts = section.split(".")
    kind: Any = {"config": TrainSpec, "cluster": Cluster}[flag]
    for part in parts:
        kind = typing.get_type_hints(kind).get(part) if dataclasses.is_dataclass(kind) else None
    if not dataclasses.is_dataclass(kind):
        return {}
    hints = typing.get_type_hints(kind)
    found: dict[str, Any] = {}
    for field in dataclasses.fields(kind):
        hint = hints[field.name]
        if dataclasses.is_dataclass(hint) or typing.get_origin(hint) is Mapping:
            found[field.name] = config_dict.ConfigDict()
        elif field.default is None:
            found[field.name] = config_dict.placeholder(typing.get_args(hint)[0])
        elif field.default is not dataclasses.MISSING:
            found[field.name] = field.default
    return found


def _set_literal(config: Any, name: str, value: str, earlier: Sequence[str]) -> None:
    """Set a field of the open section, making the sections on the way to it.

    Args:
      config: the ConfigDict.
      name: of the field, `config.optimizer.adamw.b2`.
      value: a Python literal; whatever is none, is a string.
      earlier: the overrides before this one, none of which it may undo.
    """
    from ml_collections import config_dict

    done, *parts = name.split(".")
    for part in parts:
        if not re.fullmatch(r"[\w@-]+", part):
            rule = f"{part!r} cannot be a field; names have letters, digits, _, - and @"
            raise ConfigError(name, rule)
    node = config
    for part in parts[:-1]:
        done += f".{part}"
        key = _key(node, part)
        if not isinstance(node.get(key), config_dict.ConfigDict):
            undone = next((o for o in earlier if o.startswith(f"--{done}=")), None)
            if undone:
                raise ConfigError(name, f"would undo {undone} before it; leave one of them out")
            _put(node, key, config_dict.ConfigDict())
        node = node[key]
    try:
        _put(node, _key(node, parts[-1]), _literal(value))
    except (TypeError, ValueError) as error:
        rule = f"must be numbers, strings, bools, None, or tuples and dicts of them: {error}"
        raise ConfigError(name, rule, value) from None


def _key(node: Any, part: str) -> str | int:
    """The field that `part` names: the steps of piecewise_constant_schedule are numbers."""
    return int(part) if part.isdecimal() and int(part) in node else part


def _put(node: Any, key: str | int, value: Any) -> None:
    with node.unlocked():
        try:
            node[key] = value  # Also in the fields that the file ties to it by a reference.
        except TypeError:  # Of another type than in the file.
            if key not in node:
                raise
            del node[key]
            node[key] = value


def _literal(text: str) -> Any:
    """A Python literal, also true, false and none in any case; anything else is a string.

    Raises:
      TypeError: a literal that JSON, and so the record of the config, cannot hold.
    """
    if text.lower() in _WORDS:
        return _WORDS[text.lower()]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Of '\d' in a regular expression, which stays so.
            value = ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return text
    json.dumps(value)
    return value


def _set_typed(config: Any, name: str, value: str, before: Sequence[str]) -> None:
    """Let config_flags read the value as its field's type, and set it.

    Args:
      config: the ConfigDict.
      name: of the field, `config.model.num_layers`.
      value: as it was written.
      before: the overrides of the same field before this one: a tuple's add up.
    """
    from absl import flags
    from ml_collections import config_flags

    same = [*before, f"--{name}={value}"]
    flag = name.partition(".")[0]
    values = flags.FlagValues()
    try:
        config_flags.DEFINE_config_dict(
            flag, config, lock_config=False, flag_values=values, sys_argv=same
        )
        values(["muster", *same])
    except (flags.Error, TypeError, ValueError, KeyError, IndexError, AttributeError) as error:
        raise ConfigError(name, _why(config, name, value, error), value) from None


def _why(config: Any, name: str, value: str, error: Exception) -> str:
    """What is wrong with an override's value."""
    kind = _type(config, name)
    if kind is int:
        try:
            number = float(value)
        except ValueError:
            return "must be an int"
        whole = abs(number) < 1e18 and number.is_integer()
        return f"must be an int; write {int(number)}" if whole else "must be an int"
    if kind is bool:
        return "must be true or false"
    if kind is float:
        return "must be a number"
    text = " ".join(str(error).split())
    return f"must be {kind.__name__}: {text}" if kind else text
