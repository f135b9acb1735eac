"""What a config names by its import path, `package.module:name`."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from launch.spec import ConfigError, closest


def import_path(field: str, path: str, fits: Callable[[Any], bool], kind: str) -> Any:
    """Import `package.module:name`.

    Args:
      field: of the config, for messages.
      path: what to import.
      fits: whether something is what may be named there.
      kind: how messages call that, `function`, say.

    Raises:
      ConfigError: no such module, or nothing of the name in it that fits, with the closest match.
      ModuleNotFoundError: the module is there; what it imports is not.
    """
    module_name, name = path.split(":")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name and not f"{module_name}.".startswith(f"{error.name}."):
            raise
        raise ConfigError(field, f"no module {error.name!r}; is it on PYTHONPATH?", path) from None
    found = getattr(module, name, None)
    if not fits(found):
        known = [key for key, value in vars(module).items() if fits(value)]
        rule = f"{module_name} has no {kind} {name!r}; {closest(name, known)}"
        raise ConfigError(field, rule, path)
    return found
