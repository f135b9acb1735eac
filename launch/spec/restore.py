"""What a resume takes from a checkpoint, and which changes it accepts: `config.restore`."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from typing import Any

from launch.spec.fields import require


@dataclasses.dataclass(frozen=True)
class RestoreSpec:
    """Which leaves of the state come from the checkpoint; the others start fresh.

    Once a step was saved by a start with these fields, further starts with the same ones take that
    step as it is: an automatic restart does not apply them twice.

    Attributes:
      only: regular expression; leaves whose dotted path it is not found in start fresh.
      skip: regular expression; leaves whose dotted path it is found in start fresh.
      fresh_optimizer: the whole optimizer starts fresh, with its counters of steps.
      rename: {old path: new path} of params, as a dict or as JSON; an old path is a regular
        expression for the beginning of a path up to a dot or the end; moments move along.
      allow_change: names of fields, or of groups of them, that may differ from what the checkpoint
        was saved with, separated by commas: `data,optimizer.adamw.learning_rate,code,versions`.
    """

    only: str = ""
    skip: str = ""
    fresh_optimizer: bool = False
    rename: Any = ""
    allow_change: Any = ""

    def __post_init__(self) -> None:
        for name in ("only", "skip"):
            _check_pattern(name, getattr(self, name))
        rule = 'must be {"old.path": "new.path"}, as a dict or as JSON'
        mapping: Any = self.rename or {}
        if isinstance(mapping, str):
            try:
                mapping = json.loads(mapping)
            except ValueError as error:
                require(False, "rename", self.rename, f"{rule}: {error}")
        require(isinstance(mapping, Mapping), "rename", self.rename, rule)
        for old, new in mapping.items():
            require(isinstance(old, str) and isinstance(new, str), "rename", self.rename, rule)
            _check_pattern("rename", old)
        object.__setattr__(self, "rename", dict(mapping))
        names: Any = self.allow_change
        names = names.split(",") if isinstance(names, str) else names
        are_names = isinstance(names, (tuple, list)) and all(isinstance(n, str) for n in names)
        require(are_names, "allow_change", self.allow_change, "must be names, separated by commas")
        cleaned = tuple(name.strip().removeprefix("config.") for name in names if name.strip())
        object.__setattr__(self, "allow_change", cleaned)

    @property
    def is_partial(self) -> bool:
        """Whether not just everything is taken as it is."""
        return bool(self.only or self.skip or self.fresh_optimizer or self.rename)

    def as_record(self) -> dict[str, Any]:
        """What is taken from the checkpoint, as JSON, to be compared with another start's."""
        return {
            "only": self.only,
            "skip": self.skip,
            "fresh_optimizer": self.fresh_optimizer,
            "rename": dict(self.rename),
        }


def _check_pattern(name: str, pattern: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        require(False, name, pattern, f"not a regular expression: {error}")
