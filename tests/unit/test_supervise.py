"""Tables of what happens to a gang, and what must be made of it."""

from __future__ import annotations

import pytest

from launch.supervise import (
    FAILURE_GRACE_SECONDS,
    Exited,
    HostLost,
    Kill,
    NotStarted,
    Stop,
    StopRequested,
    Supervisor,
    Tick,
)

GRACE = 30.0


def ended(process_id: int, code: int = 0, at: float = 0.0) -> Exited:
    """A process's end; a negative code is a signal."""
    return Exited(process_id, None if code < 0 else code, -code if code < 0 else None, at)


def play(*events, num_processes: int = 3):
    """Feed (time, event) pairs; returns the actions as (time, kind) and the verdict."""
    supervisor = Supervisor([f"h{i}" for i in range(num_processes)], GRACE)
    actions = []
    for time, event in events:
        actions += [(time, type(action)) for action in supervisor.handle(event, time)]
    assert supervisor.finished
    return actions, supervisor.verdict()


CASES = {
    "all done": (
        [(1, ended(0)), (2, ended(1)), (900, ended(2))],
        [],
        ("completed", 0, None),
    ),
    "one fails, the others follow its stop": (
        [(1, ended(1, 1, at=1)), (1.5, ended(0, -15, at=1.5)), (1.6, ended(2, 0, at=1.6))],
        [(1, Stop)],
        ("exception", 1, 1),
    ),
    "the others ignore the stop": (
        [
            (1, ended(2, -11, at=1)),
            (1 + FAILURE_GRACE_SECONDS - 0.1, Tick()),
            (1 + FAILURE_GRACE_SECONDS, Tick()),
            (4, ended(0, -9, at=4)),
            (4, ended(1, -9, at=4)),
        ],
        [(1, Stop), (1 + FAILURE_GRACE_SECONDS, Kill)],
        ("killed", 1, 2),
    ),
    "a report is overtaken by that of a process which failed later": (
        [(2, ended(0, -6, at=1.2)), (2, ended(1, 1, at=1.1)), (2, ended(2, -15, at=2))],
        [(2, Stop)],
        ("exception", 1, 1),
    ),
    "the config is wrong": (
        [(1, ended(0, 2, at=1)), (1, ended(1, 2, at=1.01)), (1, ended(2, 2, at=1.02))],
        [(1, Stop)],
        ("config", 2, 0),
    ),
    "a program that is not there": (
        [(1, NotStarted(0, "x: no such file", 1)), (1, ended(1, -15, 2)), (1, ended(2, -15, 2))],
        [(1, Stop)],
        ("config", 2, 0),
    ),
    "all saved and left": (
        [(1, ended(0, 75)), (1, ended(1, 75)), (2, ended(2, 75))],
        [],
        ("preempted", 75, None),
    ),
    "one saved and left, another never does": (
        [
            (1, ended(0, 75)),
            (1, ended(1, 75)),
            (GRACE, Tick()),
            (1 + GRACE, Tick()),
            (40, ended(2, -9)),
        ],
        [(1 + GRACE, Kill)],
        ("killed", 1, 2),
    ),
    "one ends early with 0 and is waited for": (
        [(1, ended(0, 0)), (500, Tick()), (900, ended(1, 0)), (900, ended(2, 1, at=900))],
        [],
        ("exception", 1, 2),
    ),
    "the user stops, all save": (
        [(1, StopRequested()), (9, ended(0, 75)), (9, ended(1, 75)), (9, ended(2, 75))],
        [(1, Stop)],
        ("stopped", 75, None),
    ),
    "the user stops a program that knows no signals": (
        [(1, StopRequested()), (1, ended(0, -15)), (1, ended(1, 143)), (1, ended(2, -6))],
        [(1, Stop)],
        ("stopped", 75, None),
    ),
    "the user stops, and saving fails": (
        [
            (1, StopRequested()),
            (2, ended(1, 1, at=2)),
            (1 + GRACE, Tick()),
            (40, ended(0, -9, at=40)),
            (40, ended(2, -9, at=40)),
        ],
        [(1, Stop), (1 + GRACE, Kill)],
        ("stopped", 75, None),
    ),
    "the user stops, saving fails, the others end by themselves": (
        [
            (1, StopRequested()),
            (2, ended(1, 1, at=2)),
            (3, ended(0, -6, at=3)),
            (3, ended(2, 75, at=3)),
        ],
        [(1, Stop)],
        ("stopped", 1, 1),
    ),
    "the user insists": (
        [
            (1, StopRequested()),
            (2, StopRequested()),
            (3, StopRequested()),
            (3, ended(0, -9)),
            (3, ended(1, -9)),
            (3, ended(2, -9)),
        ],
        [(1, Stop), (2, Kill)],
        ("stopped", 75, None),
    ),
    "the user is out of patience with a failure": (
        [
            (1, ended(0, 1, at=1)),
            (1.5, StopRequested()),
            (2, ended(1, -9, at=2)),
            (2, ended(2, -9, at=2)),
        ],
        [(1, Stop), (1.5, Kill)],
        ("exception", 1, 0),
    ),
    "a host is lost": (
        [(1, HostLost("h2")), (2, ended(0, -15, at=2)), (2, ended(1, -6, at=2))],
        [(1, Stop)],
        ("host_lost", 1, None),
    ),
    "a host is lost after a failure": (
        [(1, ended(0, 3, at=1)), (2, HostLost("h2")), (2, ended(1, -6, at=2))],
        [(1, Stop)],
        ("exception", 1, 0),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_what_happens_to_a_gang_gets_these_actions_and_this_verdict(name):
    events, actions, (cause, exit_code, guilty) = CASES[name]
    got, verdict = play(*events)
    assert got == actions
    assert (verdict.cause, verdict.exit_code, verdict.guilty_process) == (cause, exit_code, guilty)


def test_a_verdict_names_process_host_and_signal():
    _, verdict = play((1, ended(1, -9, at=1)), (1, ended(0, -15, 2)), (1, ended(2, -15, 2)))
    assert verdict.message == "process 1/3 on h1 was killed by SIGKILL"
    assert verdict.guilty_host == "h1"


def test_a_lost_host_is_the_guilty_host():
    _, verdict = play((1, HostLost("h0")), (1, ended(1, 0)), (1, ended(2, 0)))
    assert (verdict.guilty_host, verdict.exit_code) == ("h0", 1)
