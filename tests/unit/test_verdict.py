"""Who is to blame for an attempt's end, and what is said of it."""

from __future__ import annotations

import random

import pytest

from launch.events import Exited, NotStarted, Raised, Stacks, Started, StopRequested, Tick
from launch.evidence import failure_in, fault, out_of_memory
from tests.unit import jax_ends
from tests.unit.gang_play import at_step, ended, failure, judged, lost, told
from tests.unit.test_stacks import JITTED, SLEEPING, SYNC
from trainer.rollcall import AbsentError

ABSENT = f"{AbsentError.__module__}.{AbsentError.__qualname__}"
GLOO = f"ValueError: {jax_ends.GLOO_MESSAGE}"

# (exit code or -signal, the recorded exception or None, last lines): is it of a peer's death?
ENDS = {
    "a gloo error, recorded": (1, GLOO, (), True),
    "a gloo error, in the log": (1, None, jax_ends.PEER_KILLED[:5], True),
    "a gloo error, then the service's abort": (-6, None, jax_ends.PEER_KILLED, True),
    "the lead's death": (-6, None, jax_ends.LEAD_KILLED, True),
    "a missed heartbeat": (-6, None, jax_ends.PEER_STOPPED, True),
    "a missed heartbeat, under a shell": (134, None, jax_ends.PEER_STOPPED, True),
    "a shutdown barrier": (-6, None, jax_ends.PEER_LEFT, True),
    "a process that never came": (-6, None, jax_ends.NEVER_CAME, True),
    "an exception, then the shutdown barrier": (-6, None, jax_ends.RAISED_THEN_ABORTED, False),
    "a barrier's time is over": (1, "jax.errors.JaxRuntimeError: DEADLINE_EXCEEDED: x", (), True),
    "a save waits for the others": (
        1,
        "TimeoutError: Timed out while waiting for async_write_complete barrier.",
        (),
        True,
    ),
    "a time of its own is over": (1, "TimeoutError: Timed out while waiting for x", (), False),
    "NCCL's peer is gone": (
        1,
        "XlaRuntimeError: INTERNAL: NCCL operation ncclGroupEnd() failed: remote process exited or "
        "there was a network error",
        (),
        True,
    ),
    "the program's own connection": (
        1,
        "ConnectionResetError: [Errno 104] Connection reset by peer",
        (),
        False,
    ),
    "the program's own refused connection": (1, "OSError: Connection refused", (), False),
    "an accelerator that is busy": (
        1,
        "jax.errors.JaxRuntimeError: UNAVAILABLE: the TPU is in use by process 12",
        (),
        False,
    ),
    "an exception that speaks of gloo": (1, "ValueError: use gloo or mpi", (), False),
    "an abort of its own": (-6, None, ("free(): invalid pointer",), False),
    "a plain SIGKILL": (-9, None, (), False),
}


@pytest.mark.parametrize("name", ENDS)
def test_an_end_that_speaks_of_a_peer_is_told_from_one_of_its_own(name):
    code, raised, lines, of_a_peer = ENDS[name]
    recorded = failure(raised, 5.0) if raised else None
    found = fault(0, ended(0, code, at=6.0, failure=recorded, last_lines=lines))
    assert found.of_a_peer is of_a_peer
    assert found.own is not of_a_peer


@pytest.mark.parametrize(
    ("told_at", "own"), [(None, True), (4.9, False), (5.0, False), (5.1, True), (9.0, True)]
)
def test_what_comes_after_our_signal_is_no_failure_of_its_own(told_at, own):
    assert fault(0, ended(0, 1, at=6.0, told_at=told_at, failure=failure(at=5.0))).own is own


@pytest.mark.parametrize(
    ("end", "kind"),
    [
        (ended(0, 1, last_lines=jax_ends.HOST_MEMORY), "host"),
        (ended(0, 1, last_lines=jax_ends.DEVICE_MEMORY), "device"),
        (ended(0, 1, failure=failure("numpy._core._exceptions._ArrayMemoryError: 8 TiB")), "host"),
        (ended(0, 1, failure=failure("OSError: [Errno 12] Cannot allocate memory")), "host"),
        (ended(0, 1, failure=failure("jax.errors.JaxRuntimeError: INTERNAL: x")), None),
        (ended(0, 1, failure=failure("ValueError: RESOURCE_EXHAUSTED: disk is full")), None),
        (ended(0, -9, oom_killed=True), "host"),
        (ended(0, -9), None),
        (ended(0, -6, last_lines=("terminate called after 'std::bad_alloc'",)), "host"),
        (ended(0, -6, last_lines=("[low_level_alloc.cc : 599] RAW: mmap error: 12",)), "host"),
        (ended(0, -6, last_lines=("[low_level_alloc.cc : 599] RAW: mmap error: 1",)), None),
    ],
)
def test_out_of_memory_is_told_by_where(end, kind):
    assert out_of_memory(fault(0, end)) == kind
    verdict = judged((1, end), num_hosts=2)
    assert (verdict.cause == "oom") is (kind is not None)
    if kind:
        assert f"ran out of memory on the {kind}" in verdict.message


