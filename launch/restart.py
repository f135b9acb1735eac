"""Whether an attempt is followed by another: budgets, waits, and when to give up. Pure."""

from __future__ import annotations

import dataclasses
import random
import re
from collections.abc import Callable, Mapping
from typing import Any

from launch import contract
from launch.events import Failure, Retry, Verdict
from launch.evidence import cannot_load, type_name
from launch.spec import RestartPolicy

PREEMPTIONS = ("preempted", "time_limit", "host_lost")
_NEVER = ("completed", "config", "stopped")
_ADDRESS = re.compile(r"\b0x[0-9a-fA-F]+\b")
_OF_THE_NETWORK = re.compile(r"Connection|Timeout|HTTP|URLError|gaierror", re.IGNORECASE)
_MAX_DOUBLINGS = 60  # More would not fit a float, and no wait is that long.


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How an attempt ended, as far as it matters to the next.

    Attributes:
      verdict: on it.
      guilty_step: where the guilty process was; None if it did not say.
      last_step: the furthest that any process reported; None if none did.
    """

    verdict: Verdict
    guilty_step: int | None
    last_step: int | None


def outcome_of(record: Mapping[str, Any]) -> Outcome:
    """How an attempt ended, by its record."""
    raised = record.get("exception")
    failure = None
    if raised:
        failure = Failure(raised["type"], raised["message"], raised["traceback"], 0.0)
    verdict = Verdict(
        record["cause"],
        int(record.get("exit_code", contract.EXIT_FAILED)),
        record.get("message", ""),
        record.get("guilty_process"),
        record.get("guilty_host"),
        failure=failure,
    )
    return Outcome(verdict, record.get("guilty_step"), record.get("last_step"))


class Restarts:
    """Decides after each attempt of a run. The budgets are those of one `muster run`."""

    def __init__(
        self,
        policy: RestartPolicy,
        *,
        reports: bool,
        furthest_step: int | None,
        rng: random.Random,
    ):
        """Starts with full budgets.

        Args:
          policy: the budgets and waits.
          reports: whether the program is known to report progress.
          furthest_step: that attempts before have reached; None if there were none.
          rng: for the jitter.
        """
        self._policy = policy
        self._reports = reports
        self._furthest_step = furthest_step
        self._rng = rng
        self._failures = 0
        self._preemptions = 0
        self._without_gain = 0
        self._last_exception: tuple[int | None, str, str] | None = None

    def after(self, outcome: Outcome) -> Retry:
        """Decide what follows an attempt; call it once for each, in order."""
        self._note_progress(outcome.last_step)
        again = self._note_exception(outcome)
        cause = outcome.verdict.cause
        if cause in _NEVER:
            return Retry(again=False)
        if cannot_load(outcome.verdict.failure):
            return Retry(False, "not tried again: a program that cannot be loaded stays so")
        preempted = cause in PREEMPTIONS
        field = "max_preemptions" if preempted else "max_failures"
        budget = getattr(self._policy, field)
        if budget == 0:
            return Retry(False, f"not tried again: --cluster.restart.{field} is 0")
        if again:
            return Retry(False, again)
        spent = self._preemptions if preempted else self._failures
        what = "interruption" if preempted else "failure"
        if spent >= budget:
            return Retry(False, f"given up: {what} {spent + 1}, and restart.{field} is {budget}")
        limit = self._policy.max_attempts_without_progress
        if limit and self._reports and self._without_gain >= limit:
            return Retry(False, f"given up: {self._stuck()}")
        if preempted:
            self._preemptions += 1
        else:
            self._failures += 1
        delay = self._delay()
        return Retry(True, f"{what} {spent + 1} of {budget}, again in {delay:.1f} s", delay)

    def _note_progress(self, last_step: int | None) -> None:
        gained = last_step is not None and last_step > (self._furthest_step or 0)
        self._without_gain = 0 if gained else self._without_gain + 1
        if last_step is not None:
            self._reports = True
            self._furthest_step = max(last_step, self._furthest_step or 0)

    def _stuck(self) -> str:
        number = self._without_gain
        attempts = "one attempt" if number == 1 else f"{number} attempts in a row"
        return f"{attempts} got no further than step {self._furthest_step or 0}"

    def _note_exception(self, outcome: Outcome) -> str:
        """Remember what was raised, and say so if it is the same as in the attempt before."""
        failure, step = outcome.verdict.failure, outcome.guilty_step
        before, self._last_exception = self._last_exception, None
        if failure is None or outcome.verdict.cause not in ("exception", "oom"):
            return ""
        if step is None and _OF_THE_NETWORK.search(failure.type):
            return ""  # Before the first step a peer or a server may just not be there yet.
        self._last_exception = (step, failure.type, _normalized(failure))
        if self._last_exception != before:
            return ""
        where = "before any step" if step is None else f"at step {step}"
        return f"given up: the same {type_name(failure)} {where} twice; it would fail again"

    def _delay(self) -> float:
        """Seconds until the next attempt: twice as long after each one that gained nothing."""
        doublings = min(max(0, self._without_gain - 1), _MAX_DOUBLINGS)
        longest = min(self._policy.max_backoff_seconds, self._policy.backoff_seconds * 2**doublings)
        return longest * (1.0 - 0.5 * self._rng.random())


def _normalized(failure: Failure) -> str:
    """A message without what differs from one process to the next."""
    return _ADDRESS.sub("0x", failure.message)


def next_hosts(
    configured: tuple[str, ...],
    used: tuple[str, ...],
    lost: frozenset[str],
    hosts_min: int | None,
    fits: Callable[[int], bool],
) -> tuple[str, ...]:
    """The hosts of a further attempt.

    Args:
      configured: all hosts, in order.
      used: those of the attempt that ended.
      lost: those of them that were lost; a smaller gang goes on without them, if it may.
      hosts_min: the fewest hosts that a gang may have; None for all of them.
      fits: whether a gang of so many hosts can run the config.

    Returns:
      As many of the hosts that are left as fit, in order; all configured ones when too few are
      left, for a lost host may come back.
    """
    if not lost:
        return used
    left = tuple(host for host in used if host not in lost)
    if hosts_min is not None:
        for number in range(len(left), hosts_min - 1, -1):
            if number > 0 and fits(number):
                return left[:number]
    return configured
