"""The gate of a resume: what differs from the stored run, and whether that is allowed. Pure.

Three classes. What is harmless is shown. What changes the numbers or the order of the data is
refused unless `config.restore.allow_change` names it. What breaks the state, leaves that are not
there or have another shape, is found by the trainer, which knows the leaves.
"""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from launch.errors import ConfigError, closest
from launch.spec.compare import CODE, VERSIONS, Difference, flatten
from launch.spec.fields import plain

FIELD = "config.restore.allow_change"
_SHOWN = 8  # Differences that a message lists.
_SINGLE = 3  # Fields of one group that are named one by one.


@dataclasses.dataclass(frozen=True)
class Judged:
    """What became of the differences.

    Attributes:
      harmless: to be shown.
      accepted: named by the user now, or recorded as accepted before.
      refused: neither.
    """

    harmless: tuple[Difference, ...]
    accepted: tuple[Difference, ...]
    refused: tuple[Difference, ...]


def judge(
    differences: Iterable[Difference],
    allow: Sequence[str],
    earlier: Iterable[Mapping[str, Any]] = (),
) -> Judged:
    """Sort differences into what is harmless, accepted and refused.

    Args:
      differences: between the stored run and today's.
      allow: names of fields or groups, from `config.restore.allow_change`.
      earlier: changes that were accepted at the very step that is resumed from (`field`, `new`):
        a restart before the next step is saved must not ask again.
    """
    done = {(change.get("field"), repr(change.get("new"))) for change in earlier}
    harmless, accepted, refused = [], [], []
    for found in differences:
        if found.harmless:
            harmless.append(found)
        elif any(covers(name, found.name) for name in allow) or _key(found) in done:
            accepted.append(found)
        else:
            refused.append(found)
    return Judged(tuple(harmless), tuple(accepted), tuple(refused))


def _key(found: Difference) -> tuple[str, str]:
    return found.field, repr(found.new)


def covers(name: str, field: str) -> bool:
    """Whether a name means a field: itself, or a group that it is in."""
    return field == name or field.startswith(f"{name}.")


def refuse(workdir: str, judged: Judged) -> None:
    """Refuse what is not allowed.

    Raises:
      ConfigError: lists the differences, and the flag that would allow them.
    """
    if not judged.refused:
        return
    shown = "; ".join(str(found) for found in judged.refused[:_SHOWN])
    more = len(judged.refused) - _SHOWN
    shown += f"; and {more} more" if more > 0 else ""
    rule = (
        f"holds a run that differs in what changes its numbers or the order of its data ({shown}); "
        f"to go on all the same give --{FIELD}={','.join(names_for(judged.refused))}, or choose "
        "another --workdir"
    )
    raise ConfigError("workdir", rule, workdir)


def names_for(differences: Sequence[Difference]) -> list[str]:
    """The fewest plain names that allow these differences: fields, or a group of many."""
    groups = Counter(found.name.partition(".")[0] for found in differences)
    names = []
    for found in differences:
        group = found.name.partition(".")[0]
        single = groups[group] <= _SINGLE and group != CODE
        names.append(found.name if single else group)
    return list(dict.fromkeys(names))


def check_names(allow: Sequence[str], old: Any, new: Any, refused: Sequence[Difference]) -> None:
    """Refuse a name that means no field of either config, nor a group of other differences.

    A name that is known and allows nothing is let pass: an automatic restart gives it again.

    Args:
      allow: from `config.restore.allow_change`.
      old, new: the two configs.
      refused: differences that nothing allows, which the name may have meant.

    Raises:
      ConfigError: with the closest name.
    """
    fields = {name for config in (old, new) for name, _ in flatten(plain(config))}
    known = {CODE, VERSIONS}
    for field in fields:
        parts = field.split(".")
        known |= {".".join(parts[: n + 1]) for n in range(len(parts))}
    for name in allow:
        if name in known or name.partition(".")[0] in (CODE, VERSIONS):
            continue
        needed = [found.name for found in refused]
        raise ConfigError(FIELD, f"names no field; {closest(name, needed or known, 8)}", name)


def parse_changes(text: str) -> list[dict[str, Any]]:
    """The records of `changes.jsonl`; a line torn by a full disk is passed over."""
    records = []
    for line in text.splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict):
            records.append(record)
    return records


def changes_at(records: Iterable[Mapping[str, Any]], step: int) -> list[Mapping[str, Any]]:
    """The changes that were accepted when a run was resumed from this step."""
    return [
        change
        for record in records
        if record.get("step") == step
        for change in record.get("changes") or ()
    ]