def test_an_exception_that_a_program_lived_on_after_is_not_its_end():
    lines = (*jax_ends.HOST_MEMORY, "that was caught; going on", "step 7")
    assert failure_in(lines, 0.0) is None
    assert failure_in(jax_ends.RAISED_THEN_ABORTED, 3.0).message == "the data is bad at step 20"
    assert failure_in(("no traceback here",), 0.0) is None


GUILTY = {
    "the earlier of two failures, reported last": (
        [(1.1, ended(2, 1, at=1.05)), (1.2, ended(0, 1, at=1.0))],
        ("exception", 0),
    ),
    "the killed one, not those that felt it": (
        [
            (1, ended(0, -6, at=1.0, last_lines=jax_ends.PEER_KILLED)),
            (1, ended(1, -6, at=1.0, last_lines=jax_ends.PEER_KILLED)),
            (2, ended(2, -9, at=1.5)),
        ],
        ("killed", 2),
    ),
    "a lost host, not those that felt it": (
        [(1, ended(0, -6, at=1.0, last_lines=jax_ends.LEAD_KILLED)), (2, lost("h2", 1.9))],
        ("host_lost", None),
    ),
    "a failure before its host was lost": (
        [(1, ended(2, 1, at=1.0)), (2, lost("h1", 1.9))],
        ("exception", 2),
    ),
    "a raised exception, though all die of the barrier later": (
        [(1, Raised(1, failure(at=1.0)))]
        + [(9, ended(i, -6, at=9.0, last_lines=jax_ends.PEER_LEFT)) for i in range(3)],
        ("exception", 1),
    ),
    "an exception that only the log shows": (
        [
            (9, ended(0, -6, at=9.0, last_lines=jax_ends.PEER_LEFT)),
            (9, ended(1, -6, at=9.1, last_lines=jax_ends.RAISED_THEN_ABORTED)),
            (9, ended(2, -6, at=9.0, last_lines=jax_ends.PEER_LEFT)),
        ],
        ("exception", 1),
    ),
    "who left with code 0 while the others trained": (
        [
            (1, ended(2, 0, at=1.0)),
            (2, ended(0, 1, at=2.0, failure=failure(GLOO, 2.0))),
            (2, ended(1, 1, at=2.0, failure=failure(GLOO, 2.0))),
        ],
        ("exception", 2),
    ),
    "who was on its way out, as it says itself": (
        [
            (1, at_step(0, 5)),
            (1, at_step(1, 5)),
            (1, at_step(2, 5, "exit", 0.9)),
            (9, ended(0, -6, at=9.0, last_lines=jax_ends.NEVER_CAME)),
            (11, Tick()),
        ],
        ("exception", 2),
    ),
    "who was first at the shutdown barrier": (
        [(9, ended(i, -6, at=9.0, last_lines=jax_ends.PEER_LEFT)) for i in range(3)],
        ("exception", 1),
    ),
    "the one that is alive and silent": (
        [
            (1, ended(0, -6, at=1.0, last_lines=jax_ends.PEER_STOPPED)),
            (1.1, Stacks(1, "", "S")),
            (1.1, Stacks(2, "", "S")),
            (3, Tick()),
            (5, told(1, -9, at=5, since=3)),
            (5, told(2, -9, at=5, since=3)),
        ],
        ("hang", 1),
    ),
    "the only one that still runs": (
        [
            (1, ended(0, -6, at=1.0, last_lines=jax_ends.NEVER_CAME)),
            (1, ended(1, -6, at=1.0, last_lines=jax_ends.NEVER_CAME)),
            (1.1, Stacks(2, SLEEPING, "S")),
            (3, Tick()),
            (5, told(2, -9, at=5, since=3)),
        ],
        ("hang", 2),
    ),
    "the first, if all speak of others": (
        [(2, ended(i, 1, at=2.0 - i / 9, failure=failure(GLOO, 2.0 - i / 9))) for i in range(3)],
        ("exception", 2),
    ),
    "the accused one, which never came": (
        [
            (1, ended(0, 1, at=1.0, failure=failure("TimeoutError: no 2", 1.0, accuses=(2,)))),
            (3, Tick()),
            (4, told(1, at=4, since=3)),
            (4, told(2, at=4, since=3)),
        ],
        ("start_timeout", 2),
    ),
    "the accused one for its own failure": (
        [
            (1, ended(0, 1, at=1.0, failure=failure("TimeoutError: no 2", 1.0, accuses=(2,)))),
            (1.5, ended(2, 1, at=1.2, failure=failure("KeyError: 'x'", 1.2))),
        ],
        ("exception", 2),
    ),
    "the accused one's host": (
        [
            (1, ended(0, 1, at=1.0, failure=failure("TimeoutError: no 2", 1.0, accuses=(2,)))),
            (1.5, lost("h2", 1.2)),
        ],
        ("host_lost", None),
    ),
    "another failure before an accusation": (
        [
            (1, ended(1, 1, at=0.9, failure=failure("KeyError: 'x'", 0.9))),
            (1, ended(0, 1, at=1.0, failure=failure("TimeoutError: no 2", 1.0, accuses=(2,)))),
        ],
        ("exception", 1),
    ),
    "the one that did not come to the trainer's roll call": (
        [(i, ended(i, 1, at=i, failure=failure(f"{ABSENT}: no 2", i, (2,)))) for i in (0, 1)]
        + [(2, told(2, at=2, since=1))],
        ("start_timeout", 2),
    ),
    "the one that all say differs": (
        [
            (1, ended(i, 2, at=1.0, failure=failure("ConfigError: jax 0.9", 1.0, accuses=(1,))))
            for i in range(3)
        ],
        ("config", 1),
    ),
    "a program that did not start": (
        [(1, NotStarted(1, "x: no such file", 1.0)), (1, NotStarted(0, "x: no such file", 1.0))],
        ("config", 0),
    ),
    "a shell's child that was killed": ([(1, ended(1, 137, at=1.0))], ("killed", 1)),
    "nobody, when an end was never heard of": (
        [(1, ended(0)), (1, ended(1))],
        ("host_lost", None),
    ),
}


