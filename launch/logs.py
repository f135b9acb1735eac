"""`muster logs`: what a run's processes printed, and with --follow what they go on to print."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from launch import contract, registry, rundir
from launch.console import LogFollower, discard_output, left_out
from launch.errors import ConfigError
from launch.logfile import LogReader
from launch.standing import standing

_FOLLOW_SECONDS = 0.1
_READ_BYTES = 1 << 20


def logs(run: str, flags: Mapping[str, str]) -> int:
    """Print logs; returns the exit code."""
    path = registry.find(run)
    process = flags.get("process", "0")
    if process != "all" and not process.isdigit():
        raise ConfigError("--process", "must be 'all' or a process's number", process)
    numbers = rundir.attempt_numbers(path)
    pinned = _attempt(flags["attempt"], numbers) if "attempt" in flags else None
    try:
        if "follow" in flags:
            _follow(path, process, pinned)
        else:
            number = max(numbers, default=0) if pinned is None else pinned
            for log in _Logs(path, number, process).each:
                log.print_all()
            sys.stdout.buffer.flush()
    except BrokenPipeError:
        discard_output()  # The reader had enough.
    return contract.EXIT_DONE


def _attempt(value: str, known: Sequence[int]) -> int:
    if not value.isdigit() or int(value) not in known:
        shown = ", ".join(map(str, known)) or "none"
        raise ConfigError("--attempt", f"there is no such attempt; there are: {shown}", value)
    return int(value)


class _Log:
    """One process's log, its lines marked with their process or not."""

    def __init__(self, path: Path, prefix: bytes):
        self._path = path
        self._prefix = prefix
        self._follower = LogFollower(path)

    def print_all(self) -> None:
        """Print what there is: byte for byte, or line by line with the prefix."""
        if self._prefix:
            self.print_new(last=True)
            return
        reader = LogReader(self._path)
        end = reader.look()
        at_line_start = True
        while reader.position < end and (data := reader.read(_READ_BYTES)):
            if reader.left_out:
                # A line of its own, whatever the gap has cut.
                note = left_out(reader.left_out) + b"\n"
                _write(note if at_line_start else b"\n" + note)
                reader.left_out = 0
            _write(data)
            at_line_start = data.endswith(b"\n")
        reader.close()

    def print_new(self, last: bool) -> None:
        """Print the lines that were added since."""
        for line in self._follower.read(last):
            _write(self._prefix + line + b"\n")

    def close(self) -> None:
        """Give the file back."""
        self._follower.close()


class _Logs:
    """The logs of an attempt that were asked for."""

    def __init__(self, run: Path, number: int, process: str):
        """Raises ConfigError if the attempt has no such process."""
        folder = rundir.attempt_path(run, number)
        num_processes = rundir.num_processes(run, rundir.attempt_record(run, number))
        if process == "all":
            prefixes = {i: f"[process {i}/{num_processes}] ".encode() for i in range(num_processes)}
        elif int(process) < num_processes:
            prefixes = {int(process): b""}
        else:
            rule = f"must be 'all' or from 0 to {num_processes - 1}" if num_processes else "no log"
            raise ConfigError("--process", f"{rule} in attempt {number}", process)
        self.each = [_Log(rundir.log_path(folder, i), mark) for i, mark in prefixes.items()]

    def print_new(self, last: bool) -> None:
        """Print what was added to any of them."""
        for log in self.each:
            log.print_new(last)
        sys.stdout.buffer.flush()

    def close(self) -> None:
        """Give the files back."""
        for log in self.each:
            log.close()


def _follow(run: Path, process: str, pinned: int | None) -> None:
    """Print what there is and what is added: until the attempt that was asked for has ended, or
    until the run has."""
    if not rundir.attempt_numbers(run):
        next_attempt(run, -1)
    newest = max(rundir.attempt_numbers(run), default=0)
    number = newest if pinned is None else pinned
    while True:
        logs = _Logs(run, number, process)
        _follow_attempt(run, number, logs)
        logs.close()
        if pinned is not None or not next_attempt(run, number):
            return
        number += 1
        print(f"muster: attempt {number}", file=sys.stderr, flush=True)


def _follow_attempt(run: Path, number: int, logs: _Logs) -> None:
    while True:
        # Asked for before the logs are read: whoever has ended writes no more.
        ended = bool(rundir.attempt_record(run, number).get("cause")) or not standing(run).goes_on
        logs.print_new(last=ended)
        if ended:
            return
        time.sleep(_FOLLOW_SECONDS)


def next_attempt(run: Path, number: int) -> bool:
    """Wait for the attempt after this one; False when the run is over."""
    while True:
        over = not standing(run).goes_on
        if number + 1 in rundir.attempt_numbers(run):
            return True
        if over:
            return False
        time.sleep(_FOLLOW_SECONDS)


def _write(data: bytes) -> None:
    sys.stdout.buffer.write(data)
