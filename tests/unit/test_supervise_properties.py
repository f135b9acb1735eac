"""What must hold whatever happens: events of every kind, also nonsense, in any order."""

from __future__ import annotations

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from launch.events import (
    Close,
    Exited,
    Failure,
    Finish,
    GangGone,
    HostLeaving,
    HostLost,
    Interrupted,
    NotStarted,
    Progress,
    Raised,
    Requeue,
    Stacks,
    Start,
    Started,
    StopRequested,
    Tick,
)
from launch.evidence import fault
from launch.spec import RestartPolicy, WatchPolicy
from launch.supervise import Policy, Supervisor
from tests.unit import jax_ends
from tests.unit.test_stacks import JITTED, SLEEPING, SYNC

HOSTS = ("h0", "h1", "h2")
BUDGET = RestartPolicy(max_failures=2, max_preemptions=2, max_attempts_without_progress=4)

ids = st.sampled_from([-1, 0, 0, 1, 1, 2, 2, 3, 4, 5, 99])
times = st.floats(0, 100, allow_nan=False)
failures = st.builds(
    Failure,
    type=st.sampled_from(["ValueError", "MemoryError", "ConfigError", "JaxRuntimeError"]),
    message=st.sampled_from(["bad", jax_ends.GLOO_MESSAGE, "RESOURCE_EXHAUSTED: x", ""]),
    traceback=st.just(""),
    at=times,
    accuses=st.sampled_from([(), (), (), (1,), (0, 99), (-3,)]),
)
codes = st.sampled_from([(0, None), (0, None), (1, None), (2, None), (75, None), (134, None)])
signals = st.sampled_from([(None, 6), (None, 9), (None, 15)])
events = st.one_of(
    st.builds(Started, ids),
    st.builds(
        lambda process_id, how, **rest: Exited(process_id, *how, **rest),
        process_id=ids,
        how=codes | signals,
        ended_at=times,
        told_at=st.none() | times,
        failure=st.none() | failures,
        oom_killed=st.booleans(),
        last_lines=st.sampled_from([(), jax_ends.PEER_LEFT, jax_ends.RAISED_THEN_ABORTED]),
    ),
    st.builds(NotStarted, ids, st.just("x: no such file"), times),
    st.builds(Raised, ids, failures),
    st.builds(
        Progress, ids, st.integers(0, 3), st.sampled_from(["data", "save", "exit", "?"]), times
    ),
    st.builds(Stacks, ids, st.sampled_from(["", JITTED, SLEEPING, SYNC]), st.sampled_from("RSDT")),
    st.builds(HostLost, st.sampled_from([*HOSTS, "elsewhere"]), times),
    st.just(GangGone()),
    st.just(Tick()),
)
interruptions = st.builds(
    Interrupted,
    cause=st.sampled_from(["preempted", "time_limit", "host_lost", "stopped"]),
    message=st.just("the machines are wanted back"),
    seconds=st.sampled_from([0.0, 5.0, 50.0]),
    host=st.sampled_from([None, "h1"]),
)
rare = st.just(StopRequested()) | interruptions | st.builds(HostLeaving, st.sampled_from(HOSTS))
# A stop is rare, or nearly every run would be a stopped one.
scripts = st.lists(
    st.tuples(
        events | events | events | events | rare, st.sampled_from([0.0, 0.0, 0.1, 3.0, 40.0])
    ),
    min_size=4,
    max_size=40,
)
# Attempts that do end, with all the time that a wait between them takes.
reasons = st.sampled_from([Exited(0, 3, None, 0.0), HostLost("h1", 0.0), Exited(2, 75, None, 0.0)])
attempts = st.lists(
    st.tuples(reasons, st.lists(st.tuples(events, st.sampled_from([0.0, 0.1, 3.0])), max_size=4)),
    max_size=8,
).map(
    lambda scripts: [
        step
        for reason, script in scripts
        for step in [(reason, 0.1), *script, (GangGone(), 0.1), (Tick(), 1000.0)]
    ]
)


