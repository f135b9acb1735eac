"""Tables of what happens to a gang, what is done about it, and how the run goes on."""

from __future__ import annotations

import pytest

from launch.attempt_state import DOUBT_SECONDS, FAILURE_GRACE_SECONDS, STACKS_SECONDS
from launch.events import (
    Close,
    Finish,
    GangGone,
    HostLeaving,
    Interrupted,
    Kill,
    NotStarted,
    Raised,
    Requeue,
    Stacks,
    Start,
    Started,
    Stop,
    StopRequested,
    TakeStacks,
    Tick,
    Verdict,
)
from launch.restart import Outcome
from launch.supervise import Supervisor
from tests.unit import jax_ends
from tests.unit.gang_play import (
    GRACE,
    at_step,
    ended,
    failure,
    lost,
    play,
    policy,
    reason_of_stop,
    told,
)

CASES = {
    "all done": (
        [(1, ended(0)), (2, ended(1)), (900, ended(2))],
        [],
        ("completed", 0, None),
    ),
    "one fails, the others follow its stop": (
        [(1, ended(1, 1, at=1)), (1.5, told(0, at=1.5, since=1)), (1.6, told(2, 0, 1.6, since=1))],
        [(1, Stop)],
        ("exception", 1, 1),
    ),
    "the others ignore the stop": (
        [
            (1, ended(2, -11, at=1)),
            (1 + FAILURE_GRACE_SECONDS - 0.1, Tick()),
            (1 + FAILURE_GRACE_SECONDS, Tick()),
            (4, told(0, -9, at=4, since=1)),
            (4, told(1, -9, at=4, since=1)),
        ],
        [(1, Stop), (1 + FAILURE_GRACE_SECONDS, Kill)],
        ("killed", 1, 2),
    ),
    "a report is overtaken by that of a process which failed later": (
        [(2, ended(0, -6, at=1.2)), (2, ended(1, 1, at=1.1)), (2, told(2, at=2, since=2))],
        [(2, Stop)],
        ("exception", 1, 1),
    ),
    "the config is wrong": (
        [(1, ended(0, 2, at=1)), (1, ended(1, 2, at=1.01)), (1, ended(2, 2, at=1.02))],
        [(1, Stop)],
        ("config", 2, 0),
    ),
    "a program that is not there": (
        [(1, NotStarted(0, "x: no such file", 1)), (1, told(1, at=2)), (1, told(2, at=2))],
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
            (40, told(2, -9, at=40, since=1 + GRACE)),
        ],
        [(1 + GRACE, Kill)],
        ("killed", 1, 2),
    ),
    "one saved and left, and took the coordination service with it": (
        [
            (1, ended(0, 75, at=1)),
            (1, ended(1, -6, at=1.1, last_lines=jax_ends.LEAD_KILLED)),
            (2, ended(2, 75, at=2)),
        ],
        [],
        ("preempted", 75, None),
    ),
    "one ends early with 0 and is waited for": (
        [(1, ended(0, 0)), (500, Tick()), (900, ended(1, 0)), (900, ended(2, 1, at=900))],
        [],
        ("exception", 1, 2),
    ),
    "the user stops, all save": (
        [(1, StopRequested()), (9, told(0, 75)), (9, told(1, 75)), (9, told(2, 75))],
        [(1, Stop)],
        ("stopped", 75, None),
    ),
    "the user stops a program that knows no signals": (
        [(1, StopRequested()), (1, told(0, -15)), (1, told(1, 143)), (1, told(2, -6))],
        [(1, Stop)],
        ("stopped", 75, None),
    ),
    "the user stops, and saving fails": (
        [
            (1, StopRequested()),
            (2, told(1, 1, at=2)),
            (1 + GRACE, Tick()),
            (40, told(0, -9, at=40)),
            (40, told(2, -9, at=40)),
        ],
        [(1, Stop), (1 + GRACE, Kill)],
        ("stopped", 75, None),
    ),
    "the user stops, saving fails, the others end by themselves": (
        [
            (1, StopRequested()),
            (2, told(1, 1, at=2)),
            (3, told(0, -6, at=3)),
            (3, told(2, 75, at=3)),
        ],
        [(1, Stop)],
        ("stopped", 1, 1),
    ),
    "the user insists": (
        [
            (1, StopRequested()),
            (2, StopRequested()),
            (3, StopRequested()),
            (3, told(0, -9)),
            (3, told(1, -9)),
            (3, told(2, -9)),
        ],
        [(1, Stop), (2, Kill)],
        ("stopped", 75, None),
    ),
    "the user is out of patience with a failure": (
        [
            (1, ended(0, 1, at=1)),
            (1.5, StopRequested()),
            (2, told(1, -9, at=2, since=1)),
            (2, told(2, -9, at=2, since=1)),
        ],
        [(1, Stop), (1.5, Kill)],
        ("exception", 1, 0),
    ),
    "a host is lost": (
        [(1, lost("h2", 1)), (2, told(0, at=2, since=1)), (2, ended(1, -6, at=2))],
        [(1, Stop)],
        ("host_lost", 1, None),
    ),
    "a host is lost after a failure": (
        [(1, ended(0, 3, at=1)), (2, lost("h2", 2)), (2, told(1, -6, at=2, since=1))],
        [(1, Stop)],
        ("exception", 1, 0),
    ),
    "a host is lost whose processes were done": (
        [(1, ended(2, 0)), (2, lost("h2", 2)), (3, ended(0, 0)), (3, ended(1, 0))],
        [],
        ("completed", 0, None),
    ),
    "a failure that speaks of a peer waits for the peer's": (
        [
            (1, ended(0, 1, at=1, failure=failure(f"ValueError: {jax_ends.GLOO_MESSAGE}", 1))),
            (1.3, ended(2, -9, at=0.9)),
            (1.4, told(1, at=1.4, since=1.3)),
        ],
        [(1, TakeStacks), (1.3, Stop)],
        ("killed", 1, 2),
    ),
    "a failure that speaks of a peer, and no peer's comes": (
        [
            (1, ended(0, -6, at=1, last_lines=jax_ends.PEER_STOPPED)),
            (1.1, ended(2, -6, at=1.1, last_lines=jax_ends.PEER_STOPPED)),
            (1.2, Stacks(1, "", "T")),
            (1 + DOUBT_SECONDS, Tick()),
            (1 + DOUBT_SECONDS + FAILURE_GRACE_SECONDS, Tick()),
            (6, told(1, -9, at=6, since=3)),
        ],
        [
            (1, TakeStacks),
            (1 + DOUBT_SECONDS, Stop),
            (1 + DOUBT_SECONDS + FAILURE_GRACE_SECONDS, Kill),
        ],
        ("hang", 1, 1),
    ),
    "a process raised and does not end": (
        [
            (1, Raised(1, failure(at=1))),
            (1 + DOUBT_SECONDS, Tick()),
            (4, told(0, at=4, since=3)),
            (4, told(1, -9, at=4, since=3)),
            (4, told(2, at=4, since=3)),
        ],
        [(1 + DOUBT_SECONDS, Stop)],
        ("exception", 1, 1),
    ),
    "a process raised and then ends": (
        [
            (1, Raised(1, failure(at=1))),
            (1.2, ended(1, 1, at=1.2)),
            (2, told(0, at=2, since=1.2)),
            (2, told(2, at=2, since=1.2)),
        ],
        [(1.2, Stop)],
        ("exception", 1, 1),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_what_happens_to_a_gang_gets_these_actions_and_this_verdict(name):
    events, actions, (cause, exit_code, guilty) = CASES[name]
    got, close = play(*events)
    assert got == actions
    verdict = close.verdict
    assert (verdict.cause, verdict.exit_code, verdict.guilty_process) == (cause, exit_code, guilty)


WATCH = {"data_seconds": 20.0, "step_min_seconds": 10.0}
MOVING = [(step, at_step(i, step, "step", float(step))) for step in range(1, 7) for i in range(3)]
HANGING = [(0, Started(0)), (0, Started(1)), (0, Started(2)), *MOVING]
HANGING += [(7, at_step(1, 6, "data", 6.5))]


def test_a_gang_that_makes_no_progress_shows_its_stacks_and_is_stopped():
    ticks = [(time, Tick()) for time in range(8, 40)]
    stacks = [(27.2, Stacks(i, "", "S")) for i in range(3)]
    events = sorted([*HANGING, *ticks, *stacks], key=lambda pair: pair[0])
    actions, close = play(*events, watch=WATCH)
    assert actions == [(27, TakeStacks), (27.2, Stop), (30, Kill)]
    assert (close.verdict.cause, close.verdict.guilty_process) == ("hang", 1)


SAVING = [(0, Started(0)), (0, Started(1)), (0, Started(2)), *MOVING]
SAVING += [(7, at_step(i, 6, "save", 6.5)) for i in (0, 2)]
BUSY = 'Current thread 0x1 (most recent call first):\n  File "/x/train.py", line 4 in write\n'
WAITS = 'Current thread 0x1 (most recent call first):\n  File "/x/jax/_src/a.py", line 4 in f\n'


def test_one_that_saves_while_the_others_wait_for_it_is_left_the_time_to_save():
    ticks = [(time, Tick()) for time in range(8, 140)]
    stacks = [(27.2, Stacks(0, BUSY, "D")), *[(27.2, Stacks(i, WAITS, "S")) for i in (1, 2)]]
    events = sorted([*SAVING, *ticks, *stacks], key=lambda pair: pair[0])
    actions, close = play(*events, watch={**WATCH, "save_seconds": 100.0})
    looks = [time for time, action in actions if action is TakeStacks]
    # Each time the limit of a step later, and the time for which stacks were waited in vain.
    assert looks == [27, 49, 75, 101, 127]
    stopped_at = next(time for time, action in actions if action is Stop)
    assert stopped_at == 127 + STACKS_SECONDS  # Later than 106.5, when the time to save is over.
    assert close.verdict.cause == "hang"


def test_those_that_wait_for_another_in_their_save_are_no_excuse_for_it():
    ticks = [(time, Tick()) for time in range(8, 40)]
    stacks = [(27.2, Stacks(1, BUSY, "S")), *[(27.2, Stacks(i, WAITS, "S")) for i in (0, 2)]]
    events = sorted([*SAVING, *ticks, *stacks], key=lambda pair: pair[0])
    actions, close = play(*events, watch={**WATCH, "save_seconds": 100.0})
    assert actions[:2] == [(27, TakeStacks), (27.2, Stop)]
    assert (close.verdict.cause, close.verdict.guilty_process) == ("hang", 1)


def test_stacks_that_do_not_come_are_not_waited_for_for_ever():
    ticks = [(time, Tick()) for time in range(8, 40)]
    actions, close = play(*HANGING, *ticks, watch=WATCH)
    assert actions == [(27, TakeStacks), (27 + STACKS_SECONDS, Stop), (34, Kill)]
    assert close.verdict.guilty_process == 1


def test_a_gang_that_moves_again_while_it_is_looked_at_goes_on():
    ticks = [(time, Tick()) for time in range(8, 28)]
    again = [(28 + i / 10, at_step(i, 7, "step", 28 + i / 10)) for i in range(3)]
    stacks = [(29, Stacks(i, "", "S")) for i in range(3)]
    actions, close = play(
        *HANGING, *ticks, *again, *stacks, *[(30, ended(i)) for i in range(3)], watch=WATCH
    )
    assert actions == [(27, TakeStacks)]
    assert close.verdict.cause == "completed"


def test_the_user_is_told_why_the_gang_is_stopped():
    assert reason_of_stop((1, ended(1, -9, at=1))) == "process 1 was killed by SIGKILL"
    raised = ended(1, 1, at=1, failure=failure("KeyError: 'x'", 1))
    assert reason_of_stop((1, raised)) == "process 1 failed: KeyError: 'x'"
    assert reason_of_stop((1, lost("h2", 1))) == "host h2 was lost"


def test_events_of_nobody_are_not_heard():
    events = [(1, ended(7, 1)), (1, lost("elsewhere", 1)), (1, Raised(-1, failure()))]
    actions, close = play(*events, *[(2, ended(i)) for i in range(3)])
    assert actions == []
    assert close.verdict.cause == "completed"


def one_attempt(supervisor: Supervisor, now: float, *events):
    """Feed the events of an attempt at `now`; returns the actions of its end."""
    for event in events:
        supervisor.handle(event, now)
    return supervisor.handle(GangGone(), now)


def test_a_run_goes_on_after_a_failure_and_finishes():
    supervisor = Supervisor(policy(restart={"max_failures": 1, "backoff_seconds": 4.0}))
    hosts = ("h0", "h1", "h2")
    assert supervisor.handle(Tick(), 0.0) == [Start(hosts)]
    (close,) = one_attempt(supervisor, 10.0, ended(1, 1, at=10))
    assert isinstance(close, Close)
    assert close.retry.again
    assert 2.0 <= close.retry.delay_seconds <= 4.0
    assert supervisor.deadline == 10.0 + close.retry.delay_seconds
    assert supervisor.handle(Tick(), 11.9) == []
    assert supervisor.handle(ended(0, 1, at=12), 14.0) == []  # of the attempt that is over
    assert supervisor.handle(Tick(), 14.0) == [Start(hosts)]
    done = one_attempt(supervisor, 20.0, *[ended(i) for i in range(3)])
    assert [type(action) for action in done] == [Close, Finish]
    assert done[1] == Finish(0)
    assert supervisor.finished
    assert supervisor.deadline is None
    assert supervisor.handle(Tick(), 30.0) == []


def test_a_stop_between_attempts_ends_the_run_at_once():
    supervisor = Supervisor(policy(restart={"max_failures": 5}))
    supervisor.handle(Tick(), 0.0)
    one_attempt(supervisor, 1.0, ended(1, 1, at=1))
    assert supervisor.handle(StopRequested(), 1.1) == [Finish(75)]
    assert supervisor.finished


def test_a_failed_gang_that_the_user_also_stops_is_not_started_again():
    supervisor = Supervisor(policy(restart={"max_failures": 5}))
    supervisor.handle(Tick(), 0.0)
    close, finish = one_attempt(supervisor, 1.0, ended(1, 1, at=1), StopRequested())
    assert (close.verdict.cause, close.retry.again) == ("exception", False)
    assert finish == Finish(1)


def test_a_run_goes_on_with_fewer_hosts_when_one_is_lost():
    supervisor = Supervisor(
        policy(4, restart={"max_preemptions": 3}, hosts_min=2, fits=lambda hosts: hosts != 3)
    )
    supervisor.handle(Tick(), 0.0)
    (close,) = one_attempt(supervisor, 1.0, lost("h1", 1.0))
    assert close.retry.why.endswith(", on 2 hosts instead of 4")
    assert supervisor.handle(Tick(), 9.0) == [Start(("h0", "h2"))]
    (close,) = one_attempt(supervisor, 10.0, lost("h0", 10.0))
    assert close.retry.why.endswith(", on 4 hosts instead of 2")
    assert supervisor.handle(Tick(), 19.0) == [Start(("h0", "h1", "h2", "h3"))]


def test_the_work_of_a_storm_is_one_stop_and_one_kill():
    number = 512
    supervisor = Supervisor(policy(number, restart={"max_failures": 1}))
    supervisor.handle(Tick(), 0.0)
    actions = []
    for i in range(number):
        event = lost(f"h{i}", i / number) if i % 2 else ended(i, -9, at=i / number)
        actions += supervisor.handle(event, i / number)
    actions += supervisor.handle(Tick(), 10.0)
    close = supervisor.handle(GangGone(), 10.0)[0]
    assert [type(action) for action in actions] == [Stop]
    assert isinstance(close, Close)
    assert close.verdict.guilty_process == 0
    assert len(close.verdict.explanation) < 1000


WANTED = Interrupted("preempted", "job 7 is preempted", 20.0)


def test_an_interrupted_gang_has_the_time_that_is_left_and_no_more():
    events = [(1, WANTED), (2, told(0, 75, 2, since=1)), (20.9, Tick()), (21, Tick())]
    actions, close = play(*events, (22, told(1, -9, 22, 1)), (22, told(2, -9, 22, 1)))
    assert actions == [(1, Stop), (21, Kill)]
    verdict = close.verdict
    assert (verdict.cause, verdict.exit_code) == ("preempted", 75)
    assert verdict.message == "job 7 is preempted"
    assert verdict.guilty_process is None


def test_a_shorter_time_counts_and_a_longer_one_does_not():
    shorter = Interrupted("preempted", "job 7 is preempted", 3.0)
    actions, _ = play((1, WANTED), (2, shorter), (3, WANTED), (4.9, Tick()), (5, Tick()))
    assert actions == [(1, Stop), (5, Kill)]


def test_an_interruption_after_a_failure_changes_nothing_of_its_cause():
    events = [(1, ended(1, 1, at=1)), (1.1, WANTED), (1.2, told(0, 75, 1.2, 1))]
    _, close = play(*events, (1.3, told(2, 75, 1.3, 1)))
    assert (close.verdict.cause, close.verdict.guilty_process) == ("exception", 1)


def test_a_failure_of_its_own_while_it_saves_is_told():
    raised = told(1, 1, at=3, since=1, failure=failure("OSError: disk full", 3))
    _, close = play((1, WANTED), (3, raised), (4, told(0, 75, 4, 1)), (4, told(2, 75, 4, 1)))
    assert close.verdict.cause == "preempted"
    assert close.verdict.message == "while stopping, process 1/3 on h1 failed: OSError: disk full"


def test_the_user_may_stop_what_is_interrupted_and_it_stays_stopped():
    actions, close = play((1, WANTED), (2, StopRequested()), (3, StopRequested()))
    assert actions == [(1, Stop), (3, Kill)]
    assert close.verdict.cause == "stopped"


def queued(**fields) -> Supervisor:
    supervisor = Supervisor(policy(queued=True, **fields))
    supervisor.handle(Tick(), 0.0)
    return supervisor


def test_machines_from_a_queue_are_given_back_when_they_are_wanted():
    supervisor = queued(restart={"max_preemptions": 1})
    ends = [told(i, 75, 1, since=1) for i in range(3)]
    close, requeue, finish = one_attempt(supervisor, 1.0, WANTED, *ends)
    assert close.retry.again
    assert close.retry.why == "interruption 1 of 1, back to the queue"
    assert (requeue.without, finish.exit_code) == ((), 75)


def test_after_a_failure_they_are_kept_unless_one_is_leaving():
    supervisor = queued(restart={"max_failures": 2, "backoff_seconds": 0.0})
    failed = [ended(1, 1, at=1), *[told(i, 0, 1, since=1) for i in (0, 2)]]
    (close,) = one_attempt(supervisor, 1.0, *failed)
    assert close.retry.again
    assert supervisor.handle(Tick(), 2.0) == [Start(("h0", "h1", "h2"))]
    close, requeue, _ = one_attempt(supervisor, 3.0, *failed, HostLeaving("h2"))
    assert requeue == Requeue(("h2",))
    assert "back to the queue without h2" in close.retry.why


def test_machines_that_are_mended_are_not_said_to_be_left():
    supervisor = queued(mends_machines=True, restart={"max_preemptions": 1})
    gone = [lost("h1", 1), told(0, -15, 1, since=1), told(2, -15, 1, since=1)]
    close, _, _ = one_attempt(supervisor, 1.0, *gone)
    assert close.retry.why == "interruption 1 of 1, again when its machines are in order"


def test_a_lost_machine_is_given_back():
    supervisor = queued(restart={"max_preemptions": 1})
    gone = [lost("h1", 1), told(0, -15, 1, since=1), told(2, -15, 1, since=1)]
    _, requeue, finish = one_attempt(supervisor, 1.0, *gone)
    assert (requeue.without, finish.exit_code) == (("h1",), 75)
    assert requeue.delay_seconds > 0


def test_nothing_is_put_back_when_the_budget_is_used_up_or_between_attempts():
    supervisor = queued()
    ends = [told(i, 75, 1, since=1) for i in range(3)]
    close, finish = one_attempt(supervisor, 1.0, WANTED, *ends)
    assert not close.retry.again
    assert finish.exit_code == 75
    waiting = queued(restart={"max_failures": 1, "backoff_seconds": 60.0})
    one_attempt(waiting, 1.0, ended(1, 1, at=1), ended(0, 0, at=1), ended(2, 0, at=1))
    assert [type(action) for action in waiting.handle(WANTED, 2.0)] == [Requeue, Finish]
    cancelled = queued(restart={"max_failures": 1, "backoff_seconds": 60.0})
    one_attempt(cancelled, 1.0, ended(1, 1, at=1), ended(0, 0, at=1), ended(2, 0, at=1))
    stopped = Interrupted("stopped", "job 7 was cancelled", 5.0)
    assert [type(action) for action in cancelled.handle(stopped, 2.0)] == [Finish]


def test_what_earlier_starts_of_a_job_have_used_is_gone():
    one = Outcome(Verdict("preempted", 75, "x"), None, 10)
    last = queued(restart={"max_preemptions": 2}, history=(one,))
    ends = [told(i, 75, 1, since=1) for i in range(3)]
    close, *_ = one_attempt(last, 1.0, WANTED, *ends)
    assert close.retry.why == "interruption 2 of 2, back to the queue"
    spent = Supervisor(policy(queued=True, restart={"max_preemptions": 1}, history=(one, one)))
    assert spent.handle(Tick(), 0.0) == [Finish(75)]
