"""What one process's end says: whether it failed, by itself or of another's death, and of what.

The texts are those of JAX 0.10 to 0.12, its coordination service, Gloo and NCCL.
"""

from __future__ import annotations

import dataclasses
import re
import signal

from launch import contract
from launch.events import Exited, Failure, NotStarted

_SHELL_SIGNAL_BASE = 128  # A shell exits with 128 + n when signal n ended its child.

# The coordination service's last word, from C++, before it aborts a process for another's sake.
_SERVICE_GAVE_UP = "Terminating process because the JAX distributed service detected fatal errors"
# In an exception of JAX's: a peer is gone or silent. Other things happen to be UNAVAILABLE too.
_PEER_GONE = re.compile(
    r"\bGloo\b.*\bfailed\b|gloo/transport/|Application timeout caused pair closure"
    r"|coordination.?service|CoordinationService|\bheartbeat|preemption sync"
    r"|Socket closed|Connection (reset|closed) by peer|Connection refused|Broken pipe"
    r"|failed to connect to all addresses|DEADLINE_EXCEEDED|[Bb]arrier (failed|timed out)"
    r"|remote process exited or there was a network error|unhandled system error"
    r"|ncclRemoteError|ncclSystemError",
    re.DOTALL,
)
# Python's own exceptions are the program's unless they carry what only these libraries write.
_PEER_GONE_IN_PLAIN = re.compile(
    r"\bGloo [\w-]+ failed|gloo/transport/|tensorflow\.CoordinationServiceError"
    r"|/(xla|tensorflow)\.coordination\.CoordinationService/"
    r"|Timed out while waiting for \w+ barrier"  # Orbax, of processes that do not come.
)
_JAX_ERRORS = ("JaxRuntimeError", "XlaRuntimeError")
_UNHEALTHY = re.compile(
    r"\bTask (\d+) heartbeat timeout"
    r"|unhealthy \(stopped sending heartbeats\):((?:\s+(?:/job:\w+/\S*task:)?\d+\b(?!/))+)"
)
_FIRST_TO_LEAVE = re.compile(
    r"Shutdown::.*?The first task at the barrier: (?:/job:\w+/\S*task:)?(\d+)", re.DOTALL
)

_DEVICE_MEMORY = re.compile(
    r"RESOURCE_EXHAUSTED|Out of memory (while trying to allocate|allocating)"
    r"|Ran out of memory (in|on)"
)
# Said by C++, of Abseil ("mmap error: 12" is ENOMEM) and LLVM too, before it aborts.
_HOST_MEMORY = re.compile(
    r"std::bad_alloc|Cannot allocate memory|\bmmap error: 12\b|LLVM ERROR: out of memory"
)
_CANNOT_LOAD = ("SyntaxError", "IndentationError", "TabError", "ImportError", "ModuleNotFoundError")

_TRACEBACK = "Traceback (most recent call last):"
_EXCEPTION = re.compile(r"^(?P<type>[A-Za-z_][\w.]*)(?:: (?P<message>.*))?$")
# What may follow an uncaught exception in a log: C++ logging, crash handlers, JAX's remark.
_AFTERMATH = re.compile(
    r"^([EFWI]\d{4} \d\d:|\*\*\*|-{10,}$|For simplicity, JAX|Fatal Python error|\[Gloo\])"
)


@dataclasses.dataclass(frozen=True)
class Fault:
    """That a process failed.

    Attributes:
      process_id: which.
      at: when; of the exception where there was one, else of the end.
      end: its end; None while it still runs.
      failure: the exception: the recorded one, or else what its last lines show.
      told: it came after a signal of ours.
      of_a_peer: it speaks of another process's death or silence.
    """

    process_id: int
    at: float
    end: Exited | NotStarted | None
    failure: Failure | None
    told: bool = False
    of_a_peer: bool = False

    @property
    def collateral(self) -> bool:
        """Whether it would not have happened but for another process or ourselves."""
        return self.told or self.of_a_peer

    @property
    def accuses(self) -> tuple[int, ...]:
        """The processes that it names as the reason."""
        return self.failure.accuses if self.failure else ()

    @property
    def own(self) -> bool:
        """Whether the process failed of itself."""
        return not self.collateral and not self.accuses

    @property
    def exit_code(self) -> int | None:
        """The exit code, where there is one."""
        return self.end.exit_code if isinstance(self.end, Exited) else None

    @property
    def last_lines(self) -> tuple[str, ...]:
        """The last lines of its log."""
        return self.end.last_lines if isinstance(self.end, Exited) else ()


