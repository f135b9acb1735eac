"""Goodput: of the time that a run has taken, the share in which it got on. Pure."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

# What the time of a run is shared out to, in the order in which it is shown.
PARTS = (
    "stepping",  # steps that counted
    "lost_work",  # steps that a later attempt did again
    "init",
    "compile",
    "restore",
    "data_wait",
    "checkpoint",
    "eval",
    "queueing",  # for machines
    "down",  # between two attempts
    "other",  # starting processes, leaving, and what no phase accounts for
)

_PART_OF_PHASE = {
    "init": "init",
    "compile": "compile",
    "restore": "restore",
    "data": "data_wait",
    "step": "stepping",
    "save": "checkpoint",
    "eval": "eval",
}


@dataclasses.dataclass(frozen=True)
class AttemptTimes:
    """What is needed of an attempt. Times are seconds since the epoch.

    Attributes:
      started_at, ended_at: of the whole gang; `ended_at` is now if it runs.
      phase_seconds: by phase, of the lead process.
      first_step, last_step: that it reported; None if it never did.
      resumed_step: the checkpoint's that it went on from; None where that is not on record.
      queued_since: when it began to wait for its machines; None where nothing is waited for.
      wall_seconds: from its start to its end by a steady clock; None where only the times above are
        known, which are wrong where a clock was set meanwhile.
      waited_seconds: likewise, from the end of the attempt before to its start.
      wanted_after: whether the run should have gone on after it. Time after a stop by the user or
        after completion is no part of the run.
    """

    started_at: float
    ended_at: float
    phase_seconds: Mapping[str, float]
    first_step: int | None = None
    last_step: int | None = None
    resumed_step: int | None = None
    queued_since: float | None = None
    wall_seconds: float | None = None
    waited_seconds: float | None = None
    wanted_after: bool = True


@dataclasses.dataclass(frozen=True)
class Goodput:
    """Where a run's time went.

    Attributes:
      wall_seconds: all of it.
      seconds: by PARTS; they sum to `wall_seconds`.
    """

    wall_seconds: float
    seconds: Mapping[str, float]

    @property
    def shares(self) -> dict[str, float]:
        """Parts of 1, by PARTS."""
        return {part: value / self.wall_seconds for part, value in self.seconds.items()}


def goodput(
    attempts: Sequence[AttemptTimes], now: float | None = None, queued: bool = False
) -> Goodput | None:
    """Share out a run's time.

    Args:
      attempts: in order.
      now: while another attempt is waited for: the time until then counts as down,
      queued: or as queueing, if what is waited for are machines.

    Returns:
      None when no time has passed, or no attempt says how it spent its time.
    """
    if not any(attempt.phase_seconds for attempt in attempts):
        return None
    seconds = dict.fromkeys(PARTS, 0.0)
    # Clocks may differ between the hosts that wrote the records: time never runs backwards here.
    first = attempts[0]
    clock = min(first.started_at, first.queued_since or first.started_at)
    wanted = True
    for index, attempt in enumerate(attempts):
        if attempt.waited_seconds is None or index == 0:
            started_at = max(clock, attempt.started_at)
            gap = started_at - clock
        else:
            started_at, gap = attempt.started_at, attempt.waited_seconds
        since = started_at if attempt.queued_since is None else attempt.queued_since
        queued_seconds = min(gap, max(0.0, started_at - since))
        seconds["queueing"] += queued_seconds
        if wanted:
            seconds["down"] += gap - queued_seconds
        clock = max(started_at, attempt.ended_at)
        wall_seconds = clock - started_at
        if attempt.wall_seconds is not None:
            wall_seconds = attempt.wall_seconds
            clock = max(clock, started_at + wall_seconds)
        spent = _spent(attempt, wall_seconds)
        lost = spent["stepping"] * _share_lost(attempts, index)
        spent["stepping"] -= lost
        spent["lost_work"] += lost
        for part, value in spent.items():
            seconds[part] += value
        wanted = attempt.wanted_after
    if now is not None:
        seconds["queueing" if queued else "down"] += max(0.0, now - clock)
    wall_seconds = sum(seconds.values())
    return Goodput(wall_seconds, seconds) if wall_seconds > 0 else None


def _spent(attempt: AttemptTimes, wall_seconds: float) -> dict[str, float]:
    """An attempt's time by parts, which sum to all of it."""
    seconds = dict.fromkeys(PARTS, 0.0)
    for phase, value in attempt.phase_seconds.items():
        seconds[_PART_OF_PHASE.get(phase, "other")] += max(0.0, value)
    told = sum(seconds.values())
    if told > wall_seconds:  # By a clock that runs faster than the controller's.
        return {part: value * wall_seconds / told for part, value in seconds.items()}
    seconds["other"] += wall_seconds - told
    return seconds


def _share_lost(attempts: Sequence[AttemptTimes], index: int) -> float:
    """Of an attempt's steps, the share beyond where any later attempt went on."""
    first, last = _from_step(attempts[index]), attempts[index].last_step
    later = [_from_step(attempt) for attempt in attempts[index + 1 :]]
    went_on = min((step for step in later if step is not None), default=None)
    if first is None or last is None or went_on is None or last <= first:
        return 0.0
    return (last - min(last, max(first, went_on))) / (last - first)


def _from_step(attempt: AttemptTimes) -> int | None:
    """Where an attempt went on; None where it did not get so far as to do a step."""
    if attempt.resumed_step is not None:
        return attempt.resumed_step
    first, last = attempt.first_step, attempt.last_step
    return first if first is not None and last is not None and last > first else None
