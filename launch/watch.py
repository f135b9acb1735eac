"""Notices that a gang's progress has come to a stand: a pure rule over reports and a clock.

A gang is as far as its last process. The processes that are the furthest behind, by step and then
by phase, are the ones that all others wait for; when even the newest of them to arrive there has
been there for longer than its phase allows, the gang hangs.
"""

from __future__ import annotations

import collections
import dataclasses
import statistics

from launch import contract
from launch.events import Progress
from launch.spec import WatchPolicy

_KEPT_DURATIONS = 64
_USUAL_STEPS = 3  # So many steps must be done before their time is taken for the usual one.

_RANKS = {phase: rank for rank, phase in enumerate(contract.PHASES)}
_LEAVING = "exit"
_SLOW_PHASES = ("save", "eval")  # Others may have them behind them at the same step, or before.


@dataclasses.dataclass(frozen=True)
class Overdue:
    """A gang that makes no progress.

    Attributes:
      cause: `hang`, or `start_timeout` for processes that never reported.
      processes: those that are the furthest behind, in order.
      step, phase: where they are; None and "" if they never reported.
      since: when they came there.
      limit_seconds: how long they may be there.
      at: when this was noticed.
      excuse: processes that save or evaluate at this step and have time left: the gang does not
        hang if they are busy with it, and does if they too wait for the others.
    """

    cause: str
    processes: tuple[int, ...]
    step: int | None
    phase: str
    since: float
    limit_seconds: float
    at: float
    excuse: tuple[int, ...] = ()


class Watch:
    """Follows the progress of one attempt's processes. Events cost O(1), `overdue` O(processes)."""

    def __init__(self, policy: WatchPolicy, num_processes: int, reports: bool):
        """Takes the limits, and whether every process of the program is known to report."""
        self._policy = policy
        self._num_processes = num_processes
        self._reports = reports
        self.progress: dict[int, Progress] = {}  # The newest report of each process.
        self._live: dict[int, float] = {}  # Running process -> its start.
        self._reporting: set[int] = set()  # Have said more than that they leave.
        self._first_report: float | None = None
        self._pacer: int | None = None  # The process whose steps are timed.
        self._anchor: Progress | None = None  # Its report at the start of what is timed.
        self._durations: collections.deque[float] = collections.deque(maxlen=_KEPT_DURATIONS)
        self._steps_timed = 0

    def started(self, process_id: int, now: float) -> None:
        """A process runs."""
        self._live.setdefault(process_id, now)

    def ended(self, process_id: int) -> None:
        """A process is gone."""
        self._live.pop(process_id, None)
        if self._pacer == process_id:
            self._pacer = self._anchor = None

    def report(self, event: Progress, now: float) -> None:
        """Take in what a process says of itself."""
        process_id = event.process_id
        self.progress[process_id] = event
        if event.phase == _LEAVING:
            return
        self._reporting.add(process_id)
        if self._first_report is None:
            self._first_report = now
        if self._pacer is None:
            self._pacer = process_id
        if self._pacer == process_id:
            self._time_steps(event)

    def _time_steps(self, event: Progress) -> None:
        if event.phase in _SLOW_PHASES:
            self._anchor = None  # What it spans would not be the time of a step.
            return
        anchor = self._anchor
        if anchor is not None and event.step > anchor.step:
            steps = event.step - anchor.step
            self._durations.append(max(0.0, event.since - anchor.since) / steps)
            self._steps_timed += steps
        if anchor is None or event.step != anchor.step:
            self._anchor = event

    @property
    def watching(self) -> bool:
        """Whether there is anything to look at as time passes."""
        return bool(self._reporting)

    def overdue(self, now: float) -> Overdue | None:
        """Does the gang hang? None while nothing has been reported, and where all is well."""
        if not self.watching:
            return None
        return self._stands_still(now) or self._never_came(now)

    def _stands_still(self, now: float) -> Overdue | None:
        reports = [self.progress[i] for i in self._live if i in self._reporting]
        # A process that leaves waits for the others, not they for it: unless all leave.
        staying = [report for report in reports if report.phase != _LEAVING]
        reports = staying or reports
        if not reports:
            return None
        least = min(_place(report) for report in reports)
        behind = [report for report in reports if _place(report) == least]
        newest = max(behind, key=lambda report: report.since)
        limit = self.limit_seconds(newest.phase)
        if now - newest.since <= limit:
            return None
        savers = [report for report in reports if self._has_time_left(report, newest, now)]
        processes = tuple(sorted(report.process_id for report in behind))
        oldest = min(behind, key=lambda report: report.since)
        excuse = tuple(sorted(report.process_id for report in savers))
        place = newest.step, newest.phase
        return Overdue("hang", processes, *place, oldest.since, limit, now, excuse)

    def _has_time_left(self, report: Progress, behind: Progress, now: float) -> bool:
        """Whether a process is in a phase for which one that looks behind may be waiting. Who waits
        for data waits for nobody."""
        return (
            report.phase in _SLOW_PHASES
            and report.step == behind.step
            and behind.phase != "data"
            and now - report.since <= self.limit_seconds(report.phase)
        )

    def _never_came(self, now: float) -> Overdue | None:
        """Processes that have not reported while others have."""
        # Where nobody promised it, a program may well let its lead alone report.
        if not self._reports and len(self._reporting) * 2 <= self._num_processes:
            return None
        assert self._first_report is not None
        limit = self._policy.start_seconds
        late = {}
        for process_id, started in self._live.items():
            since = max(started, self._first_report)
            if process_id not in self.progress and now - since > limit:
                late[process_id] = since
        if not late:
            return None
        since = min(late.values())
        return Overdue("start_timeout", tuple(sorted(late)), None, "", since, limit, now)

    def limit_seconds(self, phase: str) -> float:
        """How long a process may be in a phase; a word of the program's own counts as a step."""
        if phase != "step" and phase in _RANKS:
            return getattr(self._policy, f"{phase}_seconds")
        if self._steps_timed < _USUAL_STEPS:
            return self._policy.compile_seconds
        usual = statistics.median(self._durations)
        return max(self._policy.step_min_seconds, self._policy.step_medians * usual)


def is_leaving(report: Progress | None) -> bool:
    """Whether a process has said that it is on its way out."""
    return report is not None and report.phase == _LEAVING


def _place(report: Progress) -> tuple[int, int]:
    """How far a process is; a phase of the program's own counts as `step`."""
    return report.step, _RANKS.get(report.phase, _RANKS["step"])
