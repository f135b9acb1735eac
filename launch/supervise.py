"""What to do about what happens to a gang: a pure state machine, events in, actions out.

Nothing is started, read or waited for here, and time comes with the events.
"""

from __future__ import annotations

import dataclasses
import signal
from collections.abc import Sequence

from launch import contract

FAILURE_GRACE_SECONDS = 2.0  # From asking the rest of a failed gang to stop until killing it.
_SHELL_SIGNAL_BASE = 128  # A shell exits with 128 + n when signal n ended its child.


@dataclasses.dataclass(frozen=True)
class Exited:
    """A process ended: `exit_code` or `signal` is set. `ended_at` is its host's clock, seconds."""

    process_id: int
    exit_code: int | None
    signal: int | None
    ended_at: float


@dataclasses.dataclass(frozen=True)
class NotStarted:
    """A process could not be started at all."""

    process_id: int
    message: str
    ended_at: float


@dataclasses.dataclass(frozen=True)
class HostLost:
    """A host's agent is gone without having said that it is done."""

    host: str


@dataclasses.dataclass(frozen=True)
class StopRequested:
    """The user wants the run to end: once gracefully, twice at once."""


@dataclasses.dataclass(frozen=True)
class Tick:
    """Nothing happened but time passing."""


Event = Exited | NotStarted | HostLost | StopRequested | Tick


@dataclasses.dataclass(frozen=True)
class Stop:
    """Send SIGTERM to every process group; `reason` is for the user."""

    reason: str


@dataclasses.dataclass(frozen=True)
class Kill:
    """Send SIGKILL to every process group; `reason` is for the user."""

    reason: str


Action = Stop | Kill


@dataclasses.dataclass(frozen=True)
class Verdict:
    """How an attempt ended.

    Attributes:
      cause: one of the causes that attempt.json knows.
      exit_code: of the whole run.
      message: one line for the user; empty when there is nothing to explain.
      guilty_process, guilty_host: who caused it, where somebody did.
    """

    cause: str
    exit_code: int
    message: str = ""
    guilty_process: int | None = None
    guilty_host: str | None = None


