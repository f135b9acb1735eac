"""Who holds which part of a train state, and who gives it to whom: pure, the same on every process.

Every leaf is cut into a grid of equal boxes by its sharding; box number k is the k-th of them in
row-major order. Where a box lies on several processes, it is written once per local directory, by
a process that follows from the numbers alone. So a catalogue of a few kilobytes says for the whole
gang what lies where, and nobody has to list files to anybody.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Container, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

Box = tuple[tuple[int, int], ...]  # (start, stop) along each dim


class Piece(NamedTuple):
    """A box of a leaf, by number."""

    leaf: str
    box: int


@dataclasses.dataclass(frozen=True)
class Placement:
    """How leaves are cut, and who holds the boxes.

    Attributes:
      grid: into how many parts each dim is cut.
      holders: for each box the processes that have it, ascending.
    """

    grid: tuple[int, ...]
    holders: tuple[tuple[int, ...], ...]


@dataclasses.dataclass(frozen=True)
class Leaf:
    """An array as it lies in files: numbers only, typed PRNG keys as their words.

    Attributes:
      shape: whole.
      dtype: numpy's (or ml_dtypes') name.
      placement: number of its placement in the catalogue.
    """

    shape: tuple[int, ...]
    dtype: str
    placement: int


@dataclasses.dataclass(frozen=True)
class Catalogue:
    """All leaves of a state on a gang.

    Attributes:
      leaves: by dotted name.
      placements: those that occur.
      directories: for each process the number of the local directory that it uses; processes of
        one host have the same.
    """

    leaves: Mapping[str, Leaf]
    placements: Sequence[Placement]
    directories: Sequence[int]

    def as_json(self) -> dict[str, Any]:
        """As a JSON value."""
        return {
            "leaves": {
                name: [list(leaf.shape), leaf.dtype, leaf.placement]
                for name, leaf in self.leaves.items()
            },
            "placements": [[list(p.grid), [list(h) for h in p.holders]] for p in self.placements],
            "directories": list(self.directories),
        }

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Catalogue:
        """From what `as_json` gave."""
        return cls(
            {
                name: Leaf(tuple(shape), dtype, placement)
                for name, (shape, dtype, placement) in record["leaves"].items()
            },
            [
                Placement(tuple(grid), tuple(tuple(holders) for holders in boxes))
                for grid, boxes in record["placements"]
            ],
            list(record["directories"]),
        )

    def box(self, piece: Piece) -> Box:
        """Where a piece lies in its leaf."""
        leaf = self.leaves[piece.leaf]
        return box_of(leaf.shape, self.placements[leaf.placement].grid, piece.box)

    def written_by(self, process: int) -> list[Piece]:
        """The pieces that a process writes, in the order of its file."""
        pieces = []
        for number, (name, leaf) in enumerate(self.leaves.items()):
            placement = self.placements[leaf.placement]
            for box in _held(placement, process):
                if process in self.writers(number, placement, box):
                    pieces.append(Piece(name, box))
        return pieces

    def held_by(self, process: int) -> list[Piece]:
        """The pieces that a process has in its devices."""
        return [
            Piece(name, box)
            for name, leaf in self.leaves.items()
            for box in _held(self.placements[leaf.placement], process)
        ]

    def writers(self, number: int, placement: Placement, box: int) -> list[int]:
        """The processes that write a box of the leaf of that number: one per directory."""
        by_directory: dict[int, list[int]] = {}
        for holder in placement.holders[box]:
            by_directory.setdefault(self.directories[holder], []).append(holder)
        # Whole leaves take turns, so that the first process does not write all of them.
        return [holders[(number + box) % len(holders)] for holders in by_directory.values()]


@functools.lru_cache(maxsize=4096)
def _held(placement: Placement, process: int) -> tuple[int, ...]:
    return tuple(box for box, holders in enumerate(placement.holders) if process in holders)


def box_of(shape: Sequence[int], grid: Sequence[int], number: int) -> Box:
    """The place of a box in an array."""
    box: list[tuple[int, int]] = []
    for size, parts in zip(reversed(shape), reversed(grid), strict=True):
        number, part = divmod(number, parts)
        length = size // parts
        box.append((part * length, (part + 1) * length))
    return tuple(reversed(box))


def overlapping(shape: Sequence[int], box: Box, grid: Sequence[int]) -> Iterator[int]:
    """Numbers of the boxes of a grid that have elements in common with `box`."""
    ranges = []
    for size, (start, stop), parts in zip(shape, box, grid, strict=True):
        length = max(1, size // parts)
        ranges.append(range(start // length, math.ceil(stop / length)))
    for parts_of in itertools.product(*ranges):
        number = 0
        for part, parts in zip(parts_of, grid, strict=True):
            number = number * parts + part
        yield number


@dataclasses.dataclass(frozen=True)
class Transfer:
    """A piece that some process needs and does not find on its own host.

    Attributes:
      piece: of the saved catalogue.
      writer: the process that wrote it, by its number at the save.
      source: the process that gives it, by its number now.
    """

    piece: Piece
    writer: int
    source: int


@dataclasses.dataclass(frozen=True)
class Plan:
    """How a saved state comes to where it is wanted.

    Attributes:
      lacking: pieces that no directory has; when there are any, the rest is of no use.
      own: what this process reads on its own host: piece -> the process that wrote it.
      transfers: what goes from process to process, in an order that all agree on.
    """

    lacking: list[Piece]
    own: dict[Piece, int]
    transfers: list[Transfer]


def make_plan(
    saved: Catalogue,
    wanted: Catalogue,
    available: Mapping[int, int],
    process: int,
    damaged: Container[tuple[int, Piece]] = (),
) -> Plan:
    """Decide who reads and who gives what. The same on all processes, but for `own`.

    Args:
      saved: of the save.
      wanted: of today's gang, over the same leaves.
      available: for each process of the save whose files are there, today's directory of them.
      process: this one, today.
      damaged: pieces that are not to be used, each with the process that wrote it.
    """
    in_directory: dict[int, list[int]] = {}
    for number, directory in enumerate(wanted.directories):
        in_directory.setdefault(directory, []).append(number)
    plan = Plan([], {}, [])
    for number, (name, leaf) in enumerate(saved.leaves.items()):
        placement = saved.placements[leaf.placement]
        target = wanted.placements[wanted.leaves[name].placement]
        for box in range(len(placement.holders)):
            piece = Piece(name, box)
            found: dict[int, int] = {}  # Today's directory -> who wrote the box there.
            for writer in saved.writers(number, placement, box):
                if writer in available and (writer, piece) not in damaged:
                    found.setdefault(available[writer], writer)
            if not found:
                plan.lacking.append(piece)
                continue
            readers = _readers(leaf.shape, placement, box, target)
            if process in readers and wanted.directories[process] in found:
                plan.own[piece] = found[wanted.directories[process]]
            if all(wanted.directories[reader] in found for reader in readers):
                continue
            # Whoever has it gives, in turn.
            directory = sorted(found)[(number + box) % len(found)]
            givers = in_directory[directory]
            giver = givers[(number + box) % len(givers)]
            plan.transfers.append(Transfer(piece, found[directory], giver))
    return plan


@functools.lru_cache(maxsize=65536)
def _readers(
    shape: tuple[int, ...], placement: Placement, box: int, target: Placement
) -> frozenset[int]:
    """The processes that have elements of a box under another placement."""
    place = box_of(shape, placement.grid, box)
    return frozenset(
        holder
        for number in overlapping(shape, place, target.grid)
        for holder in target.holders[number]
    )
