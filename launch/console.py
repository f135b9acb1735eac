"""What the user sees of a run: the processes' lines as they come, and the launcher's own."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from launch import contract, rundir
from launch.logfile import LogReader

_READ_BYTES = 1 << 18  # Most that is read of one log in one go.
_BEHIND_BYTES = 1 << 21  # Further behind than this, the reader skips ahead.
_TAIL_BYTES = 1 << 16  # Where it goes on, and what is searched for a log's last lines.
# Gloo prints a line per group and rank as it connects; the logs keep them.
_NOISE = b"[Gloo] Rank "
_LINE_BYTES = 1 << 14  # A longer line is shown in parts.


class LogFollower:
    """Reads the lines that are added to one log, through its rotation, in bounded memory."""

    def __init__(self, path: Path, position: int = 0):
        """Start at byte `position` of the process's output."""
        self.path = path
        self._reader = LogReader(path, position)
        self._partial = b""

    def read(self, last: bool = False) -> list[bytes]:
        """New lines, without their ends; `last` gives an unfinished one too."""
        lines: list[bytes] = []
        end = self._reader.look()
        if end - self._reader.position > _BEHIND_BYTES:
            lines += self._skip_to(end - _TAIL_BYTES)
        while data := self._reader.read(_READ_BYTES):
            if self._reader.left_out:
                lines.append(left_out(self._reader.left_out))
                data = self._after_gap(data)
            *complete, self._partial = (self._partial + data).split(b"\n")
            lines += complete
            if len(self._partial) > _LINE_BYTES:
                lines.append(self._partial)
                self._partial = b""
        if last and self._partial:
            lines.append(self._partial)
            self._partial = b""
        return lines

    def close(self) -> None:
        """Give the file back."""
        self._reader.close()

    def _skip_to(self, position: int) -> list[bytes]:
        """Go on from there; returns the note that says so and the lines that follow at once."""
        skipped = position - self._reader.position
        self._reader.position = position
        data = self._reader.read(_TAIL_BYTES)
        # The line on which it lands has lost its beginning.
        start = data.find(b"\n") + 1
        self._partial = b""
        *lines, self._partial = data[start:].split(b"\n")
        skipped += start + self._reader.left_out
        self._reader.left_out = 0
        where = "all of it is in" if self._reader.start == 0 else "what is kept of it is in"
        return [f"[{skipped / 1e6:.1f} MB not shown; {where} {self.path}]".encode(), *lines]

    def _after_gap(self, data: bytes) -> bytes:
        """What follows a gap, without the rest of the line that the gap has cut."""
        self._reader.left_out = 0
        self._partial = b""
        return data[data.find(b"\n") + 1 :]


def left_out(count: int) -> bytes:
    """The line that stands for bytes of a log that are not kept."""
    size = f"{count / 1e6:.1f} MB" if count >= 1e5 else f"{count} bytes"
    return f"[muster: {size} left out here]".encode()


class Console:
    """Shows followed logs on standard output and the launcher's own words on standard error.

    On a terminal the lead's newest progress line stays in place.
    """

    def __init__(self, shown: Sequence[int], prefixed: bool, held_back: bytes = b""):
        """Show the processes in `shown`; `prefixed` marks each line with its process.

        Lines that start with `held_back` wait for `show_held`: the launcher's last words may say
        the same.
        """
        self._held_back = held_back
        self._held: list[bytes] = []
        self._shown = shown
        self._num_processes = 0
        self._prefixed = prefixed
        self._followers: dict[int, LogFollower] = {}
        self._in_place = sys.stdout.isatty() and not prefixed
        self._progress_shown = False

    def follow(self, attempt: Path, num_processes: int) -> None:
        """Go on with an attempt's logs."""
        for follower in self._followers.values():
            follower.close()
        self._held = []
        self._num_processes = num_processes
        shown = [process_id for process_id in self._shown if process_id < num_processes]
        self._followers = {i: LogFollower(rundir.log_path(attempt, i)) for i in shown}

    def show_new(self, last: bool = False) -> None:
        """Show what was logged since the last call."""
        for process_id, follower in self._followers.items():
            prefix = f"[process {process_id}/{self._num_processes}] ".encode()
            for line in follower.read(last):
                self._show(prefix + line if self._prefixed else line)
        if last:
            self._leave_progress()
        self._flush()

    def show_held(self) -> None:
        """Show the lines that were held back."""
        held, self._held = self._held, []
        for line in held:
            self._show(line, hold=False)
        self._flush()

    def say(self, text: str) -> None:
        """Print words of the launcher's own."""
        self._leave_progress()
        self._flush()
        # Is the terminal gone? Its hang-up signal decides what becomes of the run.
        with contextlib.suppress(OSError):
            print(text, file=sys.stderr, flush=True)

    def _show(self, line: bytes, hold: bool = True) -> None:
        if line.startswith(_NOISE) and not self._prefixed:
            return
        if hold and self._held_back and line.startswith(self._held_back):
            self._held.append(line)
            return
        progress = self._in_place and line.startswith(contract.PROGRESS_PREFIX.encode())
        if progress:
            columns = os.get_terminal_size(sys.stdout.fileno()).columns or 80
            text = line.decode("utf-8", "replace")[: columns - 1]
            self._write(b"\r" + text.encode() + b"\x1b[K")
        else:
            start = b"\r\x1b[K" if self._progress_shown else b""
            self._write(start + line + b"\n")
        self._progress_shown = progress

    def _leave_progress(self) -> None:
        if self._progress_shown:
            self._write(b"\n")
            self._progress_shown = False

    def _write(self, data: bytes) -> None:
        try:
            sys.stdout.buffer.write(data)
        except OSError:
            discard_output()

    def _flush(self) -> None:
        try:
            sys.stdout.buffer.flush()
        except OSError:
            discard_output()


def discard_output() -> None:
    """Nobody reads any more (`muster run | head`): the run goes on, its logs have it all."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)


def print_all(text: str) -> None:
    """Print what a command has to say, to a reader who may leave (`muster status | head`)."""
    try:
        print(text)
        sys.stdout.flush()
    except BrokenPipeError:
        discard_output()


def last_lines(path: Path, count: int) -> list[str]:
    """The last lines of a log, however large it is."""
    try:
        with open(path, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - _TAIL_BYTES))
            lines = file.read().decode("utf-8", "replace").splitlines()
    except OSError:
        return []
    return [line for line in lines if line.strip()][-count:]
