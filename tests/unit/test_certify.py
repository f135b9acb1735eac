"""What `muster certify` decides: what differs first, and what that points to."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from launch.certify import compare, diagnose, judge
from launch.certify.compare import first_difference
from launch.certify.records import AFTER, INITIAL, RESTORED, Execution, Records, Step
from launch.certify.records import read as read_records

LEAVES = {
    "model.rngs.count": "rng",
    "model.norm.mean": "batch_statistics",
    "model.w": "params",
    "optimizer.mu.w": "optimizer",
}


# ------------------------------------------------------------------ runs, made up


def step_of(number: int, **changes: Any) -> Step:
    """A step of two processes with four rows."""
    step = Step(
        rows={row: {f"row {4 * number + row}"} for row in range(4)},
        metrics={"loss": {0: 1.0 / number, 1: 1.0 / number}, "grad_norm": {0: 0.5, 1: 0.5}},
        learning_rate={0: 0.1 * number, 1: 0.1 * number},
        position={0: number, 1: number},
    )
    return dataclasses.replace(step, **changes)


def state_of(number: int, **changes: str) -> dict[str, dict[tuple[int, str], str]]:
    """Digests of the leaves after a step."""
    digests = {name: f"{name} {number}" for name in LEAVES} | {
        name.replace("__", "."): value for name, value in changes.items()
    }
    return {name: {(p, "0:4"): value for p in range(2)} for name, value in digests.items()}


def execution(start: int, last: int, number: int = 0) -> Execution:
    """An attempt that did the steps behind `start` up to `last`."""
    states = {(start, RESTORED if start else INITIAL): state_of(start)}
    states |= {(n, AFTER): state_of(n) for n in range(start + 1, last + 1)}
    steps = {n: step_of(n) for n in range(start + 1, last + 1)}
    return Execution(number, start, steps, states, {"kinds": LEAVES} if start == 0 else {})


def reference() -> Records:
    return Records([execution(0, 8)])


def resumed() -> Records:
    """Killed after step 5, gone on from step 4."""
    return Records([execution(0, 5), execution(4, 8, number=1)])


def test_a_resumed_run_that_did_the_same_differs_nowhere():
    assert first_difference(reference(), resumed(), steps=8) is None


def change(where: str) -> Records:
    """The resumed run with one thing changed in its second attempt."""
    run = resumed()
    second = run.attempts[1]
    if where == "restored moments":
        second.states[4, RESTORED] = state_of(4, optimizer__mu__w="zeros")
    elif where == "restored rng":
        second.states[4, RESTORED] = state_of(4, model__rngs__count="other", model__w="other")
    elif where == "rows of the beginning":
        second.steps[5] = step_of(5, rows=step_of(1).rows)
    elif where == "rows of nowhere":
        second.steps[5] = step_of(5, rows={row: {f"new {row}"} for row in range(4)})
    elif where == "rows in another order":
        rows = {row: {f"row {4 * 5 + 3 - row}"} for row in range(4)}
        second.steps[5] = step_of(5, rows=rows)
    elif where == "loss":
        second.steps[5] = step_of(5, metrics={"loss": {0: 0.3}, "grad_norm": {0: 0.4}})
    elif where == "gradient":
        second.steps[5] = step_of(5, metrics={"loss": {0: 0.2}, "grad_norm": {0: 0.4}})
    elif where == "learning rate":
        second.steps[5] = step_of(5, learning_rate={0: 0.7})
    elif where == "params":
        second.states[5, AFTER] = state_of(5, model__w="other")
    elif where == "statistics":
        second.states[5, AFTER] = state_of(5, model__norm__mean="other", model__w="other")
    elif where == "one process":
        second.states[7, AFTER] = state_of(7)
        second.states[7, AFTER]["model.w"][1, "0:4"] = "other"
    elif where == "one row, redone":
        run.attempts[1].steps[5].rows[2] = {"other"}
    return run


@pytest.mark.parametrize(
    ("where", "what", "step", "name", "cause"),
    [
        ("restored moments", RESTORED, 4, "optimizer.mu.w", "optimizer"),
        ("restored rng", RESTORED, 4, "model.rngs.count", "rng"),
        ("rows of the beginning", "rows", 5, "0", "data_position"),
        ("rows in another order", "rows", 5, "0", "data_position"),
        ("rows of nowhere", "rows", 5, "0", "data_random"),
        ("loss", "metric", 5, "loss", "rng"),
        ("gradient", "metric", 5, "grad_norm", "hidden_state"),
        ("learning rate", "learning_rate", 5, "learning_rate", "schedule"),
        ("params", "state", 5, "model.w", "optimizer"),
        ("statistics", "state", 5, "model.norm.mean", "batch_statistics"),
        ("one process", "state", 7, "model.w", "optimizer"),
        ("one row, redone", "rows", 5, "2", "data_random"),
    ],
)
def test_the_first_difference_is_found_and_named(where, what, step, name, cause):
    run = change(where)
    found = first_difference(reference(), run, steps=8)
    assert found is not None
    assert (found.what, found.step, found.name) == (what, step, name)
    diagnosis = diagnose.after_interruption(found, reference(), run)
    assert diagnosis.cause == cause
    assert name in judge.told(found)
    if where == "restored moments":
        assert "moments were reset" in diagnosis.text
    if where == "rows of the beginning":
        assert "rows of step 1" in diagnosis.text
    if where == "one process":
        assert "3 steps after the resume" in diagnosis.text


def test_a_run_that_lacks_a_step_or_a_row_or_its_end_is_not_the_same():
    run = resumed()
    del run.attempts[1].steps[7]
    found = first_difference(reference(), run, steps=8)
    assert found is not None
    assert (found.what, found.step) == ("missing", 7)
    run = resumed()
    del run.attempts[1].steps[8].rows[3]
    assert first_difference(reference(), run, steps=8).name == "row 3"
    run = resumed()
    del run.attempts[1].states[8, AFTER]
    assert first_difference(reference(), run, steps=8).name == "the state"


def test_a_loss_may_drift_within_the_tolerance_and_rows_never():
    loose = compare.Tolerance(metric=1e-3, states=False)
    run = resumed()
    run.attempts[1].states[6, AFTER] = state_of(6, model__w="other")
    run.attempts[1].steps[6] = step_of(6, metrics={"loss": {0: (1 + 5e-4) / 6}})
    assert first_difference(reference(), run, loose, 8) is None
    assert compare.largest_loss_drift(reference(), run) == pytest.approx(5e-4, rel=1e-2)
    run.attempts[1].steps[6] = step_of(6, metrics={"loss": {0: (1 + 5e-3) / 6}})
    assert first_difference(reference(), run, loose, 8).name == "loss"
    rows = change("rows in another order")
    assert first_difference(reference(), rows, loose, 8).what == "rows"


def test_what_is_restored_on_another_topology_is_what_was_saved_where_the_parts_are_the_same():
    loose = compare.Tolerance(metric=1e-3, states=False)
    run = Records([execution(4, 8)])
    restored = state_of(4)
    # One process has all of the first leaf, which two had, and two halves of another.
    restored["model.w"] = {(0, "0:4"): "model.w 4"}
    restored["optimizer.mu.w"] = {(0, "0:2"): "a half", (0, "2:4"): "another"}
    run.attempts[0].states[4, RESTORED] = restored
    assert first_difference(reference(), run, loose, 8) is None
    restored["model.w"] = {(0, "0:4"): "zeros"}
    found = first_difference(reference(), run, loose, 8)
    assert (found.what, found.name, found.found) == (RESTORED, "model.w", "zeros")


def uninterrupted(where: str) -> Records:
    run = reference()
    if where == "order":
        run.attempts[0].steps[1] = step_of(1, rows=step_of(2).rows)
    elif where == "contents":
        for number, step in run.attempts[0].steps.items():
            step.rows = {row: {f"new {number} {row}"} for row in range(4)}
    elif where == "loss":
        run.attempts[0].steps[3] = step_of(3, metrics={"loss": {0: 0.1}})
    elif where == "beginning":
        run.attempts[0].states[0, INITIAL] = state_of(0, model__w="other")
    return run


@pytest.mark.parametrize(
    ("where", "by_hash", "cause", "words"),
    [
        ("order", True, "data_order", "a `set`"),
        ("order", False, "data_time", "same examples in another order"),
        ("contents", False, "data_time", "also with PYTHONHASHSEED fixed"),
        ("contents", None, "data_time", "other contents"),
        ("loss", None, "nondeterministic_op", "at step 3, in loss"),
        ("beginning", None, "initialization", "model.w"),
    ],
)
def test_what_differs_without_any_interruption_is_named_so(where, by_hash, cause, words):
    repeat = uninterrupted(where)
    found = first_difference(reference(), repeat)
    assert found is not None
    diagnosis = diagnose.without_interruption(found, reference(), repeat, by_hash)
    assert diagnosis.cause == cause
    assert words in diagnosis.text


class _Run:
    """A trial that has ended."""

    def __init__(self, name: str, records: Records):
        self.name, self._records = name, records

    def records(self) -> Records:
        return self._records


@pytest.mark.parametrize(
    ("run", "repeat", "asked", "cause"),
    [
        (change("loss"), reference(), ["repeat"], "rng"),
        (change("loss"), uninterrupted("loss"), ["repeat"], "nondeterministic_op"),
        (change("rows of the beginning"), None, [], "data_position"),  # Certain without.
        (change("restored moments"), None, [], "optimizer"),
        (uninterrupted("order"), None, ["hash"], "data_order"),  # Attempt 0 is itself a repeat.
        (change("rows of nowhere"), reference(), ["repeat"], "data_random"),
    ],
)
def test_further_runs_are_made_only_where_they_decide(run, repeat, asked, cause):
    made: list[str] = []

    def runs(which: str) -> list[Any]:
        made.append(which)
        if which == "hash":
            return [_Run("hash-1", reference()), _Run("hash-2", reference())]
        return [_Run("repeat", repeat)]

    found = first_difference(reference(), run)
    assert judge.explain(found, _Run("one", run), reference(), runs).diagnosis.cause == cause
    assert made == asked


# ------------------------------------------------------------------ records


def test_records_are_read_without_the_line_that_a_kill_cut_off(tmp_path):
    folder = tmp_path / "attempt-002"
    folder.mkdir()
    step = '{"event": "step", "step": %d, "rows": [[0, "a"]], "metrics": {"loss": 1.5}, '
    step += '"learning_rate": 0.1, "position": {"next_index": 1}}\n'
    (folder / "process-00001.jsonl").write_text(
        '{"event": "start", "step": 4, "kinds": {"w": "params"}}\n'
        '{"event": "state", "when": "restored", "step": 4, "leaves": {"w": {"0:1": "d"}}}\n'
        + step % 5
        + (step % 6)[:40]
    )
    (attempt,) = read_records(tmp_path).attempts
    assert (attempt.number, attempt.start, list(attempt.steps)) == (2, 4, [5])
    assert attempt.states[4, RESTORED] == {"w": {(1, "0:1"): "d"}}
    assert attempt.steps[5].loss == 1.5