@pytest.mark.parametrize("name", GUILTY)
def test_the_guilty_one_is(name):
    events, (cause, guilty) = GUILTY[name]
    verdict = judged(*events)
    assert (verdict.cause, verdict.guilty_process) == (cause, guilty), verdict
    assert guilty not in verdict.collateral


@pytest.mark.parametrize("seed", range(5))
def test_the_order_of_reports_changes_nothing(seed):
    ends = [
        ended(0, 1, at=1.04, failure=failure(GLOO, 1.04)),
        ended(1, 3, at=1.00),
        ended(2, -11, at=1.03),
        ended(3, -6, at=1.30, last_lines=jax_ends.PEER_KILLED),
    ]
    random.Random(seed).shuffle(ends)
    verdict = judged(*[(2, end) for end in ends], num_hosts=4)
    assert (verdict.guilty_process, verdict.collateral) == (1, (0, 3))


WATCH = {"data_seconds": 20.0, "step_min_seconds": 10.0, "start_seconds": 30.0}


HANGS = {"num_hosts": 4, "watch": {**WATCH, "eval_seconds": 20.0}}


def judged_hang(*last, stacks=("", "", "", ""), states="SSSS"):
    """The verdict on a 4-process gang which stands still after step 5 and shows these stacks."""
    events = [(0.0, Started(i)) for i in range(4)]
    events += [(s, at_step(i, s, "step", float(s))) for s in range(1, 6) for i in range(4)]
    events += [(5.5, event) for event in last]
    events += [(16.0, Tick()), (26.0, Tick())]
    events += [(26.1, Stacks(i, stacks[i], states[i])) for i in range(4)]
    events += [(32.0, Tick())]
    return judged(*events, **HANGS)


