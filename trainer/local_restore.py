"""A state put together from the local checkpoints of all hosts.

Every process reads what its own host has, and is given by others what it lacks. Nothing that has
changed on its disk is used: what is found damaged counts as not there.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from launch.spec import compare_code, compare_configs, compare_versions
from trainer import local_arrays
from trainer.checkpoint_format import describe
from trainer.checksums import DamagedError
from trainer.local_arrays import Buffers
from trainer.local_catalogue import Catalogue, Piece, Plan, overlapping
from trainer.local_directory import Entry, LocalDirectory
from trainer.local_transfer import exchange

_THREADS = 4


@dataclasses.dataclass(frozen=True)
class LocalRestored:
    """A state put together.

    Attributes:
      step: completed updates.
      state: dotted name -> array, in the shardings asked for.
      data_position: the JSON value given to `save`.
      kept: what `LocalCheckpoints.keep` was given.
    """

    step: int
    state: dict[str, jax.Array]
    data_position: Any
    kept: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A step that some hosts have.

    Attributes:
      step: completed updates.
      attempt: token of the gang that wrote it.
      available: for each process of that gang whose files are there, today's directory of them.
      speaker: a process of today's that can read its index.
    """

    step: int
    attempt: str
    available: dict[int, int]
    speaker: int

    @property
    def key(self) -> tuple[int, str]:
        """Which step of which gang."""
        return self.step, self.attempt

    def as_json(self) -> list[Any]:
        """As a JSON value."""
        return [self.step, self.attempt, sorted(self.available.items()), self.speaker]

    @classmethod
    def from_json(cls, value: Sequence[Any]) -> Candidate:
        """From what `as_json` gave."""
        step, attempt, available, speaker = value
        return cls(step, attempt, dict(map(tuple, available)), speaker)


def newest(
    offers: Sequence[Sequence[Sequence[Any]]],
    directories: Sequence[int],
    newer_than: int | None,
    rejected: Iterable[tuple[int, str]],
) -> list[Any] | None:
    """The newest step that is offered and may be used, as `Candidate.as_json` gives it. Pure.

    Args:
      offers: for each process the entries (step, process, attempt) for which it speaks.
      directories: for each process the number of its local directory.
      newer_than: only later steps count; None for all.
      rejected: steps and attempts that have been looked at in vain.
    """
    found: dict[tuple[int, str], Candidate] = {}
    for speaker, entries in enumerate(offers):
        for step, process, attempt in entries:
            if (newer_than is not None and step <= newer_than) or (step, attempt) in rejected:
                continue
            known = found.setdefault((step, attempt), Candidate(step, attempt, {}, speaker))
            known.available.setdefault(process, directories[speaker])
    # Of two gangs that got as far, the one of which there is more.
    best = max(found.values(), key=lambda one: (one.step, len(one.available)), default=None)
    return None if best is None else best.as_json()


def unfit(index: Mapping[str, Any], abstract: Mapping[str, Any], record: Any) -> str | None:
    """Why a saved state is not one for today's run, in words; None if it is. Pure.

    Args:
      index: the record that it was saved with.
      abstract: dotted name -> array or ShapeDtypeStruct that is wanted.
      record: what makes today's run what it is.
    """
    was = index["record"]
    compared = [
        *compare_configs(was["config"], record["config"]),
        *compare_code(was.get("code", {}), record.get("code", {})),
        *compare_versions(was.get("versions", {}), record.get("versions", {})),
    ]
    changed = [found.field for found in compared if not found.harmless]
    # What a start is told to do with a checkpoint is done with shared ones only.
    if _instructions(was["config"]) != _instructions(record["config"]):
        changed.append("what config.restore or config.init_from asks for")
    if changed:
        return (
            f"{', '.join(changed[:8])} changed since, and only with a shared checkpoint can that "
            "be judged"
        )
    saved = index["described"]
    wanted = {name: describe(leaf) for name, leaf in abstract.items()}
    differing = sorted(n for n in saved.keys() | wanted.keys() if saved.get(n) != wanted.get(n))
    if differing:
        return f"it is of another state: {', '.join(differing[:4])} differ(s)"
    return None


def _instructions(config: Mapping[str, Any]) -> Any:
    """What a config says a resume is to do; what it allows besides does nothing by itself."""
    restore = {key: value for key, value in config.get("restore", {}).items() if value}
    restore.pop("allow_change", None)
    return json.loads(json.dumps([config.get("init_from", ""), restore]))


