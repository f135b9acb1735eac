"""What can befall a run on TPU slices: it goes on or ends as it should, says why, and leaves
nothing."""

from __future__ import annotations

import os
import signal
import threading
import time

import pytest

from launch import contract, rundir
from tests.testing.gangs import wait_until
from tests.testing.tpu_muster import TpuMuster
from tests.testing.tpu_programs import saver


def end(muster: TpuMuster, started, code: int = contract.EXIT_DONE) -> str:
    """What the command has said, when it has ended with this exit code and left nothing."""
    try:
        _, err = started.communicate(timeout=200)
    finally:
        started.kill()  # Of no effect on one that has ended.
    assert started.returncode == code, err
    assert (muster.there(), muster.jobs()) == ([], []), err
    assert "Traceback" not in err
    return err


def causes(muster: TpuMuster) -> list[str]:
    """Why each attempt ended."""
    numbers = rundir.attempt_numbers(muster.workdir)
    return [muster.attempt(number)["cause"] for number in numbers]


def creations(muster: TpuMuster) -> int:
    """How often a queued resource was asked for."""
    asked = muster.cloud.api.mutations()
    return sum((one.method, one.path[-16:]) == ("POST", "/queuedResources") for one in asked)


def jobs_of(muster: TpuMuster, words: str, worker: int | None = None) -> list[int]:
    """Process ids on a worker's VM, or on all, of those whose command line has these words."""
    hosts, addresses = muster.cloud.hosts, muster.cloud.hosts_of(muster.node_of())
    wanted = addresses if worker is None else [addresses[worker]]
    return [pid for one in wanted for pid, command in hosts.jobs(one) if words in command]


def test_a_preempted_slice_is_deleted_and_made_anew_and_the_run_goes_on(gang, cloud):
    muster = gang()
    started = muster.start(program=saver(60))
    muster.wait_for_log("at 10\n")
    cloud.api.preempt(muster.node_of())
    err = end(muster, started)
    assert causes(muster) == ["preempted", "completed"], err
    first, second = muster.attempt(0), muster.attempt(1)
    assert "was preempted: Google has taken the machine back" in first["message"]
    assert first["backend_ids"] != second["backend_ids"]
    assert creations(muster) == 2
    assert all(int(muster.log(i, 1).split()[1]) >= 10 for i in range(2))
    assert 10 <= second["first_step"] < 60


def test_a_slice_preempted_during_set_up_is_made_anew(gang, cloud, storage):
    once = f"[ -e {storage}/again ] || {{ touch {storage}/again; sleep 60; }}"
    muster = gang(setup=(once,))
    started = muster.start(program="print('hello')")
    wait_until((storage / "again").exists, "set-up")
    cloud.api.preempt(muster.node_of())
    err = end(muster, started)
    assert causes(muster) == ["completed"], err
    assert creations(muster) == 2
    assert "was preempted" in err


def test_before_maintenance_the_program_saves_and_after_it_the_run_goes_on(gang, cloud):
    muster = gang()
    started = muster.start(program=saver(60))
    muster.wait_for_log("at 10\n")
    cloud.api.set_node(muster.node_of(), health="UNHEALTHY_MAINTENANCE")
    wait_until(lambda: muster.attempts_closed() == 1, "the attempt's end")
    before = len(cloud.api.requests)

    def asked(end_of_path: str) -> int:
        return sum(one.path.endswith(end_of_path) for one in cloud.api.requests[before:])

    wait_until(lambda: asked("/nodes") > 3, "the node to be looked at")
    assert asked(":getGuestAttributes") == 0  # Nobody goes to a machine that is worked on.
    cloud.api.set_node(muster.node_of(), health="HEALTHY")
    err = end(muster, started)
    assert causes(muster) == ["preempted", "completed"], err
    assert "is about to have maintenance" in muster.attempt(0)["message"]
    assert creations(muster) == 1
    for i in range(2):
        saved = muster.log(i).split()[-2]
        assert muster.log(i).endswith(f"at {saved}\ntold\n")
        assert muster.log(i, 1).startswith(f"from {saved}\n")


LINES = 3000
COUNTER = f"""
    import time
    for i in range({LINES}):
        print("line", i, flush=True)
        time.sleep(0.002)
"""


