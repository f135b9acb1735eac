"""Follows one attempt: what is done about what happens to a gang until nothing of it is alive."""

from __future__ import annotations

import enum

from launch import contract, hang, stacks
from launch.case import Case
from launch.events import (
    Action,
    Event,
    Exited,
    HostLost,
    Interrupted,
    Kill,
    NotStarted,
    Progress,
    Raised,
    Stacks,
    Started,
    Stop,
    StopRequested,
    TakeStacks,
    Tick,
)
from launch.evidence import Fault, describe_end, describe_failure
from launch.spec import WatchPolicy
from launch.watch import Watch

FAILURE_GRACE_SECONDS = 2.0  # From asking the rest of a failed gang to stop until killing it.
# So long is waited for a better reason when a failure speaks of another process, and for a process
# to end that has recorded an exception.
DOUBT_SECONDS = 2.0
LOOK_SECONDS = 1.0  # At the most this often is the whole gang looked at.
STACKS_SECONDS = 5.0  # For the stacks of a gang that hangs.


class _Stage(enum.Enum):
    RUNNING = "running"
    DOUBTING = "doubting"  # Something failed, but perhaps for another reason still to be heard.
    LOOKING = "looking"  # The gang seems to hang; its stacks are awaited.
    LEAVING = "leaving"  # A process saved and left; the others have the grace period.
    STOPPING = "stopping"
    KILLED = "killed"


