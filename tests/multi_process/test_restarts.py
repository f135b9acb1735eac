"""What follows an attempt, with real processes that know nothing of JAX."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest

from launch import contract, rundir
from tests.testing.gangs import MusterCommand, environment, wait_until

QUICK = {"backoff_seconds": 0.1, "max_backoff_seconds": 0.2}
# Resumes from a file, does three steps an attempt, and then does as ENDING says.
STEPS = """
    import os, pathlib, sys, time
    from launch.contract import report_progress
    me, attempt = os.environ["MUSTER_PROCESS_ID"], int(os.environ["MUSTER_ATTEMPT"])
    saved = pathlib.Path(os.environ["MUSTER_RUN_DIR"], "saved-" + me)
    step = int(saved.read_text()) if saved.exists() else 0
    report_progress(0, "init")
    for step in range(step, step + 3):
        report_progress(step, "step")
        time.sleep(0.05)
    step += 1
    saved.write_text(str(step))
    report_progress(step, "step")
    while saved.exists() and not all(
        other.exists() and int(other.read_text() or 0) >= step
        for other in (saved.with_name("saved-0"), saved.with_name("saved-1"))
    ):
        time.sleep(0.01)  # Who fails must not take along what another has still to save.
    ENDING
"""


def steps(ending: str) -> str:
    return STEPS.replace("ENDING", ending)


def forgetful(program: str) -> str:
    """The same, but every attempt begins anew."""
    return program.replace("saved.write_text(str(step))", "pass")


@pytest.fixture
def muster(tmp_path: Path):
    command = MusterCommand(tmp_path, restart={"max_failures": 5, **QUICK})
    yield command
    command.check_nothing_is_left()


def attempts(muster: MusterCommand) -> list[dict[str, Any]]:
    return [muster.attempt(number) for number in rundir.attempt_numbers(muster.workdir)]


def test_a_gang_that_fails_twice_is_started_three_times_and_each_says_where_it_goes_on(muster):
    program = steps("sys.exit(f'failed at {step}') if me == '1' and attempt < 2 else None")
    says = "\n    import os\n    print(os.environ['MUSTER_COORDINATOR_ADDRESS'])"
    done = muster.run(program=says + program)
    assert done.returncode == 0, done.stderr
    found = attempts(muster)
    assert [record["cause"] for record in found] == ["exception", "exception", "completed"]
    assert [record["guilty_process"] for record in found] == [1, 1, None]
    assert [record["first_step"] for record in found] == [0, 3, 6]
    assert [record["last_step"] for record in found] == [3, 6, 9]
    assert [record["retry"]["again"] for record in found] == [True, True, False]
    assert "failure 2 of 5, again in" in done.stderr
    assert "attempt 1 goes on from step 3" in done.stderr
    assert len({muster.log(0, number) for number in range(3)} - {""}) == 3  # A port of its own.


def test_the_same_exception_at_the_same_step_is_not_tried_a_third_time(muster):
    done = muster.run(program=forgetful(steps("raise ValueError('bad row')")))
    assert done.returncode == 1
    assert len(attempts(muster)) == 2
    assert "the same ValueError at step 3 twice; it would fail again" in done.stderr


@pytest.mark.parametrize(
    ("program", "cause", "exit_code", "said"),
    [
        ("import no_such_module_there_is", "exception", 1, "cannot be loaded"),
        ("import sys; sys.exit(2)", "config", 2, ""),
    ],
)
def test_what_would_fail_again_is_not_tried_again(muster, program, cause, exit_code, said):
    done = muster.run(program=program)
    assert done.returncode == exit_code
    assert [record["cause"] for record in attempts(muster)] == [cause]
    assert said in done.stderr


def test_attempts_that_get_no_further_are_given_up(tmp_path):
    muster = MusterCommand(
        tmp_path, restart={"max_failures": 50, "max_attempts_without_progress": 2, **QUICK}
    )
    done = muster.run(program=forgetful(steps("os.kill(os.getpid(), 9)")))
    assert done.returncode == 1
    assert len(attempts(muster)) == 3  # The first one did get somewhere.
    assert "2 attempts in a row got no further than step 3" in done.stderr


def test_preemptions_have_a_budget_of_their_own(tmp_path):
    muster = MusterCommand(tmp_path, restart={"max_preemptions": 1, **QUICK})
    done = muster.run(program=steps("sys.exit(75)"))
    assert done.returncode == contract.EXIT_RESUMABLE
    assert [record["cause"] for record in attempts(muster)] == ["preempted"] * 2
    assert "restart.max_preemptions is 1" in done.stderr


def test_a_run_goes_on_without_the_host_it_has_lost(tmp_path):
    muster = MusterCommand(
        tmp_path,
        hosts=3,
        processes_per_host=1,
        hosts_min=2,
        restart={"max_preemptions": 1, **QUICK},
    )
    program = """
        import os, time
        print("ready", os.environ["MUSTER_NUM_PROCESSES"], os.environ["MUSTER_HOST"], flush=True)
        time.sleep(600 if os.environ["MUSTER_ATTEMPT"] == "0" else 0)
    """
    process = muster.start(program=program)
    muster.wait_for_log("ready", processes=3)
    victim = muster.agent_of("local1")
    os.kill(victim, signal.SIGKILL)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    found = attempts(muster)
    assert (found[0]["cause"], found[0]["guilty_host"]) == ("host_lost", "local1")
    assert found[1]["hosts"] == ["local0", "local2"]
    assert [muster.log(i, 1) for i in range(2)] == ["ready 2 local0\n", "ready 2 local2\n"]
    muster.check_nothing_is_left()


def test_an_agent_that_is_not_heard_of_is_given_up_after_its_lease(tmp_path):
    muster = MusterCommand(tmp_path, hosts=2, processes_per_host=1, lease_seconds=3.0)
    program = "import time; print('ready', flush=True); time.sleep(600)"
    process = muster.start(program=program)
    muster.wait_for_log("ready")
    os.kill(muster.agent_of("local1"), signal.SIGSTOP)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert (muster.attempt()["cause"], muster.attempt()["guilty_host"]) == ("host_lost", "local1")
    assert "host local1 was lost" in err
    muster.check_nothing_is_left()


def test_a_run_that_waits_for_its_next_attempt_can_be_stopped(tmp_path):
    slow = {"max_failures": 5, "backoff_seconds": 300.0, "max_backoff_seconds": 300.0}
    muster = MusterCommand(tmp_path, restart=slow)
    process = muster.start(program="import sys; sys.exit('no')")
    wait_until(lambda: muster.attempts_closed() == 1, "the first attempt to end")
    report = json.loads(muster.other("status", str(muster.workdir), "--json").stdout)
    assert report["live"]["state"] == "waiting"
    stopped = muster.other("stop", str(muster.workdir))
    assert stopped.returncode == 0, stopped.stderr
    _, err = process.communicate(timeout=60)
    assert process.returncode == contract.EXIT_RESUMABLE
    assert "stopped; start the same command again" in err


GRACEFUL = """
    import signal, sys, time
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
    print("ready", flush=True)
    time.sleep(600)
