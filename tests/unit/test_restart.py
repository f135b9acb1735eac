"""What follows an attempt: budgets, waits and giving up."""

from __future__ import annotations

import random

import pytest

from launch.events import Verdict
from launch.restart import Outcome, Restarts, next_hosts
from launch.spec import RestartPolicy
from tests.unit.gang_play import failure


class Highest(random.Random):
    """No jitter at all."""

    def random(self) -> float:
        return 0.0


def restarts(reports=True, furthest_step=None, rng=None, **fields) -> Restarts:
    return Restarts(
        RestartPolicy(**fields),
        reports=reports,
        furthest_step=furthest_step,
        rng=rng or Highest(),
    )


def outcome(cause: str, step: int | None = None, raised: str | None = None, guilty_step=None):
    verdict = Verdict(cause, 1, failure=failure(raised) if raised else None)
    return Outcome(verdict, step if guilty_step is None else guilty_step, step)


def decisions(decider: Restarts, *outcomes: Outcome) -> list[bool]:
    return [decider.after(each).again for each in outcomes]


@pytest.mark.parametrize("cause", ["config", "stopped", "completed"])
def test_some_ends_are_final(cause):
    decider = restarts(max_failures=9, max_preemptions=9)
    assert not decider.after(outcome(cause, 5)).again


@pytest.mark.parametrize(
    "raised", ["ModuleNotFoundError: No module named 'x'", "ImportError: x", "SyntaxError: x"]
)
def test_a_program_that_cannot_be_loaded_is_not_tried_again(raised):
    retry = restarts(max_failures=9).after(outcome("exception", None, raised))
    assert not retry.again
    assert "cannot be loaded" in retry.why


@pytest.mark.parametrize("cause", ["exception", "oom", "killed", "hang", "start_timeout"])
def test_failures_have_a_budget_of_their_own(cause):
    decider = restarts(max_failures=2, max_preemptions=1)
    ends = [outcome(cause, 1), outcome("preempted", 2), outcome(cause, 3), outcome(cause, 4)]
    assert decisions(decider, *ends) == [True, True, True, False]


@pytest.mark.parametrize("cause", ["preempted", "time_limit", "host_lost"])
def test_preemptions_have_a_budget_of_their_own(cause):
    decider = restarts(max_failures=1, max_preemptions=2)
    ends = [outcome(cause, 1), outcome("killed", 2), outcome(cause, 3), outcome(cause, 4)]
    assert decisions(decider, *ends) == [True, True, True, False]


def test_what_was_decided_is_told():
    decider = restarts(max_failures=2, max_preemptions=1)
    assert decider.after(outcome("killed", 1)).why == "failure 1 of 2, again in 1.0 s"
    assert decider.after(outcome("preempted", 2)).why == "interruption 1 of 1, again in 1.0 s"
    assert decider.after(outcome("preempted", 3)).why == (
        "given up: interruption 2, and restart.max_preemptions is 1"
    )
    never = restarts().after(outcome("killed", 1)).why
    assert never == "not tried again: --cluster.restart.max_failures is 0"


def test_waits_double_until_an_attempt_gains_a_step_and_have_a_limit():
    decider = restarts(
        max_failures=99,
        backoff_seconds=2.0,
        max_backoff_seconds=10.0,
        max_attempts_without_progress=0,
    )
    waits = [decider.after(outcome("killed", step)).delay_seconds for step in [3, 3, 3, 3, 3, 4, 4]]
    assert waits == [2, 2, 4, 8, 10, 2, 2]
    for _ in range(2000):  # No overflow, however long it goes wrong.
        assert restarts(max_failures=1).after(outcome("killed")).delay_seconds == 1


def test_up_to_half_of_a_wait_is_taken_off_at_random():
    decider = restarts(rng=random.Random(3), max_failures=99, backoff_seconds=8.0)
    waits = [decider.after(outcome("killed", step)).delay_seconds for step in range(1, 50)]
    assert min(waits) >= 4.0
    assert max(waits) <= 8.0
    assert max(waits) - min(waits) > 3.0


