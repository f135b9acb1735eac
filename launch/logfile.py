"""One process's output as one stream of bytes, although its log is rotated while it is written.

The agent keeps a log's size bounded: it copies the beginning of `process-00003.log`, which the
process goes on writing to, to `process-00003.log.OFFSET` and cuts it off. OFFSET is where in the
output that segment begins. The first segment (`.0`) and the newest are kept, those between are
deleted; what is missing shows in names and sizes alone.
"""

from __future__ import annotations

import dataclasses
import os
import time
from pathlib import Path

_COMPARED_BYTES = 4096
_SETTLED_NANOSECONDS = 50_000_000  # More than a tick of any file system's clock but FAT's.


@dataclasses.dataclass(frozen=True)
class Segment:
    """A file that holds a part of the output.

    Attributes:
      path: the file.
      start: which byte of the output its first one is.
      size: in bytes, when it was looked at.
    """

    path: Path
    start: int
    size: int

    @property
    def end(self) -> int:
        """Where in the output its last byte ends."""
        return self.start + self.size


def segments(log: Path) -> list[Segment]:
    """The parts of a log that are there, in order; the last one is the log that is written to.

    Args:
      log: a process's log; [] if there is nothing of it.
    """
    offsets = _offsets(log)
    while True:
        size = _size(log)
        before, offsets = offsets, _offsets(log)
        if offsets == before:  # Else it was rotated in between.
            break
    found = []
    for offset in offsets:
        path = log.with_name(f"{log.name}.{offset}")
        copied = _size(path)
        if copied is not None:
            found.append(Segment(path, offset, copied))
    if size is None:
        return found
    live = Segment(log, found[-1].end if found else 0, size)
    if found and _is_prefix(found[-1], live):
        # Copied, and not emptied yet: the log itself still has all of it.
        live = Segment(log, found.pop().start, size)
    return [*found, live]


class LogReader:
    """Reads one process's output from any byte of it on, through rotation, in bounded memory.

    Attributes:
      path: the log.
      position: the byte of the output that comes next.
      left_out: bytes that were asked for and are not there any more; set to 0 by who tells of it.
    """

    def __init__(self, path: Path, position: int = 0):
        self.path = path
        self.position = position
        self.left_out = 0
        self._fd: int | None = None
        self._earlier: list[Segment] = []  # What is before the log itself, from the position on.
        self._start = 0  # Which byte of the output is the first of the log itself.
        self._size = 0
        self._listed_at: int | None = None  # The directory's time of change then.
        self._offsets: list[int] = []  # The segments that were there when it last took stock.

    @property
    def start(self) -> int:
        """Where in the output the log itself begins: above 0 once it was rotated."""
        return self._start

    def look(self) -> int:
        """Look at the log anew; returns how much of the output there is, in bytes."""
        if self._fd is None:
            try:
                self._fd = os.open(self.path, os.O_RDONLY)
            except OSError:
                return 0
            self._take_stock()
        size = os.fstat(self._fd).st_size
        if size != self._size:
            while size < self._size or self._was_rotated():
                was = self._start, self._size
                self._take_stock()
                size = os.fstat(self._fd).st_size
                if (self._start, self._size) == was:
                    break  # Copied, and about to be emptied.
            self._size = size
        return self._start + self._size

    def read(self, most: int) -> bytes:
        """The next bytes, at most so many; b"" at what was the end when it last looked."""
        while self._earlier:
            segment = self._earlier[0]
            data = self._read_segment(segment, most) if self.position < segment.end else b""
            if data:
                return data
            self._earlier.pop(0)
        if self._fd is None or self.position >= self._start + self._size:
            return b""
        self._jump(self._start)
        left = self._start + self._size - self.position
        data = os.pread(self._fd, min(most, left), self.position - self._start)
        self.position += len(data)
        return data

    def close(self) -> None:
        """Give the file back."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    def _read_segment(self, segment: Segment, most: int) -> bytes:
        try:
            with open(segment.path, "rb") as file:
                self._jump(segment.start)
                file.seek(self.position - segment.start)
                data = file.read(min(most, segment.end - self.position))
        except FileNotFoundError:
            return b""  # Deleted since: what comes after it says how much is missing.
        self.position += len(data)
        return data

    def _jump(self, start: int) -> None:
        if self.position < start:
            self.left_out += start - self.position
            self.position = start

    def _was_rotated(self) -> bool:
        """Whether there are other segments now; the directory is listed only if it was changed."""
        changed_at = self.path.parent.stat().st_mtime_ns
        if changed_at == self._listed_at:
            return False
        # Of a change that has just been made, another one in the same tick would not be seen.
        settled = time.time_ns() - changed_at > _SETTLED_NANOSECONDS
        self._listed_at = changed_at if settled else None
        return _offsets(self.path) != self._offsets

    def _take_stock(self) -> None:
        """Find out where the log stands in the output, and what there is before it."""
        self._offsets = _offsets(self.path)
        *earlier, live = segments(self.path) or [Segment(self.path, self._start, 0)]
        if live.end < self.position:
            # Emptied: what came between its copying and that was seen, and is in no file.
            self.position = live.start
        self._start, self._size = live.start, live.size
        self._earlier = [segment for segment in earlier if segment.end > self.position]


def _is_prefix(segment: Segment, live: Segment) -> bool:
    """Whether the log still begins with what was copied from it: compares both ends of the copy."""
    if not 0 < segment.size <= live.size:
        return False
    try:
        with open(segment.path, "rb") as one, open(live.path, "rb") as other:
            for offset in (0, max(0, segment.size - _COMPARED_BYTES)):
                count = min(_COMPARED_BYTES, segment.size)
                one.seek(offset)
                other.seek(offset)
                if one.read(count) != other.read(count):
                    return False
    except OSError:
        return False
    return True


def _offsets(log: Path) -> list[int]:
    """Where the segments begin that were copied from a log."""
    try:
        names = os.listdir(log.parent)
    except OSError:
        return []
    parts = (name.rpartition(".") for name in names if name.startswith(log.name))
    return sorted(int(end) for stem, _, end in parts if stem == log.name and end.isdigit())


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except OSError:
        return None
