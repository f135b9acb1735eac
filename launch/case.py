"""All that is known of one attempt, for `launch.verdict` to judge."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from launch.events import (
    Exited,
    Failure,
    HostLost,
    Interrupted,
    NotStarted,
    Progress,
    Raised,
    Stacks,
)
from launch.evidence import Fault, fault
from launch.watch import Overdue

_LISTED = 4  # So many processes are listed by their ids; more are counted.


@dataclasses.dataclass(frozen=True)
class Suspect:
    """The process that the others wait for, or that they gave up on.

    Attributes:
      process_id: None when no process stands out.
      message: one line.
      reason: what speaks for it and what to do, in sentences; "" when the message says it all.
      left: it left by itself, and does not hang.
    """

    process_id: int | None
    message: str
    reason: str = ""
    left: bool = False


@dataclasses.dataclass
class Case:
    """What was seen of an attempt. Recording costs O(1), for a lost host O(its processes).

    Attributes:
      hosts: in the order of the process ids that run over them.
      processes_per_host: on each.
      progress: the newest report of each process; shared with the watch.
      running: processes that may be alive.
      ends: how processes ended.
      faults: the processes that failed.
      lost: lost hosts that still had processes, and when they were last heard of.
      stacks: as they came.
      overdue: that the gang hangs, once it is certain.
      suspect: whom the gang waited for, as it was when it was told to stop.
      leaves_until: when the rest of the gang is killed after a process left with exit code 75.
      interrupted: that the machines were wanted back, before any failure.
      stop_requests: how often the user asked for the end.
      stopped_by_user: the user's wish came before any failure.
      stopped_at: when the gang was first told to stop.
      killed_at: when it was killed.
    """

    hosts: tuple[str, ...]
    processes_per_host: int
    progress: dict[int, Progress]
    running: set[int] = dataclasses.field(init=False)
    ends: dict[int, Exited | NotStarted] = dataclasses.field(default_factory=dict)
    faults: dict[int, Fault] = dataclasses.field(default_factory=dict)
    lost: dict[str, float] = dataclasses.field(default_factory=dict)
    stacks: dict[int, Stacks] = dataclasses.field(default_factory=dict)
    overdue: Overdue | None = None
    suspect: Suspect | None = None
    leaves_until: float | None = None
    interrupted: Interrupted | None = None
    stop_requests: int = 0
    stopped_by_user: bool = False
    stopped_at: float | None = None
    killed_at: float | None = None
    _raised: dict[int, Failure] = dataclasses.field(default_factory=dict)
    _places: dict[str, int] = dataclasses.field(init=False)  # Host -> its place in `hosts`.

    def __post_init__(self) -> None:
        self.running = set(range(self.num_processes))
        self._places = {host: place for place, host in enumerate(self.hosts)}

    @property
    def num_processes(self) -> int:
        """Members of the gang."""
        return len(self.hosts) * self.processes_per_host

    def knows(self, process_id: int) -> bool:
        """Whether there is such a process."""
        return 0 <= process_id < self.num_processes

    def host_of(self, process_id: int) -> str:
        """A process's host."""
        return self.hosts[process_id // self.processes_per_host]

    def first_process(self, host: str) -> int:
        """The lowest process id on a host; the others of the host follow it."""
        return self._places[host] * self.processes_per_host

    def record_end(self, end: Exited | NotStarted) -> Fault | None:
        """Take in an end; a second one of the same process is not believed.

        Returns:
          That the process failed, or None.
        """
        process_id = end.process_id
        if process_id in self.ends:
            return None
        self.ends[process_id] = end
        self.running.discard(process_id)
        found = fault(process_id, end, self._raised.get(process_id))
        # Also when it was no failure in the end: a program may catch what it recorded.
        self.faults.pop(process_id, None)
        return self._record_fault(found)

    def record_raised(self, event: Raised) -> Fault | None:
        """Take in an exception; returns that the process failed, or None if that is no news."""
        process_id = event.process_id
        if process_id in self._raised:
            return None
        self._raised[process_id] = event.failure
        found = fault(process_id, self.ends.get(process_id), event.failure)
        told = self.stopped_at is not None and self.stopped_at <= event.failure.at
        if found is not None and found.end is None and told:
            found = dataclasses.replace(found, told=True)
        return self._record_fault(found)

    def _record_fault(self, found: Fault | None) -> Fault | None:
        if found is not None:
            self.faults[found.process_id] = found
        return found

    def record_lost(self, event: HostLost) -> bool:
        """Take in a lost host; False if it was done, unknown, or lost before."""
        if event.host not in self._places or event.host in self.lost:
            return False
        first = self.first_process(event.host)
        gone = self.running.intersection(range(first, first + self.processes_per_host))
        if not gone:
            return False
        self.running -= gone
        self.lost[event.host] = event.at
        return True

    def last_step(self) -> int | None:
        """The furthest step that any process reported."""
        return max((report.step for report in self.progress.values()), default=None)

    def who(self, process_id: int) -> str:
        """A process in words."""
        return f"process {process_id}/{self.num_processes} on {self.host_of(process_id)}"

    def at_step(self, process_id: int) -> str:
        """Where a process was when it reported last, in words behind others; "" if unknown."""
        report = self.progress.get(process_id)
        return "" if report is None else f" at step {report.step} ({report.phase})"


def listed(processes: Iterable[int]) -> str:
    """Processes in words, however many there are: `process 3`, `processes 0, 1 and 2`."""
    ids = sorted(processes)
    if len(ids) == 1:
        return f"process {ids[0]}"
    shown = ids if len(ids) <= _LISTED else ids[: _LISTED - 1]
    if len(shown) == len(ids):
        return f"processes {', '.join(map(str, ids[:-1]))} and {ids[-1]}"
    return f"processes {', '.join(map(str, shown))} and {len(ids) - len(shown)} others"
