"""What can befall a job on SLURM: each ends or goes on as it should, and says why.

The program does a step every tenth of a second, saves where it is when it is told to stop, and goes
on from there; it knows nothing of JAX.
"""

from __future__ import annotations

import itertools
import os
import signal
import time

import pytest

from launch import contract, rundir
from launch.backends.slurm import client
from tests.testing.gangs import wait_until
from tests.testing.slurm import SlurmMuster

SAVER = """
    import os, pathlib, signal, sys, time
    from launch.contract import report_progress
    me = os.environ["MUSTER_PROCESS_ID"]
    saved = pathlib.Path(os.environ["MUSTER_RUN_DIR"], "saved-" + me)
    step = int(saved.read_text()) if saved.exists() else 0
    told = []
    signal.signal(signal.SIGTERM, lambda *_: told.append(1))
    print("from", step, flush=True)
    while step < STEPS and not told:
        report_progress(step, "step")
        time.sleep(0.1)
        step += 1
    saved.write_text(str(step))
    report_progress(step, "step")
    print("at", step, flush=True)
    sys.exit(0 if step >= STEPS else 75)
"""


def saver(steps: int) -> str:
    return SAVER.replace("STEPS", str(steps))


def check_no_step_is_lost(muster: SlurmMuster) -> None:
    """Every attempt goes on where the one before it had saved."""
    numbers = rundir.attempt_numbers(muster.workdir)
    for process_id in range(4):
        for before, after in itertools.pairwise(numbers):
            saved = muster.log(process_id, before).split("at ")[1].split()[0]
            assert f"from {saved}\n" in muster.log(process_id, after)


@pytest.mark.parametrize(
    ("event", "cause", "says"),
    [
        ("requeue", "preempted", "SLURM has put the job back into the queue"),
        ("preempt", "preempted", "is preempted"),
        ("down", "host_lost", "SLURM has lost node node2"),
        ("kill slurmd node2", "host_lost", "SLURM has lost node node2"),
        ("kill slurmd node1", "host_lost", "SLURM has lost node node1"),  # The controller's own.
    ],
)
def test_a_job_that_is_taken_away_saves_and_goes_on(slurm, muster, event, cause, says):
    started = muster.start(program=saver(100 if "kill" not in event else 300))
    muster.wait_for_step(10)
    job_id = muster.job_id()
    other = None
    if event == "requeue":
        slurm.command("scontrol", "requeue", job_id)
    elif event == "preempt":
        options = ["-p", "high", "-N4", "--exclusive", "--output=/dev/null"]
        other = slurm.command("sbatch", "--parsable", *options, "--wrap=sleep 3").strip()
    elif event == "down":
        slurm.command("scontrol", "update", "NodeName=node2", "State=DOWN", "Reason=test")
    else:
        slurm.kill(event.removeprefix("kill "))
    _, err = started.communicate(timeout=120)
    assert started.returncode == contract.EXIT_DONE, err
    assert muster.causes() == [cause, "completed"], err
    first, second = muster.attempt(0), muster.attempt(1)
    assert says in first["message"]
    assert first["retry"]["again"]
    assert first["backend_ids"] == second["backend_ids"] == [job_id]
    assert second["first_step"] == first["last_step"]
    check_no_step_is_lost(muster)
    if cause == "host_lost":
        assert first["guilty_host"] == says.split()[-1]
    if "kill" in event:
        assert first["guilty_host"] not in second["hosts"]
    if other is not None:
        assert slurm.job(other)["JobState"] == "COMPLETED"


def test_the_time_limit_is_seen_before_it_comes(slurm, tmp_path):
    muster = SlurmMuster(tmp_path, slurm={"time": "1", "warning_seconds": 35.0})
    started = muster.start(program=saver(330))
    _, err = started.communicate(timeout=150)
    assert started.returncode == contract.EXIT_DONE, err
    assert muster.causes() == ["time_limit", "completed"]
    assert "back to the queue" in err
    check_no_step_is_lost(muster)
    # Some time was used, and some kept.
    assert 150 < muster.attempt(0)["last_step"] < 330


def test_scancel_ends_the_run_and_it_stays_ended(slurm, muster):
    started = muster.start(program=saver(100_000))
    muster.wait_for_step(5)
    slurm.command("scancel", muster.job_id())
    _, err = started.communicate(timeout=60)
    assert started.returncode == contract.EXIT_RESUMABLE, err
    assert muster.causes() == ["stopped"]
    assert "was cancelled" in muster.attempt()["message"]
    wait_until(lambda: slurm.job(muster.job_id())["JobState"] == "CANCELLED", "its end")
    assert all("at " in muster.log(i) for i in range(4))  # They had the time to save.


def test_a_job_whose_budget_is_used_up_is_not_put_back(slurm, tmp_path):
    muster = SlurmMuster(tmp_path, restart={"max_preemptions": 0})
    started = muster.start(program=saver(100_000))
    muster.wait_for_step(5)
    slurm.command("scontrol", "requeue", muster.job_id())
    _, err = started.communicate(timeout=60)
    assert started.returncode == contract.EXIT_RESUMABLE, err
    assert muster.causes() == ["preempted"]
    assert "not tried again" in err
    wait_until(lambda: slurm.job(muster.job_id())["JobState"] == "CANCELLED", "its end")


