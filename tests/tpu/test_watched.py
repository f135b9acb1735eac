"""What is seen of a run on TPUs while it waits and runs; what a preemption does to a save."""

import json
import subprocess
import sys

from launch import rundir
from tests.testing.gangs import wait_until
from tests.testing.tpu_muster import TpuMuster
from tests.tpu.test_run import TRAIN

COUNTS = """
import time
for number in range(40):
    print("line", number, flush=True)
    time.sleep(0.1)
"""


def test_a_run_in_the_background_shows_its_queue_and_its_lines_as_they_come(gang):
    muster = gang()
    muster.cloud.api.hold = True
    started = muster.run("--detach", program=COUNTS)
    assert started.returncode == 0, started.stderr
    assert "goes on in the background" in started.stdout
    name = f"muster-{muster.run_id}-0"

    def state() -> str:
        return muster.other("status", str(muster.workdir)).stdout

    wait_until(lambda: "WAITING_FOR_RESOURCES" in state(), "the queue's state")
    said = " ".join(state().split())
    assert "getting machines" in said
    assert f"queued resource {name} in us-west4-a: WAITING_FOR_RESOURCES for" in said
    assert "getting machines" in muster.other("list").stdout
    stopped = muster.other("stop", str(muster.workdir))
    assert (stopped.returncode, muster.there()) == (0, [])
    assert "run has ended with cause stopped" in stopped.stderr
    assert "stopped" in muster.other("list").stdout
    assert muster.run("--detach", program=COUNTS).returncode == 0
    wait_until(lambda: "WAITING_FOR_RESOURCES" in state(), "the queue's state")
    name = f"muster-{muster.run_id}-1"
    command = [sys.executable, "-m", "launch", "logs", str(muster.workdir), "--follow"]
    logs = subprocess.Popen(
        command, cwd=muster.folder, env=muster.env, text=True, stdout=subprocess.PIPE
    )
    muster.cloud.api.hold = False
    assert logs.stdout is not None
    first = logs.stdout.readline()
    assert first == "line 0\n"
    assert not muster.attempt().get("cause"), "it came while the run went on"
    rest = logs.communicate(timeout=60)[0].splitlines()
    assert rest == [f"line {number}" for number in range(1, 40)]
    wait_until(lambda: not muster.there(), "the machines to be given back")
    log = (muster.workdir / "controller.log").read_text()
    assert f"muster: {name} in us-west4-a is WAITING_FOR_RESOURCES, asked for" in log
    assert f"muster: deleted {name}" in log


def test_a_run_whose_machines_have_lived_long_enough_is_saved_and_gives_them_back(gang):
    muster = gang(tpu={"max_lifetime_seconds": 25.0}, grace_seconds=3.0)
    done = muster.run(program=COUNTS.replace("range(40)", "range(10000)"))
    assert done.returncode == 75, done.stderr
    assert muster.attempt()["cause"] == "time_limit"
    assert "tpu.max_lifetime_seconds=25 of the run's machines is over" in done.stderr
    assert rundir.attempt_numbers(muster.workdir) == [0], "there is no time for another"
    assert muster.there() == []
    assert "time_limit" in muster.other("list").stdout


def test_a_preemption_in_the_middle_of_a_save_costs_no_more_than_that_save(gang):
    muster: TpuMuster = gang()
    process = muster.start(*TRAIN, "--config.num_steps=20", "--config.checkpoint.every_steps=1")
    checkpoints = muster.storage / "gone"

    def saving() -> bool:
        nonlocal checkpoints
        found = list(muster.storage.glob("run-*/checkpoints"))
        if not found:
            return False
        checkpoints = found[0]
        done = [path for path in checkpoints.iterdir() if path.name.isdigit()]
        return len(done) > 1 and any("tmp" in path.name for path in checkpoints.iterdir())

    limit = 120.0
    wait_until(saving, "a save after others", limit)
    saved = max(int(path.name) for path in checkpoints.iterdir() if path.name.isdigit())
    muster.cloud.api.preempt(muster.node_of())
    out, err = process.communicate(timeout=180)
    assert process.returncode == 0, err
    causes = [muster.attempt(number)["cause"] for number in rundir.attempt_numbers(muster.workdir)]
    assert causes == ["preempted", "completed"], err
    assert muster.attempt(1)["first_step"] >= saved
    assert "done at step 20" in out
    losses = [json.loads(line) for line in (checkpoints.parent / "metrics.jsonl").open()]
    assert {line["step"] for line in losses if "loss" in line} == set(range(1, 21))
    assert muster.there() == []