class Environment:
    """Feeds a Supervisor, and checks what it asks for."""

    def __init__(self, **fields):
        watch = WatchPolicy(data_seconds=30, step_min_seconds=30, compile_seconds=30)
        policy = Policy(HOSTS, 2, 10.0, BUDGET, watch, rng=random.Random(0), **fields)
        self.supervisor = Supervisor(policy)
        self.now = 0.0
        self.alive = False
        self.starts = 0
        self.closed: list[Close] = []
        self.finished = False
        self.queued = bool(fields.get("queued"))
        self.requeue: Requeue | None = None
        self.ends: dict[int, Exited | NotStarted] = {}  # What the attempt was told, first ones.
        self.raised: dict[int, Raised] = {}
        self.hosts: tuple[str, ...] = ()

    def feed(self, event) -> None:
        if self.alive:
            self._remember(event)
        gone = isinstance(event, GangGone)
        for action in self.supervisor.handle(event, self.now):
            assert not self.finished, "an action after the end"
            assert self.requeue is None or isinstance(action, Finish), "back in the queue, and on"
            if isinstance(action, Start):
                assert not self.alive, "two live attempts"
                assert self.starts == len(self.closed), "started before the last was closed"
                assert action.hosts
                assert set(action.hosts) <= set(HOSTS)
                self.alive, self.starts, self.hosts = True, self.starts + 1, action.hosts
                self.ends, self.raised = {}, {}
            elif isinstance(action, Close):
                assert self.alive
                assert gone, "closed while something may be alive"
                self.alive = False
                self.closed.append(action)
                self._check(action)
            elif isinstance(action, Requeue):
                assert self.queued
                assert not self.alive
                self.requeue = action
            elif isinstance(action, Finish):
                assert not self.alive
                self.finished = True
            else:
                assert self.alive, "an order to nobody"
        assert self.supervisor.finished is self.finished

    def _remember(self, event) -> None:
        process_id = getattr(event, "process_id", None)
        if process_id is None or not 0 <= process_id < 2 * len(self.hosts):
            return
        if isinstance(event, Exited | NotStarted):
            self.ends.setdefault(process_id, event)
        elif isinstance(event, Raised):
            self.raised.setdefault(process_id, event)

    def _check(self, close: Close) -> None:
        """A process whose failure is another's is not blamed when one failed of itself."""
        faults = {}
        for process_id in self.ends.keys() | self.raised.keys():
            raised = self.raised.get(process_id)
            end = self.ends.get(process_id)
            faults[process_id] = fault(process_id, end, raised.failure if raised else None)
        guilty = close.verdict.guilty_process
        own = [i for i, found in faults.items() if found and found.own and self.ends.get(i)]
        if own and guilty in faults and close.verdict.cause != "stopped":
            found = faults[guilty]
            named = any(f and guilty in f.accuses for f in faults.values())
            # An end that is no failure may be one's who left early; an accused one is named.
            assert found is None or not found.collateral or named or close.verdict.cause == "hang"
        assert guilty not in close.verdict.collateral
        assert (close.verdict.message == "") is (close.verdict.cause == "completed")
        assert "\n" not in close.verdict.message


def play(script, **fields) -> Environment:
    environment = Environment(**fields)
    environment.feed(Tick())
    for event, seconds in script:
        environment.now += seconds
        environment.feed(event)
    return environment


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(
    script=scripts | attempts,
    hosts_min=st.sampled_from([None, 1]),
    reports=st.booleans(),
    queued=st.booleans(),
)
def test_one_attempt_lives_at_a_time_and_budgets_hold(script, hosts_min, reports, queued):
    environment = play(script, hosts_min=hosts_min, reports=reports, queued=queued)
    causes = [close.verdict.cause for close in environment.closed if close.retry.again]
    preempted = [cause in ("preempted", "time_limit", "host_lost") for cause in causes]
    assert preempted.count(True) <= BUDGET.max_preemptions
    assert preempted.count(False) <= BUDGET.max_failures
    assert environment.starts <= 1 + BUDGET.max_failures + BUDGET.max_preemptions
    assert not {"config", "stopped", "completed"} & set(causes)


own_ends = st.builds(
    lambda at, how: (True, at, how), times, st.sampled_from([(1, None), (None, 9), (None, 11)])
)
peer_ends = st.builds(lambda at, how: (False, at, how), times, st.just((None, 6)))


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(
    ends=st.lists(own_ends | peer_ends, min_size=6, max_size=6).filter(
        lambda ends: any(own for own, _, _ in ends)
    ),
    order=st.permutations(range(6)),
)
def test_the_first_to_fail_of_itself_is_guilty_in_whatever_order_it_is_told(ends, order):
    environment = play([])
    for process_id in order:
        own, at, how = ends[process_id]
        lines = () if own else jax_ends.PEER_KILLED
        environment.feed(Exited(process_id, *how, ended_at=at, last_lines=lines))
    environment.feed(GangGone())
    first = min((at, process_id) for process_id, (own, at, _) in enumerate(ends) if own)
    (close,) = environment.closed
    assert close.verdict.guilty_process == first[1]
    assert close.verdict.collateral == tuple(i for i, (own, _, _) in enumerate(ends) if not own)


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(script=scripts, last=scripts)
def test_a_run_ends_if_its_gangs_do(script, last):
    environment = play(script)
    for event, _ in [*last, (Tick(), 0.0)]:  # The clock stands still.
        environment.feed(event)
    for _ in range(2 * (1 + BUDGET.max_failures + BUDGET.max_preemptions)):
        environment.now = max(environment.now, environment.supervisor.deadline or 0.0)
        environment.feed(Tick())
        environment.feed(GangGone())
    assert environment.finished


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(script=scripts)
def test_a_failed_or_stopped_gang_is_told_and_killed_in_time(script):
    """Whenever something waits, time alone leads on: no gang lives for ever after a failure."""
    environment = play(script)
    environment.feed(Exited(0, 3, None, environment.now))
    for _ in range(8):
        deadline = environment.supervisor.deadline
        if deadline is None:
            break
        assert deadline <= environment.now + 60
        environment.now = max(environment.now, deadline)
        environment.feed(Tick())
    if environment.alive and environment.ends.keys() >= {0}:
        environment.feed(GangGone())
        assert not environment.alive
