"""Is a config the same run as an earlier one? Here it is decided what each field may change."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

from launch.spec.data_fields import free_data_fields
from launch.spec.fields import plain

# Fields that change how long or how fast a run goes, and what is looked at on the way, but not
# which run it is. A mesh or a layout changes the order of sums: the last bits of the numbers drift.
HARMLESS = re.compile(
    r"(num_steps|log_every_steps|check_replicas_every_steps|compilation_cache)"
    r"|(checkpoint|eval|mesh|sharding)\..+"
    r"|data\.(.+\.)?(prefetch\w*|\w+_prefetch|threads|num_threads|\w+_threads)"
)
# Fields that say how one start goes about it: no part of what a run is.
INSTRUCTIONS = re.compile(r"init_from|restore\..+")
# Packages that what is computed depends on, when more than their last number changes.
PACKAGES = ("jax", "jaxlib", "flax", "optax", "grain", "muster")

CODE, VERSIONS = "code", "versions"  # Groups of differences beside those of the config.
ABSENT = "(absent)"


@dataclasses.dataclass(frozen=True)
class Difference:
    """Something in which two starts of a run differ.

    Attributes:
      field: `config.model.num_layers`, `code.my/task.py`, `versions.jax`.
      old, new: the two values; `(absent)` where one does not have the field.
      harmless: whether it changes neither the numbers nor the order of the data, or the data goes
        on by its position (`launch.spec.data_fields`).
    """

    field: str
    old: Any
    new: Any
    harmless: bool

    @property
    def name(self) -> str:
        """The field as `config.restore.allow_change` names it."""
        return self.field.removeprefix("config.")

    def __str__(self) -> str:
        if self.field.startswith(f"{CODE}."):
            return f"{self.field}: changed"
        return f"{self.field}: {self.old!r} there, {self.new!r} now"


def compare_configs(old: Any, new: Any, name: str = "config") -> list[Difference]:
    """List the fields in which two configs (ConfigDicts, or mappings as read from JSON) differ.

    Args:
      old, new: the two.
      name: what the fields' names begin with.
    """
    old_fields, new_fields = dict(flatten(_as_json(old))), dict(flatten(_as_json(new)))
    differences = []
    free = free_data_fields(old_fields, new_fields)
    for field in sorted(old_fields.keys() | new_fields.keys()):
        before, after = old_fields.get(field, ABSENT), new_fields.get(field, ABSENT)
        if before == after and isinstance(before, bool) == isinstance(after, bool):
            continue
        if name == "config" and INSTRUCTIONS.fullmatch(field):
            continue
        harmless = field in free or HARMLESS.fullmatch(field) is not None
        differences.append(Difference(f"{name}.{field}", before, after, harmless))
    return differences


def compare_versions(old: Mapping[str, str], new: Mapping[str, str]) -> list[Difference]:
    """List the packages (and Python) whose versions differ.

    A package that is there on one side alone is another accelerator's, and no difference.
    """
    differences = []
    for package in sorted(old.keys() & new.keys()):
        before, after = old[package], new[package]
        if before != after:
            same = before.split(".")[:2] == after.split(".")[:2]
            harmless = package not in PACKAGES or same
            differences.append(Difference(f"{VERSIONS}.{package}", before, after, harmless))
    return differences


def compare_code(old: Mapping[str, str], new: Mapping[str, str]) -> list[Difference]:
    """List the source files whose digests differ, of those that both sides have.

    Args:
      old, new: path -> digests separated by `/`; one that is the same is enough.
    """
    return [
        Difference(f"{CODE}.{path}", old[path], new[path], harmless=False)
        for path in sorted(old.keys() & new.keys())
        if not set(old[path].split("/")) & set(new[path].split("/"))
    ]


def _as_json(config: Any) -> Any:
    """What the config looks like after it was written to JSON and read again."""
    return json.loads(json.dumps(plain(config), default=str))


def flatten(node: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    """A nested mapping's fields by dotted names."""
    for key, value in node.items():
        if key == "schema" and not prefix:
            continue  # Of the record, not of the config.
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):  # An empty section has no fields, as an absent one.
            yield from flatten(value, f"{name}.")
        else:
            yield name, value