def lacking_in_words(index: Mapping[str, Any], saved: Catalogue, plan: Plan) -> str:
    """Which pieces nobody has, and who had them. Pure."""
    piece = plan.lacking[0]
    number = list(saved.leaves).index(piece.leaf)
    placement = saved.placements[saved.leaves[piece.leaf].placement]
    writers = saved.writers(number, placement, piece.box)
    hosts = sorted({index["hosts"][writer] for writer in writers})
    place = ", ".join(f"{start}:{stop}" for start, stop in saved.box(piece))
    more = f" and {len(plan.lacking) - 1} other part(s)" if len(plan.lacking) > 1 else ""
    were = ", ".join(map(str, writers))
    return (
        f"[{place}] of {piece.leaf}{more} is on no host: process(es) {were} wrote it on "
        f"{', '.join(hosts)}"
    )


class Damage(NamedTuple):
    """A piece of an entry that is not what was written, or all of it where `leaf` is "".

    Attributes:
      step, process, attempt: the entry.
      leaf, box: the piece.
    """

    step: int
    process: int
    attempt: str
    leaf: str
    box: int


@dataclasses.dataclass
class Fetched:
    """What came of reading.

    Attributes:
      buffers: what this process is to hold.
      problems: what this process found damaged, and how: a piece of an entry, or all of it.
      received_bytes: of pieces that this process was given by others.
    """

    buffers: Buffers
    problems: dict[Damage, str]
    received_bytes: int


def fetch(
    files: LocalDirectory,
    chosen: Candidate,
    saved: Catalogue,
    wanted: Catalogue,
    plan: Plan,
) -> Fetched:
    """Read what is on this host, give others what they lack, and receive what is lacking here.

    Collective: every process must call this. A process that finds damage goes through with it, so
    that nobody waits for it in vain; what it has given is then not to be used by anybody.
    """
    me = jax.process_index()
    fetched = Fetched(local_arrays.empty(wanted, me), {}, 0)
    contents: dict[int, dict[Piece, Any]] = {}

    def read(piece: Piece, writer: int) -> np.ndarray:
        entry = Entry(chosen.step, writer, chosen.attempt)
        broken = Damage(*entry, "", 0)
        try:
            if writer not in contents:
                places = files.index(entry)["pieces"]
                contents[writer] = dict(zip(saved.written_by(writer), places, strict=True))
            broken = Damage(*entry, *piece)
            return files.read(entry, contents[writer][piece])
        except DamagedError as error:
            fetched.problems.setdefault(broken, str(error))
            return np.zeros(_bytes_of(saved, piece), np.uint8)

    def read_own(item: tuple[Piece, int]) -> None:
        _place(saved, wanted, item[0], read(*item), fetched.buffers)

    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        list(pool.map(read_own, plan.own.items()))

    def give(number: int) -> np.ndarray | None:
        transfer = plan.transfers[number]
        return read(transfer.piece, transfer.writer) if transfer.source == me else None

    sizes = [_bytes_of(saved, transfer.piece) for transfer in plan.transfers]
    for number, data in exchange(sizes, give):
        piece = plan.transfers[number].piece
        if piece not in plan.own and _place(saved, wanted, piece, data, fetched.buffers):
            fetched.received_bytes += len(data)
    return fetched


def _bytes_of(saved: Catalogue, piece: Piece) -> int:
    elements = int(np.prod([stop - start for start, stop in saved.box(piece)], dtype=np.int64))
    return elements * np.dtype(saved.leaves[piece.leaf].dtype).itemsize


def _place(
    saved: Catalogue, wanted: Catalogue, piece: Piece, data: np.ndarray, buffers: Buffers
) -> bool:
    """Copy a piece to where it is wanted on this process; whether it is wanted at all."""
    leaf = saved.leaves[piece.leaf]
    box = saved.box(piece)
    part: np.ndarray = data.view(leaf.dtype).reshape([stop - start for start, stop in box])
    placement = wanted.placements[wanted.leaves[piece.leaf].placement]
    used = False
    for number in overlapping(leaf.shape, box, placement.grid):
        target = buffers.get(Piece(piece.leaf, number))
        if target is None:
            continue
        there = wanted.box(Piece(piece.leaf, number))
        common = [(max(a, c), min(b, d)) for (a, b), (c, d) in zip(box, there, strict=True)]
        target[tuple(slice(a - c, b - c) for (a, b), (c, _) in zip(common, there, strict=True))] = (
            part[tuple(slice(a - c, b - c) for (a, b), (c, _) in zip(common, box, strict=True))]
        )
        used = True
    return used
