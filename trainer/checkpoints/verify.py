"""Every byte of a step compared with its checksums; of a damaged one, which leaves it hits."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from typing import Any

from trainer import checkpoint_seal, checksums
from trainer.checkpoint_directory import MANIFEST
from trainer.checkpoints import verified
from trainer.checkpoints.leaves import damaged_leaves
from trainer.checkpoints.places import reader_of
from trainer.checkpoints.steps import Step
from trainer.storage import Path


@dataclasses.dataclass(frozen=True)
class Finding:
    """What a verification has found.

    Attributes:
      problem: in words; None if every checksum holds.
      leaves: names of the leaves that are not what was saved; None where that is not known.
      usable: whether a resume would take the step all the same.
    """

    problem: str | None
    leaves: tuple[str, ...] | None = None
    usable: bool = False


def find(step: Path, *, name_leaves: bool = True) -> Finding:
    """Verify a step.

    Args:
      step: its directory.
      name_leaves: whether to look for the leaves that a damage hits, which reads all arrays.
    """
    reader = reader_of(step)
    try:
        reader.verify(step, reader.read_manifest(step / MANIFEST))
    except checksums.DamagedError as error:
        leaves = damaged_leaves(step) if name_leaves else None
        return Finding(str(error), None if leaves is None else tuple(leaves))
    problem = checkpoint_seal.problem(step)
    return Finding(problem, usable=True)


def leaves_in_words(leaves: Sequence[str] | None, most: int = 4) -> str:
    """`it hits model.up.kernel and 3 more leaves`; "" where that is not known."""
    if leaves is None:
        return ""
    if not leaves:
        return "it changes no leaf's numbers"
    more = f" and {len(leaves) - most} more" if len(leaves) > most else ""
    return f"it hits {', '.join(leaves[:most])}{more}"


def verify(directory: Path, step: Step) -> dict[str, Any]:
    """Verify one step, and note beside it what was found. A report, as JSON."""
    began = time.monotonic()
    place = directory / step.name
    found = find(place)
    # What no restore needs must not keep a step from being used.
    noted = None if found.usable else found.problem
    verified.note(directory, step.name, verified.manifest_of(place), noted)
    return {
        "name": step.name,
        "step": step.step,
        "ok": found.problem is None,
        "usable": found.usable,
        "problem": found.problem,
        "leaves": None if found.leaves is None else list(found.leaves),
        "bytes": step.bytes,
        "seconds": time.monotonic() - began,
    }