ALL_JITTED = (JITTED, JITTED, JITTED, JITTED)
HANG_CASES = {
    "the one behind": ([at_step(2, 5, "data", 5.5)], ALL_JITTED, "SSSS", 2),
    "the stopped one": ([], ALL_JITTED, "SSTS", 2),
    "the one in a dead file system": ([], ALL_JITTED, "SDSS", 1),
    "the one that left": ([ended(3, 0, at=5.2)], ALL_JITTED, "SSSS", 3),
    "the one on its way out": ([at_step(3, 5, "exit", 5.4)], ALL_JITTED, "SSSS", 3),
    "the one that evaluates, when another was done": (
        [ended(3, 0, at=5.2)] + [at_step(i, 5, "eval", 5.3) for i in range(3)],
        (SYNC, SYNC, SLEEPING, SYNC),
        "SSSS",
        2,
    ),
    "the one whose stack differs": ([], (JITTED, SLEEPING, JITTED, SYNC), "SSSS", 1),
    "the busy one that shows no stack": ([], (SYNC, SYNC, SYNC, ""), "SSSR", 3),
    "nobody": ([], ALL_JITTED, "SSSS", None),
}


LEFT = ("the one that left", "the one on its way out")


@pytest.mark.parametrize("name", HANG_CASES)
def test_in_a_gang_that_hangs_the_guilty_one_is(name):
    last, stacks, states, guilty = HANG_CASES[name]
    verdict = judged_hang(*last, stacks=stacks, states=states)
    assert verdict.cause == ("exception" if name in LEFT else "hang")
    assert verdict.guilty_process == guilty, verdict


def test_a_hang_is_told_with_step_phase_and_place():
    verdict = judged_hang(
        at_step(2, 5, "data", 5.5), stacks=(SYNC, SYNC, SLEEPING, SYNC), states="SSSS"
    )
    assert verdict.message == (
        "process 2/4 on h2 hangs: no progress for 21 s at step 5 (data); its main thread is in "
        "<module> at /home/u/prog.py:20, the 3 others wait in the collective"
    )


def test_a_failure_is_told_with_step_exception_and_collateral():
    verdict = judged(
        (1, at_step(1, 5, "data", 1.0)),
        (2, ended(1, 1, at=2, failure=failure("ValueError: bad batch\nsecond line", 2))),
        (3, told(0, at=3, since=2)),
        (3, told(2, at=3, since=2)),
    )
    assert verdict.message == "process 1/3 on h1 failed at step 5 (data): ValueError: bad batch"
    assert verdict.explanation == (
        "Process 1/3 on h1 failed at step 5 (data): ValueError: bad batch. 2 other processes ended "
        "because of it."
    )
    assert verdict.failure.message == "bad batch\nsecond line"


def test_a_verdict_names_process_host_and_signal():
    verdict = judged((1, ended(1, -9, at=1)), (1, told(0, -15, 2)), (1, told(2, -15, 2)))
    assert verdict.message == "process 1/3 on h1 was killed by SIGKILL"
    assert verdict.guilty_host == "h1"


def test_a_second_end_of_a_process_is_not_believed():
    assert judged(*[(1, ended(i, 0)) for i in (0, 1, 2)], (2, ended(1, 1))).cause == "completed"


def test_a_lost_host_is_the_guilty_host():
    verdict = judged((1, lost("h0", 1)), (1, ended(1, 0)), (1, ended(2, 0)))
    assert (verdict.guilty_host, verdict.exit_code) == ("h0", 1)


def test_a_user_who_stops_a_gang_is_not_told_of_peers():
    verdict = judged(
        (1, StopRequested()),
        (2, told(1, 75, at=2, since=1)),
        (3, Exited(0, None, 6, 3, told_at=1, last_lines=jax_ends.LEAD_KILLED)),
        (3, told(2, 1, at=3, since=1, failure=failure(GLOO, 3))),
    )
    assert (verdict.cause, verdict.exit_code) == ("stopped", 75)


def test_processes_that_their_agent_stopped_by_itself_have_not_completed():
    # Told to stop at 1 s, by nobody that the launcher knows of; the agent then said it was done.
    alone = judged((1, told(0, -15, at=1.2, since=1.0)), (1, ended(1, 0)), (1, ended(2, 0)))
    assert (alone.cause, alone.guilty_host, alone.exit_code) == ("host_lost", "h0", 1)
    assert "the agent of host h0 stopped its processes by itself" in alone.message
    # What the others say of it is no reason of their own.
    lines = jax_ends.PEER_KILLED
    noisy = judged(
        (1, told(1, -15, at=1.2, since=1.0)),
        (2, ended(0, -6, at=1.4, last_lines=lines)),
        (5, told(2, -15, at=4.5, since=4.0)),
    )
    assert (noisy.cause, noisy.guilty_host, noisy.guilty_process) == ("host_lost", "h1", None)
    # It saved and left in order.
    saved = judged(*[(1, told(i, 75, at=2.0, since=1.0)) for i in range(3)])
    assert saved.cause == "preempted"
