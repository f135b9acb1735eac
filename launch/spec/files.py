"""Config files and their overrides on the command line.

A file defines `get_config()` or `get_config(variant)`, as `ml_collections.config_flags` wants it;
`--config=FILE[:VARIANT]` loads it and `--config.a.b=V` overrides a field (`overrides.py`).
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

from launch.errors import ConfigError, closest
from launch.spec.overrides import apply_overrides, is_override


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

    def words(self, flag: str) -> list[str]:
        """The words that give the same config on another command line; none if it is absent."""
        return [f"--{flag}={self.source}", *self.overrides] if self.source else []


def load_config(flag: str, argv: Sequence[str], required: bool = True) -> LoadedConfig:
    """Load the config that `--<flag>` names, and apply its overrides.

    Args:
      flag: the flag's name without dashes, `config` or `cluster`.
      argv: arguments without the program's name; what follows `--` is left alone.
      required: whether a missing `--<flag>` is an error.

    Raises:
      ConfigError: one line for everything that a user can get wrong here.
    """
    source, remaining = _take_source(flag, argv)
    if source is None:
        ours = itertools.takewhile(lambda arg: arg != "--", remaining)  # Not the program's own.
        stray = next((arg for arg in ours if is_override(flag, arg)), None)
        if stray:
            raise ConfigError("", f"{stray}: there is no --{flag}=FILE whose field it could be")
        if required:
            raise ConfigError("", f"--{flag} is missing; give --{flag}=FILE{_suggest(flag)}")
        return LoadedConfig(None, remaining, "", [])
    path, _, variant = source.partition(":")
    path = os.path.abspath(os.path.expanduser(path))
    config = _read(flag, source, path, [variant] if ":" in source else [])
    overrides, rest = apply_overrides(flag, config, remaining)
    config.lock()
    return LoadedConfig(
        config, rest, path + source[source.find(":") :] * (":" in source), overrides
    )


def add_override(loaded: LoadedConfig, override: str) -> LoadedConfig:
    """The same config with one more override, `--config.a.b=V`, behind the others."""
    flag = override.lstrip("-").partition(".")[0]
    with loaded.config.unlocked():
        more, _ = apply_overrides(flag, loaded.config, [override])
    return loaded._replace(overrides=[*loaded.overrides, *more])


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
            if name.endswith(".py") and _has_get_config(os.path.join(folder, name))
        ]
    found = list(dict.fromkeys(found))
    if not found:
        return ""
    by_name = {os.path.basename(file): file for file in reversed(found)}
    guess = closest(os.path.basename(path), by_name)
    if path and guess.startswith("did you mean"):
        return f"; did you mean {by_name[guess.split(chr(39))[1]]}?"
    return f"; there are {', '.join(found[:12])}"


def _has_get_config(path: str) -> bool:
    """Whether a file defines or imports `get_config`, by its text."""
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read()
    except (OSError, UnicodeDecodeError):
        return False
    defined = r"^(def get_config\b|get_config\b.*=|from .* import .*\bget_config\b)"
    return re.search(defined, text, re.MULTILINE) is not None


def _shown(path: str) -> str:
    """A path as its reader would write it: relative where that is shorter."""
    relative = os.path.relpath(path)
    return relative if len(relative) < len(path) else path