def fault(
    process_id: int, end: Exited | NotStarted | None, raised: Failure | None = None
) -> Fault | None:
    """Make out whether, and how, a process failed; None if it did not.

    Args:
      process_id: which.
      end: how it ended; None while it runs.
      raised: what it recorded while it ran.
    """
    if isinstance(end, NotStarted):
        return Fault(process_id, end.ended_at, end, None)
    if end is None:
        if raised is None:
            return None
        return Fault(process_id, raised.at, None, raised, of_a_peer=_speaks_of_a_peer(raised))
    if end.exit_code in (contract.EXIT_DONE, contract.EXIT_RESUMABLE):
        return None
    failure = end.failure or raised or failure_in(end.last_lines, end.ended_at)
    at = failure.at if failure else end.ended_at
    if failure is not None:
        of_a_peer = _speaks_of_a_peer(failure)
    else:
        of_a_peer = any(_SERVICE_GAVE_UP in line for line in end.last_lines)
    told = end.told_at is not None and end.told_at <= at
    return Fault(process_id, at, end, failure, told, of_a_peer)


def _speaks_of_a_peer(failure: Failure) -> bool:
    if type_name(failure) in _JAX_ERRORS:
        return bool(_PEER_GONE.search(failure.message))
    return bool(_PEER_GONE_IN_PLAIN.search(failure.message))


def failure_in(lines: tuple[str, ...], at: float) -> Failure | None:
    """The uncaught exception that a log ends with, for programs that record none.

    A traceback that a program printed and lived on after is not one: what follows it must be empty
    or the noise of a process that goes down.
    """
    starts = [number for number, line in enumerate(lines) if line.strip() == _TRACEBACK]
    if not starts:
        return None
    for number in range(starts[-1] + 1, len(lines)):
        line = lines[number]
        if line.startswith((" ", "\t")) or not line.strip():
            continue
        found = _EXCEPTION.match(line)
        if not found:
            return None
        after = next((text for text in lines[number + 1 :] if text.strip()), "")
        if after and not _AFTERMATH.match(after):
            return None
        traceback = "\n".join(lines[starts[-1] : number + 1]) + "\n"
        return Failure(found["type"], found["message"] or "", traceback, at)
    return None


def type_name(failure: Failure) -> str:
    """An exception's class without its module."""
    return failure.type.rpartition(".")[2]


def out_of_memory(fault: Fault) -> str | None:
    """`device` or `host` if that is what the process ran out of, else None."""
    failure = fault.failure
    if failure is not None:
        if type_name(failure) in _JAX_ERRORS and _DEVICE_MEMORY.search(failure.message):
            return "device"
        if type_name(failure).endswith("MemoryError") or _HOST_MEMORY.search(failure.message):
            return "host"
    end = fault.end
    if isinstance(end, Exited):
        if end.oom_killed:
            return "host"
        if end.exit_code != contract.EXIT_CONFIG and failure is None:
            return "host" if any(map(_HOST_MEMORY.search, end.last_lines)) else None
    return None


def cannot_load(failure: Failure | None) -> bool:
    """Whether the program cannot even be loaded, which no further attempt can change."""
    return failure is not None and type_name(failure) in _CANNOT_LOAD


def silent_peers(fault: Fault) -> tuple[int, ...]:
    """The processes that the coordination service no longer heard of, as this end tells it."""
    found: set[int] = set()
    for one, several in _UNHEALTHY.findall(_text(fault)):
        found |= {int(one)} if one else {int(number) for number in re.findall(r"\d+", several)}
    return tuple(sorted(found))


def first_to_leave(fault: Fault) -> int | None:
    """The process that went to the shutdown barrier while the others went on, as this end tells."""
    found = _FIRST_TO_LEAVE.search(_text(fault))
    return int(found[1]) if found else None


def _text(fault: Fault) -> str:
    message = fault.failure.message if fault.failure else ""
    return "\n".join([message, *fault.last_lines])


def fatal_signal(end: Exited | NotStarted | None) -> int | None:
    """The signal that ended a process, also if a shell in between made an exit code of it."""
    if not isinstance(end, Exited):
        return None
    if end.signal is not None or end.exit_code is None:
        return end.signal
    number = end.exit_code - _SHELL_SIGNAL_BASE
    return number if number in {s.value for s in signal.Signals} else None


def signal_name(number: int) -> str:
    """`SIGKILL` for 9; a plain number for a signal without a name."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def describe_end(end: Exited | NotStarted) -> str:
    """How a process ended, in words."""
    if isinstance(end, NotStarted):
        return f"could not be started: {end.message}"
    if end.oom_killed:
        return "was killed by the kernel, which had no memory left"
    if end.signal is not None:
        return f"was killed by {signal_name(end.signal)}"
    number = fatal_signal(end)
    what = f", which stands for {signal_name(number)}" if number is not None else ""
    return f"exited with code {end.exit_code}{what}"


def describe_failure(failure: Failure) -> str:
    """An exception as the last line of a traceback; its first line, and not endless."""
    message = failure.message.strip().split("\n", 1)[0]
    message = message if len(message) <= 300 else message[:297] + "..."
    name = failure.type.removeprefix("builtins.")
    return f"{name}: {message}" if message else name
