"""What lies in a checkpoint directory: which steps are there, which go, what is set aside.

    checkpoints/20/                       a committed step; its name is its number
    checkpoints/30.orbax-checkpoint-tmp/  a save that was going on, or was cut off
    checkpoints/damaged/20-0/             set aside: never used, never deleted by us
    checkpoints/verified.json             which steps were read and compared, when, with what result

All functions here touch the disk and are the lead process's alone, except where they say so.
`checkpoint_gcs` has the same ones for Google Cloud Storage.
"""

from __future__ import annotations

import logging
import os
import pathlib
import shutil
from collections.abc import Container, Iterable

from trainer.storage import Path

log = logging.getLogger(__name__)

# In a step's directory.
MANIFEST = "checksums.json"
SEAL = "checksums.commit.json"  # A manifest of what the commit itself wrote; see checkpoint_seal.
STATE, META = "state", "meta"
META_FILE = "metadata"  # In META, as Orbax's handler of JSON calls it.

DAMAGED = "damaged"
TEMPORARY_SUFFIX = ".orbax-checkpoint-tmp"
PROBE = ".probe"


def steps_in(directory: pathlib.Path) -> list[int]:
    """Steps that have a directory of their own, newest first, whatever is in them."""
    return step_numbers(entry.name for entry in directory.iterdir())


def step_numbers(names: Iterable[str]) -> list[int]:
    """The steps among the names of a directory's entries, newest first. Pure."""
    return sorted((int(name) for name in names if name.isdigit()), reverse=True)


def written_path(step: pathlib.Path) -> pathlib.Path:
    """Where a step is while it is written: beside its place, until Orbax renames it."""
    return step.with_name(step.name + TEMPORARY_SUFFIX)


def steps_to_drop(steps: Iterable[int], keep_last: int, keep_every_steps: int) -> list[int]:
    """Which committed steps retention deletes. Pure.

    Args:
      steps: all committed steps.
      keep_last: the newest so many stay; at least 1.
      keep_every_steps: steps that this divides stay too; 0 for none.
    """
    oldest_first = sorted(steps)
    return [
        step
        for step in oldest_first[:-keep_last]
        if not (keep_every_steps and step % keep_every_steps == 0)
    ]


def remove_unfinished(directory: pathlib.Path) -> None:
    """Delete what a save that never finished left behind: nothing in it can be used."""
    for entry in sorted(directory.iterdir()):
        if TEMPORARY_SUFFIX in entry.name:
            log.warning("checkpoint %s was never finished; deleting it", entry)
            remove(entry)


def set_aside(directory: pathlib.Path, step: int, why: str) -> pathlib.Path:
    """Move a step that cannot be used out of the way, and say so."""
    damaged = directory / DAMAGED
    damaged.mkdir(exist_ok=True)
    target = damaged_target(damaged, step, {entry.name for entry in damaged.iterdir()})
    os.rename(directory / str(step), target)
    log.warning("checkpoint step %d cannot be used: %s; set aside as %s", step, why, target)
    return target


def damaged_target(damaged: Path, step: int, taken: Container[str]) -> Path:
    """A free name for a step that is set aside. Pure."""
    number = 0
    while f"{step}-{number}" in taken:
        number += 1
    return damaged / f"{step}-{number}"


def has_damaged(directory: pathlib.Path) -> bool:
    """Was a step set aside here, now or in an earlier attempt?"""
    damaged = directory / DAMAGED
    return damaged.is_dir() and any(damaged.iterdir())


def remove(path: pathlib.Path) -> None:
    """Delete a directory tree; a failure is said and not fatal."""
    try:
        # Out of the list of steps at once: half deleted it must not pass for a step.
        if TEMPORARY_SUFFIX not in path.name:
            path = path.rename(path.with_name(f"{path.name}{TEMPORARY_SUFFIX}"))
        shutil.rmtree(path)
    except OSError as error:
        log.warning("cannot delete %s: %s", path, error)


def remove_all(paths: Iterable[pathlib.Path]) -> None:
    """Delete directory trees, one after the other."""
    for path in paths:
        remove(path)


def write_probe(directory: pathlib.Path, token: str) -> str | None:
    """Make the directory and write into it; the problem in words, or None."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        (directory / PROBE).write_text(token, encoding="utf-8")
    except OSError as error:
        return f"cannot be written: {error.strerror}"
    return None


def read_probe(directory: pathlib.Path, token: str, process: int) -> str | None:
    """On every other process: is it the lead's directory, and can it be written from here too?"""
    try:
        found = (directory / PROBE).read_text(encoding="utf-8")
    except OSError:
        found = ""
    if found != token:
        return "is not the lead process's directory; it must be on a shared file system"
    own = directory / f"{PROBE}-{process}"
    try:
        own.write_text(token, encoding="utf-8")
        own.unlink()
    except OSError as error:
        return f"cannot be written: {error.strerror}"
    return None


def remove_probe(directory: pathlib.Path) -> None:
    """Delete what `write_probe` wrote."""
    (directory / PROBE).unlink(missing_ok=True)
