"""Config files and their overrides on the command line.

A file defines `get_config()` or `get_config(variant)`, as `ml_collections.config_flags` wants it;
`--config=FILE[:VARIANT]` loads it and `--config.a.b=V` overrides a field, parsed by that library.
The file itself is loaded here, because the library defers or decorates its errors, and because
its cached bytecode misses an edit within the same second that leaves the size alone.
"""

from __future__ import annotations

import itertools
import os
import re
import sys
import types
from collections.abc import Sequence
from typing import Any, NamedTuple

from launch.spec.errors import ConfigError, closest


class LoadedConfig(NamedTuple):
    """What the command line said about one config.

    Attributes:
      config: the ConfigDict with overrides applied, locked; None if an optional flag is absent.
      rest: the arguments that were not about this config, in order.
      source: `FILE` or `FILE:VARIANT` with FILE absolute; "" if absent.
      overrides: the overrides, each written `--config.a.b=V`, in order.
    """

    config: Any
    rest: list[str]
    source: str
    overrides: list[str]


def load_config(
    flag: str,
    argv: Sequence[str],
    required: bool = True,
    open_sections: Sequence[str] = (),
) -> LoadedConfig:
    """Load the config that `--<flag>` names, and apply its overrides.

    Args:
      flag: the flag's name without dashes, `config` or `cluster`.
      argv: arguments without the program's name; what follows `--` is left alone.
      required: whether a missing `--<flag>` is an error.
      open_sections: sections in which an override may add a field, a string.

    Raises:
      ConfigError: one line for everything that a user can get wrong here.
    """
    source, remaining = _take_source(flag, argv)
    prefix = re.compile(rf"--?(no)?{flag}\.")
    if source is None:
        ours = itertools.takewhile(lambda arg: arg != "--", remaining)  # Not the program's own.
        stray = next((arg for arg in ours if prefix.match(arg)), None)
        if stray:
            raise ConfigError("", f"{stray}: there is no --{flag}=FILE whose field it could be")
        if required:
            raise ConfigError("", f"--{flag} is missing; give --{flag}=FILE{_suggest(flag)}")
        return LoadedConfig(None, remaining, "", [])
    path, _, variant = source.partition(":")
    path = os.path.abspath(os.path.expanduser(path))
    config = _read(flag, source, path, [variant] if ":" in source else [])
    overrides, rest = _take_overrides(flag, prefix, config, remaining, open_sections)
    if overrides:
        _apply(flag, config, overrides)
    config.lock()
    return LoadedConfig(
        config, rest, path + source[source.find(":") :] * (":" in source), overrides
    )


def _take_source(flag: str, argv: Sequence[str]) -> tuple[str | None, list[str]]:
    """Split `--flag=FILE` or `--flag FILE` (the last one wins) from the other arguments."""
    source, rest = None, []
    arguments = list(argv)
    while arguments:
        arg = arguments.pop(0)
        if arg == "--":
            rest += [arg, *arguments]
            break
        if arg in (f"--{flag}", f"-{flag}"):
            if not arguments or arguments[0].startswith("-"):
                raise ConfigError("", f"--{flag} needs a value; give --{flag}=FILE")
            source = arguments.pop(0)
        elif arg.startswith((f"--{flag}=", f"-{flag}=")):
            source = arg.partition("=")[2]
        else:
            rest.append(arg)
    return source, rest


def _read(flag: str, source: str, path: str, arguments: list[str]) -> Any:
    """Run the file and its get_config."""
    from ml_collections import config_dict
    from ml_collections.config_dict.config_dict import RequiredValueError

    try:
        with open(path, encoding="utf-8") as file:
            text = file.read()
    except FileNotFoundError:
        raise ConfigError(flag, f"no such file{_suggest(flag, path)}", source) from None
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError(flag, f"cannot be read: {reason}", source) from None
    module = types.ModuleType(f"{flag}_config")
    module.__file__ = path
    sys.modules[module.__name__] = module  # Where dataclasses and pickle look a class's module up.
    try:
        exec(compile(text, path, "exec"), module.__dict__)
        get_config = getattr(module, "get_config", None)
        if not callable(get_config):
            raise ConfigError(flag, "the file defines no function get_config()", source)
        config = get_config(*arguments)
    except ConfigError:
        raise
    except SyntaxError as error:
        rule = f"{error.filename}:{error.lineno}: syntax error: {error.msg}"
        raise ConfigError(flag, rule, source) from None
    except Exception as error:
        import traceback

        lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == path]
        what = " ".join(f"{type(error).__name__}: {error}".split())
        place = f"{path}:{lines[-1]}" if lines else path
        raise ConfigError(flag, f"{place}: {what}", source) from error
    if isinstance(config, dict):
        config = config_dict.ConfigDict(config)
    if not isinstance(config, config_dict.ConfigDict):
        rule = f"get_config() must return a ConfigDict, not {type(config).__name__}"
        raise ConfigError(flag, rule, source)
    try:
        config.to_dict()
    except RequiredValueError:
        rule = (
            "a required_placeholder is open, which an override cannot fill; use placeholder(TYPE)"
        )
        raise ConfigError(flag, rule, source) from None
    return config


