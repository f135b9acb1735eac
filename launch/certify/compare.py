"""Where two runs differ first. Pure."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any

from launch.certify.records import AFTER, INITIAL, RESTORED, Execution, Parts, Records, Step

# In which order leaves that differ in one state are named: causes before their effects.
_ORDER = ("rng", "batch_statistics", "model", "optimizer", "params")

ROWS, METRIC, LEARNING_RATE, STATE, MISSING = "rows", "metric", "learning_rate", "state", "missing"


@dataclasses.dataclass(frozen=True)
class Difference:
    """The first thing in which a run differs from the reference.

    Attributes:
      attempt: of the run that differs.
      step: completed updates; of a step that differs, the one that it makes.
      what: ROWS, METRIC, LEARNING_RATE, STATE (after a step), INITIAL or RESTORED (what an attempt
        began with), or MISSING.
      name: of the leaf or metric, or the row in the global batch.
      kind: of the leaf, see `trainer.certify.recorder.kinds_of`.
      expected, found: the reference's value and the run's.
      resumed_at: the step that the attempt went on from; 0 for the beginning.
      others: further leaves or rows that differ at the same place.
    """

    attempt: int
    step: int
    what: str
    name: str
    kind: str = ""
    expected: Any = None
    found: Any = None
    resumed_at: int = 0
    others: tuple[str, ...] = ()

    def as_record(self) -> dict[str, Any]:
        """As JSON."""
        record = dataclasses.asdict(self)
        record["num_others"] = len(self.others)
        record["others"] = list(self.others[:20])
        return record


@dataclasses.dataclass(frozen=True)
class Tolerance:
    """How far numbers may be apart; 0 for bit by bit.

    Attributes:
      metric: relative, of the loss.
      states: whether the states after steps must be the same; else it is another topology.
    """

    metric: float = 0.0
    states: bool = True


def first_difference(
    reference: Records, run: Records, tolerance: Tolerance = Tolerance(), steps: int | None = None
) -> Difference | None:
    """Where a run differs first from the reference; None if it nowhere does.

    Every attempt is compared from the state that it began with to its last step: what was done
    twice must have been the same twice.

    Args:
      reference: ran without interruption.
      run: another of the same config.
      tolerance: of the losses; data, learning rates and counters have none.
      steps: that the run must have done; None where it may have stopped anywhere.
    """
    kinds = reference.facts.get("kinds", {})
    for attempt in run.attempts:
        for difference in _differences(reference, attempt, kinds, tolerance):
            return difference
    if steps is not None:
        return _missing(reference, run, steps)
    return None


def _differences(
    reference: Records, attempt: Execution, kinds: Mapping[str, str], tolerance: Tolerance
) -> Iterator[Difference]:
    if attempt.start is None:
        return
    for when in (INITIAL, RESTORED):
        # What is read back must be what was saved on any topology.
        other = not tolerance.states
        yield from _states(reference, attempt, attempt.start, when, kinds, other_topology=other)
    for number, step in sorted(attempt.steps.items()):
        wanted = reference.step(number)
        if wanted is None:
            continue
        found = _step(wanted, step, tolerance.metric)
        if found is not None:
            yield dataclasses.replace(
                found, attempt=attempt.number, step=number, resumed_at=attempt.start
            )
        if tolerance.states:
            yield from _states(reference, attempt, number, AFTER, kinds)


def _states(
    reference: Records,
    attempt: Execution,
    step: int,
    when: str,
    kinds: Mapping[str, str],
    *,
    other_topology: bool = False,
) -> Iterator[Difference]:
    found, wanted = attempt.states.get((step, when)), reference.state(step)
    if found is None or wanted is None:
        return
    if other_topology:
        found, wanted = _by_place(found, wanted)
    differing = [name for name in found if not _same_leaf(wanted.get(name), found[name])]
    if not differing:
        return
    # sorted() is stable: among leaves of one kind the first of the state's own order.
    differing.sort(key=lambda name: _place(kinds.get(name, "")))
    name = differing[0]
    expected, got = _different_part(wanted.get(name), found[name])
    yield Difference(
        attempt=attempt.number,
        step=step,
        what=STATE if when == AFTER else when,
        name=name,
        kind=kinds.get(name, ""),
        expected=expected,
        found=got,
        resumed_at=attempt.start or 0,
        others=tuple(differing[1:]),
    )


def _by_place(
    found: Mapping[str, Parts], wanted: Mapping[str, Parts]
) -> tuple[dict[str, Parts], dict[str, Parts]]:
    """Of both states the parts that both have, whichever process holds them."""
    ours, theirs = (
        {
            name: {(-1, place): digest for (_, place), digest in parts.items()}
            for name, parts in state.items()
        }
        for state in (found, wanted)
    )
    shared = {
        name: {part: digest for part, digest in parts.items() if part in theirs.get(name, {})}
        for name, parts in ours.items()
    }
    return shared, theirs


def _place(kind: str) -> int:
    return _ORDER.index(kind) if kind in _ORDER else len(_ORDER)


def _same_leaf(wanted: Parts | None, found: Parts) -> bool:
    return wanted is not None and all(wanted.get(part) == value for part, value in found.items())


def _different_part(wanted: Parts | None, found: Parts) -> tuple[str | None, str]:
    for part, value in found.items():
        expected = None if wanted is None else wanted.get(part)
        if expected != value:
            return expected, value
    raise AssertionError("called for a leaf that differs")


def _step(wanted: Step, found: Step, tolerance: float) -> Difference | None:
    """In what two executions of a step differ; rows first, for the rest follows from them."""

    def differs(what: str, name: str, expected: Any, got: Any, *others: str) -> Difference:
        return Difference(0, 0, what, name, expected=expected, found=got, others=others)

    rows = [row for row, digests in sorted(found.rows.items()) if wanted.rows.get(row) != digests]
    if rows:
        one = rows[0]
        expected, got = (sorted(step.rows.get(one, ())) for step in (wanted, found))
        return differs(ROWS, str(one), expected, got, *map(str, rows[1:]))
    rates, other_rates = set(wanted.learning_rate.values()), set(found.learning_rate.values())
    if not other_rates <= rates:
        return differs(LEARNING_RATE, "learning_rate", _one(rates), _one(other_rates))
    # The loss comes before the update, and the gradient's norm after the loss.
    for name in sorted(found.metrics, key=lambda name: (name != "loss", name)):
        if tolerance and name != "loss":
            continue
        number = next(iter(wanted.metrics.get(name, {}).values()), None)
        for value in found.metrics[name].values():
            if number is None or not _near(number, value, tolerance):
                return differs(METRIC, name, number, value)
    return None


def _near(one: float, other: float, tolerance: float) -> bool:
    if one == other or (math.isnan(one) and math.isnan(other)):
        return True
    return abs(one - other) <= tolerance * max(abs(one), abs(other))


def _one(values: set[Any]) -> Any:
    return next(iter(values), None)


def _missing(reference: Records, run: Records, steps: int) -> Difference | None:
    """A step that no attempt has recorded whole, or a last state that is not there."""
    first = min((a.start for a in run.attempts if a.start is not None), default=0)
    for number in range(first + 1, steps + 1):
        wanted = reference.step(number)
        rows: set[int] = set()
        for attempt in run.attempts:
            rows |= set(attempt.steps[number].rows) if number in attempt.steps else set()
        lacking = set(wanted.rows) - rows if wanted else {-1}
        if lacking:
            return Difference(-1, number, MISSING, f"row {min(lacking)}")
    if not any((steps, when) in a.states for a in run.attempts for when in (AFTER, RESTORED)):
        return Difference(-1, steps, MISSING, "the state")
    return None


def largest_loss_drift(reference: Records, run: Records) -> float:
    """The largest relative difference of a step's loss."""
    worst = 0.0
    for attempt in run.attempts:
        for number, step in attempt.steps.items():
            wanted = reference.step(number)
            if wanted is None or wanted.loss is None or step.loss is None:
                continue
            size = max(abs(wanted.loss), abs(step.loss))
            if size:
                worst = max(worst, abs(wanted.loss - step.loss) / size)
    return worst
