"""Which steps lie in a checkpoint directory, and in what condition. Reads no array."""

from __future__ import annotations

import dataclasses
import datetime
import os
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from launch import contract
from trainer import checksums, storage
from trainer.checkpoint_directory import DAMAGED, MANIFEST, TEMPORARY_SUFFIX
from trainer.checkpoint_gcs import COMMIT_FILE
from trainer.checkpoints import verified
from trainer.checkpoints.places import reader_of
from trainer.checkpoints.verified import Verified
from trainer.storage import Path

COMPLETE = "complete"  # Committed, with every file of its manifest in full length.
UNFINISHED = "unfinished"  # A save that is going on, or was cut off.
BROKEN = "damaged"  # In its place, and a resume would set it aside.
ASIDE = "set aside"  # By a resume that could not use it.


class File(NamedTuple):
    """A file's size, and when it was written, in seconds since the epoch."""

    bytes: int
    time: float


@dataclasses.dataclass(frozen=True)
class Step:
    """A step, or what is left of one.

    Attributes:
      name: its place below the directory: `20`, `damaged/20-0`, `30.orbax-checkpoint-tmp`.
      step: its number.
      state: COMPLETE, UNFINISHED, BROKEN or ASIDE.
      problem: what is wrong with it, in words.
      bytes: of all its files.
      saved_at: seconds since the epoch; None where there is no file.
      verified: what the last verification of its bytes found.
      resume: whether a resume would take it.
    """

    name: str
    step: int
    state: str
    problem: str | None
    bytes: int
    saved_at: float | None
    verified: Verified | None
    resume: bool = False

    @property
    def good(self) -> bool:
        """Complete, and no verification has found damage."""
        return self.state == COMPLETE

    def as_json(self) -> dict[str, Any]:
        """As reports hold it."""
        return {
            "name": self.name,
            "step": self.step,
            "state": self.state,
            "problem": self.problem,
            "bytes": self.bytes,
            "saved_at": None if self.saved_at is None else contract.utc(self.saved_at),
            "verified": verified.as_json(self.verified),
            "resume": self.resume,
        }


def list_steps(directory: Path) -> list[Step]:
    """Every step and what is left of one, newest first, those set aside last.

    Raises:
      FileNotFoundError: there is no such directory.
    """
    known = verified.read(directory)
    found = []
    for name, files in _by_step(files_below(directory)).items():
        number = int(name.rpartition("/")[2].partition(".")[0].partition("-")[0])
        found.append(_look(directory, name, number, files, known))
    found.sort(key=lambda step: (step.state == ASIDE, -step.step, step.name))
    taken = next((step for step in found if step.good), None)
    return [dataclasses.replace(step, resume=step is taken) for step in found]


def good_steps(directory: Path) -> list[int]:
    """Numbers of the steps that a resume could take, newest first, as far as a look can tell."""
    return [step.step for step in list_steps(directory) if step.good]


def _look(
    directory: Path,
    name: str,
    number: int,
    files: Mapping[str, File],
    known: Mapping[str, Verified],
) -> Step:
    """The condition of one step."""
    remote = storage.is_remote(directory)
    state, problem, entry = COMPLETE, None, None
    if name.startswith(f"{DAMAGED}/"):
        state, entry = ASIDE, known.get(name)
        problem = entry.problem if entry else None
    elif TEMPORARY_SUFFIX in name or (remote and COMMIT_FILE not in files):
        state, problem = UNFINISHED, "its save goes on, or was cut off"
    else:
        try:
            listed = reader_of(directory).read_manifest(directory / name / MANIFEST)
            entry = verified.of_step(known, name, checksums.own_checksum(listed))
            problem = _first_problem(listed, files)
        except checksums.DamagedError as error:
            problem = str(error)
        if problem is None and entry is not None and not entry.ok:
            problem = entry.problem
        if problem is not None:
            state = BROKEN
    times = [file.time for file in files.values()]
    return Step(
        name=name,
        step=number,
        state=state,
        problem=problem,
        bytes=sum(file.bytes for file in files.values()),
        saved_at=files[MANIFEST].time if MANIFEST in files else max(times, default=None),
        verified=entry,
    )


def _first_problem(listed: checksums.Digests, files: Mapping[str, File]) -> str | None:
    """What a look at names and sizes can tell."""
    for name, wanted in listed.items():
        if name not in files:
            return f"{name} is missing"
        if files[name].bytes != wanted["bytes"]:
            return f"{name} has {files[name].bytes} bytes instead of {wanted['bytes']}"
    return None


def _by_step(files: Mapping[str, File]) -> dict[str, dict[str, File]]:
    """The files of every step by its place, by their names below it. Pure."""
    found: dict[str, dict[str, File]] = {}
    for name, file in files.items():
        parts = name.split("/")
        if parts[0] == DAMAGED and len(parts) > 1:
            place, below = "/".join(parts[:2]), parts[2:]
        else:
            place, below = parts[0], parts[1:]
        number = place.rpartition("/")[2].partition(".")[0].partition("-")[0]
        if number.isdigit() and (TEMPORARY_SUFFIX in place or "." not in place):
            files_of_step = found.setdefault(place, {})
            if below and below[-1]:
                files_of_step["/".join(below)] = file
    return found


def files_below(directory: Path) -> dict[str, File]:
    """All files below the directory by relative name; an empty step's own name ends with `/`."""
    if storage.is_remote(directory):
        top = os.fspath(directory).removeprefix(storage.REMOTE) + "/"
        entries = storage.filesystem().find(os.fspath(directory), detail=True)
        return {
            name.removeprefix(top): File(int(entry["size"]), _seconds(entry.get("updated")))
            for name, entry in entries.items()
            if not name.endswith("/")
        }
    found = {}
    os.stat(directory)
    for folder, folders, names in os.walk(directory):
        below = os.path.relpath(folder, directory)
        prefix = "" if below == "." else f"{below}/"
        for name in names:
            try:
                status = os.stat(os.path.join(folder, name))
            except FileNotFoundError:  # Deleted meanwhile.
                continue
            found[f"{prefix}{name}"] = File(status.st_size, status.st_mtime)
        if below in (".", DAMAGED):
            found |= {f"{prefix}{name}/": File(0, 0.0) for name in folders if name != DAMAGED}
    return found


def _seconds(text: object) -> float:
    """Seconds since the epoch of a time as GCS says it; 0 where it says none."""
    return datetime.datetime.fromisoformat(text).timestamp() if isinstance(text, str) else 0.0


def find_steps(steps: Iterable[Step], wanted: str) -> list[Step]:
    """The steps that a word of the user's means: a number, a place, or `all` that are no leftovers.

    Raises:
      LookupError: there is none.
    """
    steps = list(steps)
    if wanted == "all":
        return [step for step in steps if step.state in (COMPLETE, BROKEN)]
    exact = [step for step in steps if wanted in (step.name, step.name.rpartition("/")[2])]
    found = exact or [step for step in steps if wanted == str(step.step) and step.state != ASIDE]
    if not found:
        there = ", ".join(step.name for step in steps) or "none"
        raise LookupError(f"no step {wanted!r}; there are {there}")
    return found
