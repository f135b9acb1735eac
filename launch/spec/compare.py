"""Is a config the same run as an earlier one?"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

from launch.errors import ConfigError
from launch.spec.data_fields import free_data_fields
from launch.spec.fields import plain

# Fields that change how long or how fast a run goes, not which run it is.
SPEED_OR_LENGTH = re.compile(
    r"(num_steps|log_every_steps|compilation_cache)"
    r"|(checkpoint|eval|mesh|sharding)\..+"
    r"|data\.(.+\.)?(prefetch\w*|\w+_prefetch|threads|num_threads|\w+_threads)"
)

_ABSENT = "(absent)"


@dataclasses.dataclass(frozen=True)
class Difference:
    """One field in which two configs differ.

    Attributes:
      field: dotted name, `config.model.num_layers`.
      old, new: the two values; `(absent)` where a config does not have the field.
      allowed: whether it only affects speed or length, or the data knows how to go on with it
        (`launch.spec.data_fields`), so that the run may go on.
    """

    field: str
    old: Any
    new: Any
    allowed: bool

    def __str__(self) -> str:
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
        before, after = old_fields.get(field, _ABSENT), new_fields.get(field, _ABSENT)
        if before != after or isinstance(before, bool) != isinstance(after, bool):
            allowed = field in free or SPEED_OR_LENGTH.fullmatch(field) is not None
            differences.append(Difference(f"{name}.{field}", before, after, allowed))
    return differences


def check_same_run(workdir: str, before: Any, config: Any) -> None:
    """Refuse a config that would make another run of what a run directory holds.

    Args:
      workdir: the run directory, for the message.
      before: its config record; None where it has none.
      config: today's.

    Raises:
      ConfigError: lists the fields that differ.
    """
    if before is None:
        return
    refused = [found for found in compare_configs(before, config) if not found.allowed]
    if refused:
        shown = "; ".join(str(found) for found in refused[:8])
        more = f"; and {len(refused) - 8} more" if len(refused) > 8 else ""
        rule = f"holds a run with another config ({shown}{more}); choose another --workdir"
        raise ConfigError("workdir", rule, workdir)


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