def test_the_same_exception_at_the_same_step_twice_is_final():
    decider = restarts(max_failures=9)
    at = "ValueError: <object at 0x7f00> is bad"
    assert decider.after(outcome("exception", 5, at)).again
    retry = decider.after(outcome("exception", 5, "ValueError: <object at 0x7e11> is bad"))
    assert not retry.again
    assert retry.why == "given up: the same ValueError at step 5 twice; it would fail again"


def test_the_same_exception_before_any_step_twice_is_final():
    decider = restarts(max_failures=9)
    assert decider.after(outcome("exception", None, "KeyError: 'a'")).again
    retry = decider.after(outcome("exception", None, "KeyError: 'a'"))
    assert retry.why == "given up: the same KeyError before any step twice; it would fail again"


OTHERS = {
    "another step": [(5, "ValueError: x"), (6, "ValueError: x")],
    "another message": [(5, "ValueError: x"), (5, "ValueError: y")],
    "another class": [(5, "ValueError: x"), (5, "KeyError: x")],
    "a peer that is not there yet": [(None, "ConnectionError: x"), (None, "ConnectionError: x")],
    "no exception": [(5, None), (5, None)],
    "something in between": [(5, "ValueError: x"), (6, None), (5, "ValueError: x")],
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_differs_is_tried_again(name):
    ends = [outcome("exception", step, raised) for step, raised in OTHERS[name]]
    assert all(decisions(restarts(max_failures=9), *ends))


def test_attempts_that_gain_no_step_are_given_up_and_told():
    decider = restarts(max_failures=9, max_attempts_without_progress=2)
    ends = [outcome("killed", step) for step in (4, 7, 7, 3)]
    assert decisions(decider, *ends[:3]) == [True, True, True]
    retry = decider.after(ends[3])
    assert not retry.again
    assert retry.why == "given up: 2 attempts in a row got no further than step 7"


def test_steps_of_earlier_runs_are_no_gain():
    decider = restarts(max_failures=9, max_attempts_without_progress=2, furthest_step=10)
    ends = [outcome("killed", 10), outcome("killed", 9)]
    assert decisions(decider, *ends) == [True, False]


def test_a_program_that_never_reports_is_not_taken_for_one_without_gain():
    ends = [outcome("killed", None) for _ in range(6)]
    limits = {"max_failures": 9, "max_attempts_without_progress": 2}
    assert all(decisions(restarts(reports=False, **limits), *ends))
    assert decisions(restarts(reports=True, **limits), *ends[:2]) == [True, False]
    no_limit = {**limits, "max_attempts_without_progress": 0}
    assert all(decisions(restarts(reports=True, **no_limit), *ends))


HOSTS = ("a", "b", "c", "d")


@pytest.mark.parametrize(
    ("used", "lost", "hosts_min", "fitting", "chosen"),
    [
        (HOSTS, "", 2, {4}, HOSTS),
        (HOSTS, "b", None, {1, 2, 3, 4}, HOSTS),
        (HOSTS, "b", 2, {1, 2, 3, 4}, ("a", "c", "d")),
        (HOSTS, "b", 2, {2, 4}, ("a", "c")),
        (HOSTS, "b", 3, {2, 4}, HOSTS),
        (HOSTS, "abc", 2, {1, 2, 3, 4}, HOSTS),
        (("a", "c"), "", 2, {1, 2, 3, 4}, ("a", "c")),
        (("a", "c"), "a", 1, {1, 2, 3, 4}, ("c",)),
        (HOSTS, "abcd", 1, {1, 2, 3, 4}, HOSTS),
    ],
)
def test_the_hosts_of_the_next_attempt(used, lost, hosts_min, fitting, chosen):
    got = next_hosts(HOSTS, used, frozenset(lost), hosts_min, lambda number: number in fitting)
    assert got == chosen