class AttemptState:
    """What is seen and done of one attempt. An event costs O(1), a lost host O(its processes), a
    look at the watch O(processes), at most once a second."""

    def __init__(
        self,
        hosts: tuple[str, ...],
        processes_per_host: int,
        *,
        grace_seconds: float,
        watch: WatchPolicy,
        reports: bool,
        now: float,
    ):
        num_processes = len(hosts) * processes_per_host
        self._watch = Watch(watch, num_processes, reports)
        self.case = Case(hosts, processes_per_host, self._watch.progress)
        self._grace_seconds = grace_seconds
        self._stage = _Stage.RUNNING
        self._due: float | None = None  # When the stage ends by itself.
        self._looked_at = now
        self._stacks_taken = False
        self._doubted: Fault | None = None

    @property
    def deadline(self) -> float | None:
        """When the next Tick is due at the latest."""
        if self._stage is not _Stage.RUNNING:
            return self._due
        return self._looked_at + LOOK_SECONDS if self._watch.watching else None

    def handle(self, event: Event, now: float) -> list[Action]:
        """Take in anything but GangGone."""
        if not self._is_ours(event):
            return []
        actions: list[Action] = []
        if isinstance(event, Started):
            if event.process_id in self.case.running:
                self._watch.started(event.process_id, now)
        elif isinstance(event, Progress):
            if event.process_id in self.case.running:
                self._watch.report(event, now)
        elif isinstance(event, Stacks):
            self.case.stacks[event.process_id] = event
        elif isinstance(event, Exited | NotStarted):
            actions = self._ended(event, now)
        elif isinstance(event, Raised):
            actions = self._failed(self.case.record_raised(event), now)
        elif isinstance(event, HostLost):
            actions = self._lost(event, now)
        elif isinstance(event, StopRequested):
            actions = self._asked_to_stop(now)
        elif isinstance(event, Interrupted):
            actions = self._interrupted(event, now)
        return actions or self._passing(now, looked=isinstance(event, Tick))

    def _is_ours(self, event: Event) -> bool:
        process_id = getattr(event, "process_id", None)
        return process_id is None or self.case.knows(process_id)

    @property
    def _stop_wanted(self) -> bool:
        """Whether the user has asked before."""
        return self.case.stop_requests > 1

    def _ended(self, event: Exited | NotStarted, now: float) -> list[Action]:
        known = event.process_id in self.case.ends
        fault = self.case.record_end(event)
        self._watch.ended(event.process_id)
        if known:
            return []
        left = isinstance(event, Exited) and event.exit_code == contract.EXIT_RESUMABLE
        if left and self._stage in (_Stage.RUNNING, _Stage.DOUBTING, _Stage.LOOKING):
            # No signal: the others are on their way to the same agreed stop.
            self.case.leaves_until = now + self._grace_seconds
            self._enter(_Stage.LEAVING, self.case.leaves_until)
            return []
        return self._failed(fault, now)

    def _failed(self, fault: Fault | None, now: float) -> list[Action]:
        """A process failed, or has more to say about its failure."""
        if fault is None or self._stage in (_Stage.STOPPING, _Stage.KILLED):
            return []
        if fault.own and fault.end is not None:
            return self._stop(now, FAILURE_GRACE_SECONDS, self._reason(fault))
        if self._stage is _Stage.LEAVING and not fault.own:
            return []  # Who leaves first takes the coordination service with it.
        if self._stage is _Stage.DOUBTING:
            return []
        self._doubted = fault
        self._enter(_Stage.DOUBTING, now + DOUBT_SECONDS)
        # Of a process that raised and does not end, the exception says enough.
        return [] if fault.own else self._take_stacks()

    def _reason(self, fault: Fault) -> str:
        what = describe_end(fault.end) if fault.end is not None else "has failed"
        if fault.failure is not None:
            what = f"failed: {describe_failure(fault.failure)}"
        return f"process {fault.process_id} {what}"

    def _lost(self, event: HostLost, now: float) -> list[Action]:
        if not self.case.record_lost(event):
            return []
        first = self.case.first_process(event.host)
        for process_id in range(first, first + self.case.processes_per_host):
            self._watch.ended(process_id)
        if self._stage in (_Stage.STOPPING, _Stage.KILLED):
            return []
        return self._stop(now, FAILURE_GRACE_SECONDS, f"host {event.host} was lost")

    def _interrupted(self, event: Interrupted, now: float) -> list[Action]:
        """The machines are wanted back."""
        if self._stage is _Stage.KILLED:
            return []
        if self._stage is _Stage.STOPPING:
            # The same told again, or less time than was said before.
            if self.case.interrupted and self._due is not None:
                self._due = min(self._due, now + event.seconds)
            return []
        if self._stage in (_Stage.RUNNING, _Stage.LEAVING) and not self.case.interrupted:
            self.case.interrupted = event
        seconds = event.seconds if self.case.interrupted else FAILURE_GRACE_SECONDS
        return self._stop(now, seconds, event.message)

    def _asked_to_stop(self, now: float) -> list[Action]:
        self.case.stop_requests += 1
        if self._stage is _Stage.STOPPING and self.case.interrupted and not self._stop_wanted:
            # On its way already, and for no less time than the user would give.
            self.case.stopped_by_user = True
            return []
        if self._stage in (_Stage.RUNNING, _Stage.LEAVING):
            self.case.stopped_by_user = True
            return self._stop(now, self._grace_seconds, "stop requested")
        if self._stage in (_Stage.DOUBTING, _Stage.LOOKING):
            return self._stop(now, FAILURE_GRACE_SECONDS, "stop requested")
        return self._kill(now, "stop requested again")

    def _passing(self, now: float, looked: bool) -> list[Action]:
        """What the time asks for."""
        if self._stage is _Stage.RUNNING:
            return self._look(now) if looked else []
        if self._stage is _Stage.LOOKING and self._all_stacks_came():
            return self._confirm(now)
        if self._due is None or now < self._due:
            return []
        if self._stage is _Stage.LOOKING:
            return self._confirm(now)
        if self._stage is _Stage.DOUBTING:
            assert self._doubted is not None
            fault = self.case.faults.get(self._doubted.process_id, self._doubted)
            return self._stop(now, FAILURE_GRACE_SECONDS, self._reason(fault))
        return self._kill(now, "the grace period is over")

    def _look(self, now: float) -> list[Action]:
        if now < self._looked_at + LOOK_SECONDS:
            return []
        self._looked_at = now
        if self._watch.overdue(now) is None:
            return []
        self._enter(_Stage.LOOKING, now + STACKS_SECONDS)
        return self._take_stacks()

    def _all_stacks_came(self) -> bool:
        return len(self.case.stacks) >= len(self.case.running) and self.case.running.issubset(
            self.case.stacks
        )

    def _confirm(self, now: float) -> list[Action]:
        """The stacks came, or are waited for no longer: does the gang still hang?"""
        overdue = self._watch.overdue(now)
        if overdue is None or self._is_busy(overdue.excuse):
            self.case.stacks.clear()
            self._stacks_taken = False
            self._enter(_Stage.RUNNING, None)
            # Stacks cost a little: not again before the time of what is waited for is over.
            self._looked_at = now + (overdue.limit_seconds if overdue else 0.0)
            return []
        self.case.overdue = overdue
        self.case.suspect = hang.suspect(self.case)
        return self._stop(now, FAILURE_GRACE_SECONDS, self.case.suspect.message)

    def _is_busy(self, processes: tuple[int, ...]) -> bool:
        """Whether one of these does something by itself, as far as its stack tells."""
        taken = self.case.stacks
        return any(
            not stacks.waits_in_jax(stacks.main_thread(taken[i].text)) if i in taken else True
            for i in processes
        )

    def _take_stacks(self) -> list[Action]:
        if self._stacks_taken or not self.case.running:
            return []
        self._stacks_taken = True
        return [TakeStacks()]

    def _enter(self, stage: _Stage, due: float | None) -> None:
        self._stage, self._due = stage, due

    def _stop(self, now: float, grace_seconds: float, reason: str) -> list[Action]:
        if self._stage is _Stage.DOUBTING and not any(f.own for f in self.case.faults.values()):
            # Now, because what is alive and what is not will be no evidence any more.
            self.case.suspect = hang.deserter(self.case)
        self.case.stopped_at = now
        self._enter(_Stage.STOPPING, now + grace_seconds if self.case.running else None)
        return [Stop(reason, grace_seconds)] if self.case.running else []

    def _kill(self, now: float, reason: str) -> list[Action]:
        if self._stage is _Stage.KILLED:
            return []
        self._enter(_Stage.KILLED, None)
        if not self.case.running:
            return []
        self.case.killed_at = now
        return [Kill(reason)]