def test_the_budget_counts_over_all_starts_of_a_job(slurm, tmp_path):
    muster = SlurmMuster(tmp_path, restart={"max_preemptions": 1})
    started = muster.start(program=saver(100_000))
    for number in (0, 1):
        muster.wait_for_step(5, number)
        slurm.command("scontrol", "requeue", muster.job_id())
        wait_until(lambda n=number: muster.attempts_closed() > n, "the attempt's end")
    _, err = started.communicate(timeout=60)
    assert started.returncode == contract.EXIT_RESUMABLE, err
    assert muster.causes() == ["preempted", "preempted"]
    assert "given up: interruption 2, and restart.max_preemptions is 1" in err


def test_a_killed_process_is_named_and_started_again_without_queueing(slurm, muster):
    started = muster.start(program=saver(100))
    muster.wait_for_step(5)
    os.kill(_pid_of(muster, 2), signal.SIGKILL)
    _, err = started.communicate(timeout=60)
    assert started.returncode == contract.EXIT_DONE, err
    assert muster.causes() == ["killed", "completed"]
    first = muster.attempt(0)
    assert (first["guilty_process"], first["guilty_host"]) == (2, "node2")
    assert slurm.job(muster.job_id())["Restarts"] == "0"
    assert "process 2/4 on node2 was killed by SIGKILL" in err


def test_after_a_failure_a_drained_node_is_left_to_others(slurm, muster):
    started = muster.start(program=saver(150))
    muster.wait_for_step(5)
    slurm.command("scontrol", "update", "NodeName=node2", "State=DRAIN", "Reason=test")
    os.kill(_pid_of(muster, 1), signal.SIGKILL)
    _, err = started.communicate(timeout=90)
    assert started.returncode == contract.EXIT_DONE, err
    assert muster.causes() == ["killed", "completed"]
    assert "back to the queue without node2" in err
    assert "node2" not in muster.attempt(1)["hosts"]
    assert slurm.job(muster.job_id())["Restarts"] == "1"


def test_a_slurmctld_that_does_not_answer_is_no_failure(slurm, muster):
    started = muster.start(program=saver(260))
    muster.wait_for_step(5)
    slurm.suspend("slurmctld")
    time.sleep(20.0)
    slurm.suspend("slurmctld", stopped=False)
    _, err = started.communicate(timeout=120)
    assert started.returncode == contract.EXIT_DONE, err
    assert muster.causes() == ["completed"]


def test_a_lost_controller_leaves_nothing_and_the_next_run_says_so(slurm, muster):
    started = muster.start(program=saver(100_000))
    muster.wait_for_step(5)
    owner = rundir.owner(muster.workdir)
    assert owner is not None
    os.kill(owner["pid"], signal.SIGKILL)
    _, err = started.communicate(timeout=60)
    assert started.returncode == contract.EXIT_FAILED
    assert "has ended: FAILED" in err
    wait_until(lambda: not muster.left(), "the processes to end", seconds=10.0)
    again = muster.run(program="print('again')")
    assert again.returncode == contract.EXIT_DONE, again.stderr
    assert muster.causes() == ["killed", "completed"]


def _pid_of(muster: SlurmMuster, process_id: int) -> int:
    """A process of the gang by its environment; it runs on this machine."""
    wanted = f"{contract.PROCESS_ID}={process_id}\0".encode()
    for pid in muster.left():
        with open(f"/proc/{pid}/environ", "rb") as file:
            if wanted in file.read():
                return pid
    raise AssertionError(f"process {process_id} is not there")


def test_a_node_without_power_takes_the_controller_along_and_the_job_goes_on(slurm, muster):
    started = muster.start(program=saver(60))
    muster.wait_for_step(5)
    slurm.cut_power("node1")
    _, err = started.communicate(timeout=120)
    assert started.returncode == contract.EXIT_DONE, err
    assert muster.causes() == ["host_lost", "completed"]
    first, second = muster.attempt(0), muster.attempt(1)
    assert first["guilty_host"] == "node1"
    assert "where the controller ran" in first["message"]
    assert "node1" not in second["hosts"]
    assert second["queued_since"] == first["ended_at"]


def test_fewer_nodes_are_taken_where_the_config_allows_it(slurm, tmp_path):
    options = ["-N2", "--exclusive", "-t10", "--output=/dev/null", "--nodelist=node[3-4]"]
    slurm.command("sbatch", "--parsable", *options, "--wrap=sleep 600")
    muster = SlurmMuster(tmp_path, hosts=4, hosts_min=2, processes_per_host=1)
    done = muster.run("--process=all", program="import os; print(os.environ['MUSTER_HOST'])")
    assert done.returncode == contract.EXIT_DONE, done.stderr
    assert muster.attempt()["hosts"] == ["node1", "node2"]
    assert sorted(done.stdout.splitlines()) == ["[process 0/2] node1", "[process 1/2] node2"]


def test_a_job_that_slurmctld_has_forgotten_is_found_in_the_completion_log(slurm, muster):
    done = muster.run("--cluster.restart.max_failures=0", program="raise SystemExit(3)")
    assert done.returncode == contract.EXIT_FAILED
    job_id = muster.job_id()
    wait_until(lambda: client.ended(job_id), "the log")
    (job,) = client.ended(job_id)
    assert (job.state, job.exit_code, job.active) == ("FAILED", 1, False)
    assert client.ended("99999") == []
