"""verified.json: which steps were read and compared with their checksums, and what came of it.

It lies beside the steps. An entry holds the checksum of the step's manifest, so that it says
nothing of another step that was saved under the same number later.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import time
from collections.abc import Mapping
from typing import Any

from launch import contract
from trainer import checksums, storage
from trainer.checkpoint_directory import MANIFEST
from trainer.checkpoints.places import reader_of
from trainer.storage import Path

log = logging.getLogger(__name__)

FILE = "verified.json"


@dataclasses.dataclass(frozen=True)
class Verified:
    """What a verification found.

    Attributes:
      time: when, UTC ISO 8601.
      manifest: the step's manifest's own checksum; None where that could not be read.
      problem: in words; None if every checksum holds.
    """

    time: str
    manifest: str | None
    problem: str | None

    @property
    def ok(self) -> bool:
        """Whether every checksum held."""
        return self.problem is None


def read(directory: Path) -> dict[str, Verified]:
    """Entries by the step's place below the directory, `20` or `damaged/20-0`; {} if unreadable."""
    try:
        steps = json.loads(storage.read_text(directory / FILE))["steps"]
        return {name: Verified(**entry) for name, entry in steps.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def note(directory: Path, name: str, manifest: str | None, problem: str | None) -> Verified:
    """Add an entry, and drop those of steps that are gone. One process alone must call this.

    What cannot be written is not: it is worth no run.

    Args:
      directory: of the checkpoints.
      name: the step's place below it.
      manifest: the step's manifest's own checksum.
      problem: what was found, in words.
    """
    entry = Verified(contract.utc(time.time()), manifest, problem)
    steps = {**read(directory), name: entry}
    kept = {
        name: dataclasses.asdict(found)
        for name, found in steps.items()
        if found is entry or (directory / name).exists()
    }
    text = json.dumps({"schema": 1, "steps": kept}, indent=1) + "\n"
    try:
        if storage.is_remote(directory):
            storage.write_text(directory / FILE, text)
        else:
            contract.write_atomically(directory / FILE, text, mode=0o600)
    except Exception as error:
        log.warning("%s cannot be written: %s", directory / FILE, error)
    return entry


def manifest_of(step: Path) -> str | None:
    """The checksum of a step's manifest itself; None where that cannot be read."""
    try:
        return checksums.own_checksum(reader_of(step).read_manifest(step / MANIFEST))
    except checksums.DamagedError:
        return None


def of_step(entries: Mapping[str, Verified], name: str, manifest: str | None) -> Verified | None:
    """The entry of a step, if it is of this very step and not of another with its number."""
    entry = entries.get(name)
    return entry if entry is not None and entry.manifest == manifest else None


def as_json(entry: Verified | None) -> dict[str, Any] | None:
    """An entry as reports hold it."""
    if entry is None:
        return None
    return {"time": entry.time, "ok": entry.ok, "problem": entry.problem}
