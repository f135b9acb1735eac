"""What to do about what happens to a run: a pure state machine, events and a clock in, actions out.

Nothing is started, read or waited for here, and time comes with the events. One attempt is alive at
a time: the next starts after the last process of the one before is gone and its verdict recorded.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable

from launch import contract
from launch.attempt_state import AttemptState
from launch.events import (
    Action,
    Close,
    Event,
    Finish,
    GangGone,
    HostLeaving,
    Interrupted,
    Requeue,
    Retry,
    Start,
    StopRequested,
    Tick,
    Verdict,
)
from launch.restart import PREEMPTIONS, Outcome, Restarts, next_hosts
from launch.spec import RestartPolicy, WatchPolicy
from launch.verdict import judge


def _always(_: int) -> bool:
    return True


@dataclasses.dataclass(frozen=True)
class Policy:
    """What the user wants of a run.

    Attributes:
      hosts: all of them; process ids run over them in this order.
      processes_per_host: on each.
      grace_seconds: from asking the gang to stop, for the user, until killing it.
      restart: see RestartPolicy.
      watch: see WatchPolicy.
      hosts_min: the fewest hosts of an attempt after hosts were lost; None for all.
      fits: whether a gang of so many hosts can run the config.
      reports: whether every process of the program is known to report progress.
      furthest_step: that attempts before this `muster run` reached; None if there were none.
      history: of the attempts of this `muster run` before this process took it over, in order.
      queued: machines come from a queue, and are given back when others are needed, or when their
        owner wants them.
      mends_machines: who gives the machines looks after them, and makes those anew that are lost.
      rng: for the jitter of waits.
    """

    hosts: tuple[str, ...]
    processes_per_host: int = 1
    grace_seconds: float = 60.0
    restart: RestartPolicy = dataclasses.field(default_factory=RestartPolicy)
    watch: WatchPolicy = dataclasses.field(default_factory=WatchPolicy)
    hosts_min: int | None = None
    fits: Callable[[int], bool] = _always
    reports: bool = False
    furthest_step: int | None = None
    history: tuple[Outcome, ...] = ()
    queued: bool = False
    mends_machines: bool = False
    rng: random.Random = dataclasses.field(default_factory=random.Random)


class Supervisor:
    """Follows a run from its first attempt to its last."""

    def __init__(self, policy: Policy):
        self._policy = policy
        self._hosts = policy.hosts
        self._restarts = Restarts(
            policy.restart,
            reports=policy.reports,
            furthest_step=policy.furthest_step,
            rng=policy.rng,
        )
        self._attempt: AttemptState | None = None
        self._start_at: float | None = None  # Of the next attempt; None for at once.
        self._leaving: set[str] = set()
        self._final: int | None = None  # The exit code when history leaves nothing to be done.
        self.finished = False
        for outcome in policy.history:
            retry = self._restarts.after(outcome)
            self._final = None if retry.again else outcome.verdict.exit_code

    @property
    def deadline(self) -> float | None:
        """When the next Tick is due at the latest, on the clock of `now`; None if nothing is waited
        for."""
        if self.finished:
            return None
        return self._start_at if self._attempt is None else self._attempt.deadline

    def handle(self, event: Event, now: float) -> list[Action]:
        """Take in one event at time `now` (seconds of any steady clock).

        The first Tick starts the first attempt. Between two attempts
        only a Tick and the user's stop mean anything; after Finish nothing does.
        """
        if self.finished:
            return []
        if isinstance(event, HostLeaving):
            self._leaving.add(event.host)
            return []
        if self._attempt is None:
            return self._between(event, now)
        if isinstance(event, GangGone):
            return self._close(self._attempt, now)
        return self._attempt.handle(event, now)

    def _between(self, event: Event, now: float) -> list[Action]:
        if isinstance(event, StopRequested):
            return [self._finish(contract.EXIT_RESUMABLE)]
        if isinstance(event, Interrupted):
            again = self._policy.queued and event.cause in PREEMPTIONS and self._final is None
            requeue: list[Action] = [Requeue(tuple(sorted(self._leaving)))] if again else []
            return [*requeue, self._finish(contract.EXIT_RESUMABLE)]
        if not isinstance(event, Tick) or (self._start_at is not None and now < self._start_at):
            return []
        if self._final is not None:
            return [self._finish(self._final)]
        self._attempt = AttemptState(
            self._hosts,
            self._policy.processes_per_host,
            grace_seconds=self._policy.grace_seconds,
            watch=self._policy.watch,
            reports=self._policy.reports,
            now=now,
        )
        return [Start(self._hosts)]

    def _close(self, attempt: AttemptState, now: float) -> list[Action]:
        case = attempt.case
        verdict = judge(case)
        guilty = verdict.guilty_process
        report = None if guilty is None else case.progress.get(guilty)
        outcome = Outcome(verdict, report.step if report else None, case.last_step())
        retry = self._restarts.after(outcome)
        if retry.again and case.stop_requests:
            retry = Retry(False, "not tried again: the run was asked to stop")
        self._attempt = None
        if not retry.again:
            return [Close(verdict, retry), self._finish(verdict.exit_code)]
        gone = self._leaving.union(case.lost)
        if self._policy.queued and (gone or verdict.cause in PREEMPTIONS):
            why = retry.why.partition(", again in")[0]
            if self._policy.mends_machines:
                why += ", again when its machines are in order"
            else:
                why += ", back to the queue"
                why += f" without {', '.join(sorted(gone))}" if gone else ""
            return [
                Close(verdict, Retry(True, why)),
                Requeue(tuple(sorted(gone)), retry.delay_seconds),
                self._finish(contract.EXIT_RESUMABLE),
            ]
        self._start_at = now + retry.delay_seconds
        return [Close(verdict, self._choose_hosts(case.hosts, case.lost, verdict, retry))]

    def _choose_hosts(
        self, used: tuple[str, ...], lost: dict[str, float], verdict: Verdict, retry: Retry
    ) -> Retry:
        """Choose the next attempt's hosts; returns the retry with a word on them if they change."""
        gone = frozenset(lost) if verdict.cause == "host_lost" else frozenset()
        policy = self._policy
        self._hosts = next_hosts(policy.hosts, used, gone, policy.hosts_min, policy.fits)
        if self._hosts == used:
            return retry
        number = len(self._hosts)
        word = "one host" if number == 1 else f"{number} hosts"
        return dataclasses.replace(retry, why=f"{retry.why}, on {word} instead of {len(used)}")

    def _finish(self, exit_code: int) -> Finish:
        self.finished = True
        return Finish(exit_code)