def signal_name(number: int) -> str:
    """`SIGKILL` for 9; a plain number for a signal without a name."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def describe_exit(exited: Exited | NotStarted) -> str:
    """How a process ended, in words."""
    if isinstance(exited, NotStarted):
        return f"could not be started: {exited.message}"
    if exited.signal is not None:
        return f"was killed by {signal_name(exited.signal)}"
    return f"exited with code {exited.exit_code}"


class Supervisor:
    """Follows one attempt.

    The first process to fail is guilty; what others do after that is collateral. A process that
    ends with code 0 is done and the others are waited for; one that ends with 75 has saved and
    left, and so must the others within the grace period.
    """

    def __init__(self, process_hosts: Sequence[str], grace_seconds: float):
        """Takes each process's host name, by process id, and the user's grace period."""
        self._hosts = tuple(process_hosts)
        self._grace_seconds = grace_seconds
        self._running = set(range(len(self._hosts)))
        self._ends: dict[int, Exited | NotStarted] = {}
        self._lost_host: str | None = None
        self._failed = False
        self._stop_requests = 0
        self._killed = False
        self.deadline: float | None = None  # When a Tick is due, on the clock of `now`.

    @property
    def finished(self) -> bool:
        """Whether every process has ended."""
        return not self._running

    def handle(self, event: Event, now: float) -> list[Action]:
        """Take in one event at time `now` (seconds of any steady clock)."""
        if isinstance(event, (Exited, NotStarted)):
            return self._ended(event, now)
        if isinstance(event, HostLost):
            return self._lost(event.host, now)
        if isinstance(event, StopRequested):
            return self._asked_to_stop(now)
        due = self.deadline is not None and now >= self.deadline
        return self._kill("the grace period is over") if due else []

    def _lost(self, host: str, now: float) -> list[Action]:
        self._running -= {i for i, name in enumerate(self._hosts) if name == host}
        if self._failed or self._lost_host is not None:
            return []
        self._lost_host = host
        return self._stop(now, FAILURE_GRACE_SECONDS, f"host {host} was lost")

    def _asked_to_stop(self, now: float) -> list[Action]:
        self._stop_requests += 1
        if self._stop_requests == 1 and not self._failed and self._lost_host is None:
            return self._stop(now, self._grace_seconds, "stop requested")
        return self._kill("stop requested again")

    def _ended(self, event: Exited | NotStarted, now: float) -> list[Action]:
        self._running.discard(event.process_id)
        self._ends[event.process_id] = event
        if not self._running:
            self.deadline = None
            return []
        stopping = self._stop_requests > 0 or self._lost_host is not None
        if _is_failure(event) and not stopping:
            first = not self._failed
            self._failed = True
            reason = f"process {event.process_id} {describe_exit(event)}"
            return self._stop(now, FAILURE_GRACE_SECONDS, reason) if first else []
        left_early = isinstance(event, Exited) and event.exit_code == contract.EXIT_RESUMABLE
        if left_early and self.deadline is None and not self._killed:
            # No signal: the others are on their way to the same agreed stop.
            self.deadline = now + self._grace_seconds
        return []

    def _stop(self, now: float, grace_seconds: float, reason: str) -> list[Action]:
        if self._killed or not self._running:
            return []
        self.deadline = now + grace_seconds
        return [Stop(reason)]

    def _kill(self, reason: str) -> list[Action]:
        self.deadline = None
        if self._killed or not self._running:
            return []
        self._killed = True
        return [Kill(reason)]

    def verdict(self) -> Verdict:
        """The end of the attempt; call it when `finished`."""
        if self._stop_requests and not self._failed:
            return self._verdict_of_stop()
        failures = [end for end in self._ends.values() if _is_failure(end)]
        if failures and (self._failed or self._lost_host is None):
            # By the hosts' own clocks: reports of two hosts may overtake one another.
            return self._blame(min(failures, key=lambda end: end.ended_at))
        if self._lost_host is not None:
            message = f"host {self._lost_host} was lost: its agent is gone"
            return Verdict("host_lost", contract.EXIT_FAILED, message, guilty_host=self._lost_host)
        codes = {end.exit_code for end in self._ends.values() if isinstance(end, Exited)}
        if contract.EXIT_RESUMABLE in codes:
            message = "the program stopped early and can be resumed: start the same command again"
            return Verdict("preempted", contract.EXIT_RESUMABLE, message)
        return Verdict("completed", contract.EXIT_DONE)

    def _verdict_of_stop(self) -> Verdict:
        """After the user's stop any end is expected, except a failure of the program's own."""
        for end in sorted(self._ends.values(), key=lambda end: end.ended_at):
            if _is_failure(end) and not self._killed and not _is_death_by_signal(end):
                blamed = self._blame(end)
                message = f"while stopping, {blamed.message}"
                return dataclasses.replace(blamed, cause="stopped", message=message)
        message = "stopped; start the same command again to go on"
        return Verdict("stopped", contract.EXIT_RESUMABLE, message)

    def _blame(self, end: Exited | NotStarted) -> Verdict:
        host = self._hosts[end.process_id]
        who = f"process {end.process_id}/{len(self._hosts)} on {host}"
        if isinstance(end, NotStarted) or end.exit_code == contract.EXIT_CONFIG:
            cause, code = "config", contract.EXIT_CONFIG
        elif end.signal is not None:
            cause, code = "killed", contract.EXIT_FAILED
        else:
            cause, code = "exception", contract.EXIT_FAILED
        return Verdict(cause, code, f"{who} {describe_exit(end)}", end.process_id, host)


def _is_failure(end: Exited | NotStarted) -> bool:
    if isinstance(end, NotStarted):
        return True
    return end.exit_code not in (contract.EXIT_DONE, contract.EXIT_RESUMABLE)


def _is_death_by_signal(end: Exited | NotStarted) -> bool:
    if isinstance(end, NotStarted):
        return False
    return end.signal is not None or (end.exit_code or 0) > _SHELL_SIGNAL_BASE
