"""When a gang is taken to hang: tables of reports and a clock."""

from __future__ import annotations

import pytest

from launch.events import Progress
from launch.spec import WatchPolicy
from launch.watch import Watch

LIMITS = WatchPolicy(
    start_seconds=30,
    init_seconds=40,
    compile_seconds=200,
    data_seconds=20,
    step_min_seconds=10,
    step_medians=5,
    save_seconds=100,
    eval_seconds=100,
    exit_seconds=15,
)


def watch(*reports: tuple[int, int, str, float], num_processes: int = 3, all_report=True) -> Watch:
    """A watch over processes that started at 0; reports are (process, step, phase, since)."""
    watched = Watch(LIMITS, num_processes, all_report)
    for process_id in range(num_processes):
        watched.started(process_id, 0.0)
    for report in sorted(reports, key=lambda report: report[3]):
        watched.report(Progress(*report), now=report[3])
    return watched


def steps(process_id: int, number: int, seconds: float = 1.0):
    return [(process_id, step, "step", step * seconds) for step in range(number + 1)]


def first_overdue(watched: Watch, until: int = 1000) -> int | None:
    return next((now for now in range(until) if watched.overdue(float(now))), None)


ALL_STEP = [report for process_id in range(3) for report in steps(process_id, 5)]
CASES = {
    "nobody reports": ([], None, None),
    "all wait at one step": (ALL_STEP, 16, (0, 1, 2)),
    "one is a step behind": (
        [*steps(0, 6), *steps(1, 5), *steps(2, 6)],
        16,
        (1,),
    ),
    "one waits for data, which has a limit of its own": (
        [*ALL_STEP, (1, 5, "data", 5.5)],
        26,
        (1,),
    ),
    "one saves, and is looked at": (
        [*ALL_STEP, (0, 5, "save", 6)],
        16,
        (1, 2),
    ),
    "the last to come to a step has just come": (
        [*ALL_STEP, (2, 6, "step", 6), (1, 6, "step", 6), (0, 5, "data", 6), (0, 6, "step", 24)],
        35,
        (0, 1, 2),
    ),
    "compiling": ([(i, 0, "compile", 5) for i in range(3)], 206, (0, 1, 2)),
    "the first steps may take as long as compiling": (
        [(i, step, "step", step) for i in range(3) for step in (1, 2)],
        203,
        (0, 1, 2),
    ),
    "a word of the program's own is a step": (
        [(i, step, "dreaming", step) for i in range(3) for step in range(6)],
        16,
        (0, 1, 2),
    ),
    "one leaves while the others wait": ([*ALL_STEP, (1, 5, "exit", 6)], 16, (0, 2)),
    "one left a step before and need not hurry": (
        [*steps(0, 5), *steps(1, 4), *steps(2, 5), (1, 4, "exit", 4.5)],
        16,
        (0, 2),
    ),
    "all leave": ([*ALL_STEP, *[(i, 5, "exit", 6) for i in range(3)]], 22, (0, 1, 2)),
}


@pytest.mark.parametrize("name", CASES)
def test_a_gang_hangs_when_those_furthest_behind_are_overdue(name):
    reports, at, processes = CASES[name]
    watched = watch(*reports)
    assert first_overdue(watched) == at
    if at is not None:
        overdue = watched.overdue(float(at))
        assert (overdue.cause, overdue.processes) == ("hang", processes)


def test_one_that_saves_may_be_the_reason_for_as_long_as_it_has_time():
    watched = watch(*ALL_STEP, (0, 5, "save", 6))
    assert watched.overdue(106.0).excuse == (0,)
    assert watched.overdue(107.0).excuse == ()
    assert watch(*ALL_STEP, (0, 5, "save", 6), (1, 5, "data", 6)).overdue(50.0).excuse == ()


def test_a_process_that_never_reports_is_told_once_the_others_have():
    watched = watch((0, 0, "init", 20), (2, 0, "init", 22))
    assert first_overdue(watched) == 51
    overdue = watched.overdue(51.0)
    assert (overdue.cause, overdue.processes, overdue.step) == ("start_timeout", (1,), None)


def test_a_program_of_which_the_lead_alone_reports_is_left_in_peace():
    watched = watch(*steps(0, 600), all_report=False)
    assert watched.overdue(605.0) is None
    most_report = watch(*steps(0, 600), *steps(1, 600), all_report=False)
    assert most_report.overdue(605.0).processes == (2,)


def test_the_limit_of_a_step_grows_with_the_usual_step():
    watched = watch(*[report for i in range(3) for report in steps(i, 100, seconds=4.0)])
    assert watched.limit_seconds("step") == 5 * 4.0
    assert first_overdue(watched) == 400 + 21


def test_time_spent_saving_is_no_time_of_a_step():
    saving = []
    for step in range(20):
        begin = step * 100.0
        saving += [(0, step, "step", begin), (0, step, "save", begin + 1)]
        saving += [(0, step, "step", begin + 99)]
    watched = watch(*saving, num_processes=1)
    assert watched.limit_seconds("step") == 10


def test_one_long_pause_does_not_move_the_usual_step():
    reports = [(0, step, "step", step + 500.0 * (step > 50)) for step in range(100)]
    assert watch(*reports, num_processes=1).limit_seconds("step") == 10


def test_the_steps_of_another_process_are_timed_when_the_timed_one_ends():
    watched = watch(*steps(0, 2), *steps(1, 2))
    watched.ended(0)
    for report in steps(1, 20, seconds=6.0)[3:]:
        watched.report(Progress(*report), now=report[3])
    assert watched.limit_seconds("step") == 30


def test_a_process_that_ended_is_not_waited_for():
    watched = watch(*steps(0, 5), *steps(1, 9), *steps(2, 9))
    watched.ended(0)
    assert watched.overdue(20.0).processes == (1, 2)
