"""Which arrays fill a device's memory, as XLA's dump of a compilation tells it.

The dump is written also for a program that does not fit, where there is nothing else to read.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

_ALLOCATION = re.compile(r"allocation \d+: (?:0x[0-9a-f]+, )?size (\d+)(.*)")
_VALUE = re.compile(
    r"\s+value: <\d+ (\S+?)(?:\{([\d,]*)\})? @\d+> \(size=(\d+),offset=(\d+)\): (.*)"
)
_RANGE = re.compile(r"\s+(\S+?)\{([\d,]*)\}:(\d+)-(\d+)")
_PARAMETER = re.compile(r"parameter (\d+)")


@dataclasses.dataclass(frozen=True)
class Buffer:
    """A value that lies in an allocation.

    Attributes:
      name: of the instruction that makes it.
      index: which element of its tuple, "" for the only one.
      size: bytes, as laid out on the device.
      offset: in the allocation.
      shape: as XLA writes it.
    """

    name: str
    index: str
    size: int
    offset: int
    shape: str


class Allocation(NamedTuple):
    """A piece of memory.

    Attributes:
      size: bytes.
      kind: `argument`, `output` or `temp`.
      parameter: number of the argument, or None.
      buffers: what lies in it, at one time or another.
    """

    size: int
    kind: str
    parameter: int | None
    buffers: tuple[Buffer, ...]


class Dump(NamedTuple):
    """What a dump says of memory.

    Attributes:
      allocations: in the device's main memory.
      ranges: (instruction, index) -> first and last moment of its life. Of what a loop carries
        the moments in the loop are left out; `trainer.plan.lives` adds them.
      order: instruction -> its moment.
      text: the compiled module.
    """

    allocations: list[Allocation]
    ranges: dict[tuple[str, str], tuple[int, int]]
    order: dict[str, int]
    text: str

    def bytes_of(self, kind: str) -> int:
        """Bytes of all allocations of a kind."""
        return sum(one.size for one in self.allocations if one.kind == kind)


def read_dump(directory: Path, function: str) -> Dump | None:
    """Read what XLA dumped of a jitted function; None where there is nothing.

    Args:
      directory: the option `xla_dump_to`.
      function: its name.
    """
    assignments = sorted(directory.rglob(f"*jit_{function}.*buffer-assignment.txt"))
    if not assignments:
        return None
    path = assignments[-1]
    stem = path.name.removesuffix("-buffer-assignment.txt")
    ranges = path.with_name(f"{stem}-live-range.txt")
    module = path.with_name(f"{stem}.txt")
    lives = ranges.read_text() if ranges.exists() else ""
    return Dump(
        allocations=parse_allocations(path.read_text()),
        ranges=parse_ranges(lives),
        order=parse_order(lives),
        text=module.read_text() if module.exists() else "",
    )


def parse_allocations(text: str) -> list[Allocation]:
    """Allocations of the device's main memory, from the text of a buffer assignment."""
    found: list[Allocation] = []
    buffers: list[Buffer] = []
    skip = True
    for line in text.splitlines():
        if match := _ALLOCATION.match(line):
            kind, parameter = _kind(match[2])
            # A colour other than 0 is another memory (VMEM, SMEM, the host's).
            skip = kind is None or re.search(r"\bcolor [1-9]", match[2]) is not None
            buffers = []
            if not skip and kind is not None:
                found.append(Allocation(int(match[1]), kind, parameter, ()))
        elif not skip and (match := _VALUE.match(line)):
            name, index, size, offset, shape = match.groups()
            buffers.append(Buffer(name, index or "", int(size), int(offset), shape))
            found[-1] = found[-1]._replace(buffers=tuple(buffers))
        elif not line.startswith(" "):
            skip = True
    return found


def _kind(notes: str) -> tuple[str | None, int | None]:
    if "thread-local" in notes or "constant" in notes:
        return None, None
    if parameter := _PARAMETER.search(notes):
        return "argument", int(parameter[1])
    if "maybe-live-out" in notes or "output" in notes:
        return "output", None
    return "temp", None


def parse_ranges(text: str) -> dict[tuple[str, str], tuple[int, int]]:
    """(instruction, index) -> first and last moment, from the text of the live ranges."""
    at = text.find("BufferLiveRange:")
    lines = text[at:].splitlines() if at >= 0 else []
    return {
        (match[1], match[2]): (int(match[3]), int(match[4]))
        for line in lines
        if (match := _RANGE.match(line))
    }


def parse_order(text: str) -> dict[str, int]:
    """Instruction -> moment, from the text of the live ranges: loops' bodies lie before them."""
    sequence = text.partition("InstructionSequence:")[2].partition("BufferLiveRange:")[0]
    return {name: int(moment) for moment, name in re.findall(r"(\d+):(\S+)", sequence)}


def at_the_peak(dump: Dump) -> list[Buffer]:
    """The temporaries that live when these take the most room, largest first.

    Where nothing tells when they live: those that do not overlap, largest first.
    """
    buffers = [buffer for one in dump.allocations if one.kind == "temp" for buffer in one.buffers]
    if not any((one.name, one.index) in dump.ranges for one in buffers):
        return _apart(buffers)
    changes: dict[int, list[tuple[Buffer, bool]]] = {}
    for buffer in buffers:
        start, end = dump.ranges.get((buffer.name, buffer.index), (0, -1))
        if end >= start:
            changes.setdefault(start, []).append((buffer, True))
            changes.setdefault(end + 1, []).append((buffer, False))
    alive: dict[Buffer, None] = {}
    best: list[Buffer] = []
    most = 0
    for moment in sorted(changes):
        for buffer, born in changes[moment]:
            if born:
                alive[buffer] = None
            else:
                alive.pop(buffer, None)
        if sum(buffer.size for buffer in alive) > most:
            apart = _apart(alive)
            size = sum(buffer.size for buffer in apart)
            if size > most:
                best, most = apart, size
    return best


def _apart(buffers: Iterable[Buffer]) -> list[Buffer]:
    """Those that share no byte with a larger one: values of one place are one array to its user."""
    taken: list[Buffer] = []
    for buffer in sorted(buffers, key=lambda one: -one.size):
        if buffer.size < 1 << 10:
            break
        overlaps = any(
            buffer.offset < other.offset + other.size and other.offset < buffer.offset + buffer.size
            for other in taken
        )
        if not overlaps:
            taken.append(buffer)
    return taken