def _take_overrides(
    flag: str,
    prefix: re.Pattern[str],
    config: Any,
    argv: Sequence[str],
    open_sections: Sequence[str],
) -> tuple[list[str], list[str]]:
    """Split off the overrides, each checked to name a field, in the form `--flag.field=value`."""
    overrides: list[str] = []
    rest: list[str] = []
    arguments = list(argv)
    while arguments:
        arg = arguments.pop(0)
        if arg == "--":
            rest += [arg, *arguments]
            break
        match = prefix.match(arg)
        if not match:
            rest.append(arg)
            continue
        field, equals, value = arg[match.end() :].partition("=")
        kind = _field_type(flag, config, field, open_sections)
        if match.group(1):  # --noconfig.field
            if equals or kind is not bool:
                raise ConfigError(f"{flag}.{field}", f"{arg}: only a bool can be turned off so")
            equals, value = "=", "false"
        elif not equals and kind is bool:
            equals, value = "=", "true"
        elif not equals:
            if not arguments:
                raise ConfigError(f"{flag}.{field}", f"needs a value; write {arg}=VALUE")
            value = arguments.pop(0)
        below = next((o for o in overrides if o.startswith(f"--{flag}.{field}.")), None)
        if below:
            raise ConfigError(f"{flag}.{field}", f"would undo {below} before it; swap the two")
        overrides.append(f"--{flag}.{field}={value}")
    return overrides, rest


def _field_type(flag: str, config: Any, field: str, open_sections: Sequence[str]) -> type | None:
    """The type of a dotted field; None where only the library can tell (`a[0]`)."""
    from ml_collections import config_dict

    node, done = config, flag
    parts = field.split(".")
    for index, part in enumerate(parts):
        if "[" in part:
            return None
        if not isinstance(node, config_dict.ConfigDict):
            rule = f"no such field; {done} is of type {type(node).__name__} and has none"
            raise ConfigError(f"{flag}.{field}", rule)
        if part not in node and ".".join(parts[:index]) in open_sections:
            with node.unlocked():
                node[part] = ""
        if part not in node:
            rule = f"no such field; {closest(part, node.keys())}"
            raise ConfigError(f"{flag}.{field}", rule)
        kind = node.get_type(part)
        node = node[part]
        done += f".{part}"
    if kind is type(None):
        raise ConfigError(
            f"{flag}.{field}",
            "is None in the file, so its type is not known; write it there as "
            "config_dict.placeholder(TYPE)",
        )
    return kind


def _apply(flag: str, config: Any, overrides: list[str]) -> None:
    """Let config_flags parse the overrides and set the fields."""
    from absl import flags
    from ml_collections import config_flags

    by_field: dict[str, list[str]] = {}
    for override in overrides:
        by_field.setdefault(override[2:].partition("=")[0], []).append(override)
    for field, same in by_field.items():  # Apart, so that an error is known to be this field's.
        values = flags.FlagValues()
        try:
            config_flags.DEFINE_config_dict(
                flag, config, lock_config=False, flag_values=values, sys_argv=same
            )
            values(["muster", *same])
        except (flags.Error, TypeError, ValueError, KeyError, IndexError, AttributeError) as error:
            value = same[-1].partition("=")[2]
            raise ConfigError(field, _why(config, field, value, error), value) from None


def _why(config: Any, field: str, value: str, error: Exception) -> str:
    """What is wrong with an override's value."""
    kind = None
    if "[" not in field:
        kind = _field_type(field.partition(".")[0], config, field.partition(".")[2], ())
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


def _suggest(flag: str, path: str = "") -> str:
    """Name the closest config files: beside the path that was asked for, and the shipped ones."""
    import importlib.util

    subfolder = "cluster" if flag == "cluster" else ""
    folders = [os.path.dirname(path)] if path else []
    package = importlib.util.find_spec("configs")
    for root in (package.submodule_search_locations or []) if package else []:
        folders.append(os.path.join(root, subfolder))
    found = []
    for folder in folders:
        names = sorted(os.listdir(folder)) if os.path.isdir(folder) else []
        found += [
            _shown(os.path.join(folder, name))
            for name in names
            if name.endswith(".py") and not name.startswith("_")
        ]
    found = list(dict.fromkeys(found))
    if not found:
        return ""
    by_name = {os.path.basename(file): file for file in reversed(found)}
    guess = closest(os.path.basename(path), by_name)
    if path and guess.startswith("did you mean"):
        return f"; did you mean {by_name[guess.split(chr(39))[1]]}?"
    return f"; there are {', '.join(found[:12])}"


def _shown(path: str) -> str:
    """A path as its reader would write it: relative where that is shorter."""
    relative = os.path.relpath(path)
    return relative if len(relative) < len(path) else path