"""


def test_a_detached_run_is_seen_and_stopped_by_its_name(muster):
    done = muster.run("--detach", program=GRACEFUL)
    assert done.returncode == 0, done.stderr
    assert "goes on in the background" in done.stdout
    muster.wait_for_log("ready")
    listed = json.loads(muster.other("list", "--json").stdout)["runs"]
    (mine,) = [run for run in listed if run["path"] == str(muster.workdir)]
    assert mine["state"] == "running"
    assert "process 1 on local0" in muster.other("status", mine["id"]).stdout
    stopped = muster.other("stop", mine["id"])
    assert stopped.returncode == 0, stopped.stderr
    assert "has ended" in stopped.stderr
    assert muster.attempt()["cause"] == "stopped"
    again = muster.other("stop", mine["id"])
    assert (again.returncode, "was not running" in again.stderr) == (0, True)
    assert "stopped" in (muster.workdir / contract.CONTROLLER_LOG).read_text()


def test_a_detached_run_that_ends_at_once_says_why(muster):
    done = subprocess.run(
        [*muster.command("--detach"), "--", "no-such-program"],
        cwd=muster.folder,
        env=environment(),
        text=True,
        capture_output=True,
        check=False,
        timeout=60,
    )
    wait_until(lambda: rundir.owner(muster.workdir) is None, "the controller to end")
    assert muster.attempt()["cause"] == "config"
    told = done.stderr + (muster.workdir / contract.CONTROLLER_LOG).read_text()
    assert "no-such-program: No such file or directory" in told


def test_stopping_twice_kills_at_once(muster):
    program = """
        import signal, time
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        print("ready", flush=True)
        time.sleep(600)
    """
    process = muster.start(program=program)
    muster.wait_for_log("ready")
    first = subprocess.Popen(
        [muster.python, "-m", "launch", "stop", str(muster.workdir)],
        cwd=muster.folder,
        env=environment(),
        stderr=subprocess.PIPE,
        text=True,
    )
    assert first.stderr is not None
    wait_until(lambda: "stopping" in (first.stderr.readline() or "stopping"), "the first to act")
    assert muster.other("stop", str(muster.workdir)).returncode == 0
    assert first.wait(timeout=30) == 0
    process.communicate(timeout=30)
    assert muster.attempt()["cause"] == "stopped"


def test_the_earlier_of_two_failures_is_guilty_whatever_the_clocks_and_the_order_say(tmp_path):
    muster = MusterCommand(tmp_path, hosts=2, processes_per_host=1)
    program = """
        import os, sys, time
        me, run = os.environ["MUSTER_PROCESS_ID"], os.environ["MUSTER_RUN_DIR"]
        open(f"{run}/here-{me}", "w").close()
        while not all(os.path.exists(f"{run}/here-{i}") for i in (0, 1)):
            time.sleep(0.001)
        at = os.path.getmtime(f"{run}/here-0") + 1.0
        # Process 1 first, whose agent is late to say so and whose clock is an hour off.
        while time.time() < at + (0.04 if me == "0" else 0.0):
            time.sleep(0.001)
        os._exit(3)
    """
    words = muster.command(program=program)
    words[words.index("launch")] = "tests.testing.skewed"
    done = subprocess.run(
        words, cwd=muster.folder, env=environment(), text=True, capture_output=True, check=False
    )
    assert done.returncode == 1, done.stderr
    record = muster.attempt()
    assert (record["cause"], record["guilty_process"]) == ("exception", 1)
    ends = [
        rundir.read_record(rundir.exit_path(rundir.attempt_path(muster.workdir, 0), i))
        for i in range(2)
    ]
    assert ends[1]["ended_at"] < ends[0]["started_at"]  # By its own clock it was long before.
    muster.check_nothing_is_left()


def test_a_hundred_megabytes_of_output_neither_slow_the_others_nor_fill_the_disk(tmp_path):
    muster = MusterCommand(tmp_path, max_log_bytes=6 << 20)
    program = """
        import os, sys
        if os.environ["MUSTER_PROCESS_ID"] == "1":
            line = "x" * 99 + chr(10)
            for _ in range(100):
                sys.stdout.write(line * 10_000)
        print("the end")
    """
    done = muster.run("--process=1", program=program)
    assert done.returncode == 0
    assert done.stdout.endswith("the end\n")
    folder = rundir.attempt_path(muster.workdir, 0)
    kept = sum(path.stat().st_size for path in folder.glob("process-00001.log*"))
    assert kept < 12 << 20
    record = rundir.read_record(rundir.exit_path(folder, 1))
    assert record["log_dropped_bytes"] == 100_000_000 + len("the end\n") - kept
    shown = muster.other("logs", str(muster.workdir), "--process=1").stdout
    assert shown.startswith("x" * 99 + "\n")
    assert shown.endswith("the end\n")
    assert "MB left out here]" in shown
