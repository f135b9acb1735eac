"""Reads the Python stacks that faulthandler writes: where a process is, and which ones differ.

A jitted call waits in C++ below the caller's own frame, so that a process which waits for the
others and one which sleeps can both stand in the user's file. What tells them apart is where most
of them are.
"""

from __future__ import annotations

import dataclasses
import re
from collections import defaultdict
from collections.abc import Mapping

from launch.events import Stacks

# faulthandler names threads since Python 3.14.
_THREAD = re.compile(r"^(Current thread|Thread|Stack)\b.*\(most recent call first\):$", re.M)
_FRAME = re.compile(r'^ +File "(?P<file>.*)", line (?P<line>\d+|\?+) in (?P<function>.+)$', re.M)
_TOO_MANY_THREADS = re.compile(r"^\.\.\.$", re.M)  # At the left edge; frames are indented.
# Where JAX's Python waits for the other processes, or calls what does.
_WAITS = re.compile(r"/(jax|jaxlib)/|/trainer/(agreement|rollcall)\.py$|/orbax/.*multihost")
# Compiling and tracing are work of this process's own.
_WORKS = re.compile(r"/jax/_src/(compiler|compilation_cache|interpreters/(mlir|partial_eval))\.py$")
_WAITING_HELPERS = re.compile(r"/(threading|queue|socket|selectors|concurrent/futures/_base)\.py$")
_LIBRARY = re.compile(r"/(site|dist)-packages/|/lib/python3[^/]*/|^<")


@dataclasses.dataclass(frozen=True)
class Frame:
    """One call: `function` of `file`, at `line`, as faulthandler writes them."""

    file: str
    line: str
    function: str

    def __str__(self) -> str:
        return f"{self.function} at {self.file}:{self.line}"


@dataclasses.dataclass(frozen=True)
class Comparison:
    """What the stacks of a gang say together.

    Attributes:
      odd: the processes that are elsewhere than most, or did not answer while busy; in order.
      waiting: the processes that wait for others.
      where_waiting: in words, where those are.
    """

    odd: tuple[int, ...] = ()
    waiting: tuple[int, ...] = ()
    where_waiting: str = ""


def main_thread(text: str) -> tuple[Frame, ...]:
    """The main thread's frames, newest first; empty when the text has none."""
    threads = list(_THREAD.finditer(text))
    if not threads:
        return ()
    # Threads are written newest first, so that the main one comes last. Where that is cut off, the
    # kernel's habit helps: it gives a process's signals to the main thread.
    current = [thread for thread in threads if thread[1] == "Current thread"]
    main = current[-1] if current and _TOO_MANY_THREADS.search(text) else threads[-1]
    after = [thread.start() for thread in threads if thread.start() > main.start()]
    frames = _FRAME.finditer(text, main.end(), min(after, default=len(text)))
    return tuple(Frame(frame["file"], frame["line"], frame["function"]) for frame in frames)


def waits_in_jax(frames: tuple[Frame, ...]) -> bool:
    """Whether these frames wait for other processes, as far as Python can tell."""
    for frame in frames:
        if not _WAITING_HELPERS.search(frame.file):
            return bool(_WAITS.search(frame.file)) and not _WORKS.search(frame.file)
    return False


def where(frames: tuple[Frame, ...]) -> str:
    """Where the frames are, in words; with the user's own line if the newest is a library's."""
    if not frames:
        return ""
    own = next((frame for frame in frames if not _LIBRARY.search(frame.file)), frames[0])
    called = "" if own == frames[0] else f", called from {own.file}:{own.line}"
    return f"{frames[0]}{called}"


def compare(stacks: Mapping[int, Stacks]) -> Comparison:
    """Find the processes that do not wait for the others while most do."""
    mains = {process: main_thread(taken.text) for process, taken in stacks.items()}
    in_jax = {process for process, frames in mains.items() if waits_in_jax(frames)}
    places: dict[tuple[str, str], set[int]] = defaultdict(set)
    for process, frames in mains.items():
        if frames and process not in in_jax:
            places[frames[0].file, frames[0].line].add(process)
    crowd = max(places.values(), key=len, default=set())
    crowd = crowd if len(crowd) > 1 else set()
    waiting = in_jax | crowd
    silent = {p for p, frames in mains.items() if not frames}
    busy = {p for p in silent if stacks[p].state == "R"}
    odd = set(mains) - waiting - (silent - busy)
    if not waiting or len(odd) > len(mains) / 2:
        return Comparison()
    if in_jax >= crowd or len(in_jax) >= len(crowd):
        told = "in the collective"
    else:
        frame = mains[min(crowd)][0]
        told = f"at {frame.file}:{frame.line}"
    return Comparison(tuple(sorted(odd)), tuple(sorted(waiting)), told)
