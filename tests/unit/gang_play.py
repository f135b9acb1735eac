"""Plays events to a Supervisor, for tables of cases."""

from __future__ import annotations

import random

from launch.events import Action, Close, Exited, Failure, GangGone, HostLost, Progress, Stop, Tick
from launch.spec import RestartPolicy, WatchPolicy
from launch.supervise import Policy, Supervisor

GRACE = 30.0


def policy(num_hosts: int = 3, **fields) -> Policy:
    """A policy for hosts h0, h1, ...; restart and watch are given as dicts."""
    restart = RestartPolicy(**fields.pop("restart", {}))
    watch = WatchPolicy(**fields.pop("watch", {}))
    return Policy(
        hosts=tuple(f"h{i}" for i in range(num_hosts)),
        grace_seconds=GRACE,
        restart=restart,
        watch=watch,
        rng=random.Random(0),
        **fields,
    )


def ended(process_id: int, code: int = 0, at: float = 0.0, **fields) -> Exited:
    """A process's end; a negative code is a signal."""
    exit_code, signal = (code, None) if code >= 0 else (None, -code)
    return Exited(process_id, exit_code, signal, at, **fields)


def told(process_id: int, code: int = -15, at: float = 0.0, since: float = 0.0, **fields) -> Exited:
    """The end of a process which had a signal of ours at `since`."""
    return ended(process_id, code, at, told_at=since, **fields)


def failure(text: str = "ValueError: bad", at: float = 0.0, accuses: tuple[int, ...] = ()):
    """An exception, from the last line of its traceback."""
    kind, _, message = text.partition(": ")
    return Failure(kind, message, f"Traceback (most recent call last):\n{text}\n", at, accuses)


def at_step(process_id: int, step: int, phase: str = "step", since: float = 0.0) -> Progress:
    return Progress(process_id, step, phase, since)


def lost(host: str, at: float) -> HostLost:
    return HostLost(host, at)


def play(*events, num_hosts: int = 3, **fields):
    """Feed (time, event) pairs to one attempt, then its end.

    Returns:
      What was done until then as (time, kind), without the start, and the Close.
    """
    supervisor = Supervisor(policy(num_hosts, **fields))
    supervisor.handle(Tick(), 0.0)
    done: list[tuple[float, type[Action]]] = []
    time = 0.0
    for time, event in events:
        done += [(time, type(action)) for action in supervisor.handle(event, time)]
    last = supervisor.handle(GangGone(), time)
    close = next(action for action in last if isinstance(action, Close))
    return done, close


def judged(*events, **fields):
    """The verdict on one attempt."""
    return play(*events, **fields)[1].verdict


def reason_of_stop(*events, **fields) -> str:
    """What the user is told when the gang is stopped."""
    supervisor = Supervisor(policy(**fields))
    supervisor.handle(Tick(), 0.0)
    for time, event in events:
        for action in supervisor.handle(event, time):
            if isinstance(action, Stop):
                return action.reason
    raise AssertionError("the gang was not stopped")