def test_connections_may_fail_and_break_and_no_line_is_lost(gang, cloud):
    muster = gang()
    asked: list[str] = []

    def refuse_for_a_while(request) -> None:
        """From gcloud's first ssh until some seconds after it has said how all are reached."""
        if request.path.endswith(":getGuestAttributes"):
            address = cloud.hosts_of(muster.node_of())[1]
            asked.append(address)
            if len(asked) == 1:
                cloud.hosts.refuse(address, True)
            elif len(asked) == 2:
                threading.Timer(6.0, cloud.hosts.refuse, (address, False)).start()

    cloud.api.on_request = refuse_for_a_while
    started = muster.start(program=COUNTER)
    node = muster.node_of()
    muster.wait_for_log("line 300\n")
    programs = jobs_of(muster, "program.py")
    assert len(programs) == 2
    for addresses in (cloud.hosts_of(node)[:1], cloud.hosts_of(node)):
        for address in addresses:
            cloud.hosts.cut_connections(address)
        time.sleep(0.7)
    assert jobs_of(muster, "program.py") == programs
    err = end(muster, started)
    assert f"{node}-w1 is not reached" in err
    assert f"lost the connection to {node}-w1" in err
    assert causes(muster) == ["completed"]
    whole = "".join(f"line {i}\n" for i in range(LINES))
    assert [muster.log(i) == whole for i in range(2)] == [True, True]


COUNTS_AND_FAILS = """
    import os, pathlib, sys, time
    storage = pathlib.Path(os.environ["MUSTER_STORAGE_DIR"])
    storage.mkdir(exist_ok=True)
    me, attempt = os.environ["MUSTER_PROCESS_ID"], os.environ["MUSTER_ATTEMPT"]
    with (storage / "starts").open("a") as file:
        file.write(f"{attempt}-{me} ")
    print("there", flush=True)
    time.sleep(60 if attempt == "0" or me == "0" else 1)
    sys.exit(255)
"""


def test_a_killed_agent_and_exit_code_255_are_told_apart_and_the_machines_kept(gang, cloud):
    muster = gang(restart={"max_failures": 0, "max_preemptions": 3, "backoff_seconds": 0.2})
    started = muster.start(program=COUNTS_AND_FAILS)
    muster.wait_for_log("there")
    node = muster.node_of()
    os.kill(min(jobs_of(muster, "launch.agent.served", 1)), signal.SIGKILL)
    err = end(muster, started, contract.EXIT_FAILED)
    assert causes(muster) == ["host_lost", "exception"], err
    first, second = muster.attempt(0), muster.attempt(1)
    assert first["guilty_host"] == f"{node}-w1"
    assert (second["guilty_process"], second["guilty_host"]) == (1, f"{node}-w1")
    assert "exited with code 255" in second["message"]
    assert creations(muster) == 1
    assert "again when its machines are in order" in err
    [starts] = [path.read_text() for path in muster.storage.glob("*/starts")]
    assert sorted(starts.split()) == ["0-0", "0-1", "1-0", "1-1"]


def test_a_frozen_host_is_named_and_the_slice_made_anew(gang, cloud):
    muster = gang(tpu={"silent_seconds": 6.0})
    started = muster.start(program=saver(40))
    muster.wait_for_log("at 5\n")
    node = muster.node_of()
    cloud.hosts.freeze(cloud.hosts_of(node)[1], True)
    err = end(muster, started)
    assert causes(muster) == ["host_lost", "completed"], err
    assert muster.attempt(0)["guilty_host"] == f"{node}-w1"
    assert creations(muster) == 2


@pytest.mark.parametrize("when", ["queued", "running"])
def test_ctrl_c_gives_everything_back_and_the_run_can_go_on(gang, cloud, when):
    muster = gang()
    cloud.api.hold = when == "queued"
    started = muster.start(program=saver(100_000))
    if when == "queued":
        wait_until(muster.there, "a queued resource")
    else:
        muster.wait_for_log("at 5\n")
    started.send_signal(signal.SIGINT)
    err = end(muster, started, contract.EXIT_RESUMABLE)
    assert "start the same command again to go on" in err
    if when == "running":
        assert causes(muster) == ["stopped"]
        assert all("told" in muster.log(i) for i in range(2))


def test_kept_machines_are_used_again(gang, cloud):
    muster = gang(tpu={"keep": True})
    done = muster.run(program="print('first')")
    assert done.returncode == contract.EXIT_DONE, done.stderr
    node = muster.node_of()
    assert set(muster.there()) == {node}
    assert f"kept, and to be paid for: {node}" in done.stderr
    again = muster.run("--cluster.tpu.keep=False", program="print('second')")
    assert again.returncode == contract.EXIT_DONE, again.stderr
    assert "second" in again.stdout
    assert creations(muster) == 1
    assert muster.there() == []
