"""Where a run's time went."""

from __future__ import annotations

import dataclasses
import random

import pytest

from launch.goodput import PARTS, AttemptTimes, goodput


def test_time_is_shared_out_to_what_it_was_spent_on():
    first = AttemptTimes(0.0, 100.0, {"init": 10.0, "step": 60.0, "data": 5.0, "save": 5.0}, 0, 30)
    # Went on from step 20: a third of the first attempt's steps were done again.
    second = AttemptTimes(120.0, 200.0, {"restore": 10.0, "step": 60.0}, 20, 60)
    spent = goodput([first, second])
    assert spent.wall_seconds == 200.0
    assert spent.seconds == pytest.approx(
        {
            "stepping": 40.0 + 60.0,
            "lost_work": 20.0,
            "init": 10.0,
            "compile": 0.0,
            "restore": 10.0,
            "data_wait": 5.0,
            "checkpoint": 5.0,
            "eval": 0.0,
            "queueing": 0.0,
            "down": 20.0,
            "other": 20.0 + 10.0,
        }
    )


def test_time_after_a_stop_by_the_user_is_no_time_of_the_run():
    first = AttemptTimes(0.0, 10.0, {"step": 10.0}, 0, 5, wanted_after=False)
    assert goodput([first, AttemptTimes(1000.0, 1010.0, {"step": 10.0}, 5, 9)]).wall_seconds == 20.0


def test_waiting_for_the_next_attempt_is_down():
    assert goodput([AttemptTimes(0.0, 10.0, {"step": 10.0})], now=40.0).shares["down"] == 0.75


def test_waiting_for_machines_is_queueing_from_the_submission_on():
    first = AttemptTimes(100.0, 150.0, {"step": 50.0}, 0, 5, queued_since=20.0)
    # Of the 30 s between the two, 10 passed before it was put back.
    second = AttemptTimes(180.0, 200.0, {"step": 20.0}, 5, 7, queued_since=160.0)
    spent = goodput([first, second], now=240.0, queued=True)
    assert spent.seconds["queueing"] == 80.0 + 20.0 + 40.0
    assert spent.seconds["down"] == 10.0
    assert spent.wall_seconds == 220.0


def test_a_clock_that_was_set_meanwhile_makes_no_time_and_takes_none():
    hour = 3600.0
    right = [
        AttemptTimes(0.0, 100.0, {"step": 60.0}, 0, 30, wall_seconds=100.0),
        AttemptTimes(120.0, 200.0, {"step": 60.0}, 30, 60, wall_seconds=80.0, waited_seconds=20.0),
        AttemptTimes(210.0, 300.0, {"step": 45.0}, 60, 90, wall_seconds=90.0, waited_seconds=10.0),
    ]
    expected = goodput(right)
    assert (expected.wall_seconds, expected.seconds["down"]) == (300.0, 30.0)
    # Set in the first attempt, and back in the second.
    for jump in (-hour, 10 * hour):
        jumped = [
            dataclasses.replace(right[0], ended_at=100.0 + jump),
            dataclasses.replace(right[1], started_at=120.0 + jump),
            right[2],
        ]
        assert goodput(jumped) == expected
    # Nobody has measured the time from one `muster run` to the next.
    jumped[1] = dataclasses.replace(jumped[1], waited_seconds=None)
    assert goodput(jumped).seconds["down"] == 20.0 + 10.0


def test_without_any_phase_on_record_there_is_nothing_to_say():
    assert goodput([]) is None
    assert goodput([AttemptTimes(0.0, 10.0, {})]) is None


@pytest.mark.parametrize("seed", range(20))
def test_the_parts_are_the_whole_and_none_is_negative_whatever_the_clocks_say(seed):
    chance = random.Random(seed)
    attempts, clock = [], 0.0
    for _ in range(chance.randint(1, 6)):
        start = clock + chance.uniform(-5, 20)
        clock = start + chance.uniform(-2, 50)
        phases = chance.sample(["init", "compile", "step", "data", "save", "mine", "exit"], 3)
        seconds = {phase: chance.uniform(-1, 40) for phase in phases}
        first = chance.choice([None, chance.randint(0, 50)])
        last = None if first is None else first + chance.randint(-3, 40)
        since = chance.choice([None, start - chance.uniform(-5, 30)])
        wanted = chance.random() < 0.8
        attempts.append(
            AttemptTimes(
                start, clock, seconds, first, last, queued_since=since, wanted_after=wanted
            )
        )
    spent = goodput(attempts, now=chance.choice([None, clock + 3]))
    assert spent is None or sum(spent.seconds.values()) == pytest.approx(spent.wall_seconds)
    assert spent is None or sum(spent.shares.values()) == pytest.approx(1.0)
    assert spent is None or min(spent.seconds[part] for part in PARTS) >= 0.0
