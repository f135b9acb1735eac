"""Gangs of real processes: set-up, agreement, stops, and what happens when one is missing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import pytest

from tests.testing.gang import free_port, gang

JOIN = """
import time
from trainer import distributed
from trainer.exit import run_main
"""

RUN = """
run_main(main)
"""


def test_missing_processes_are_named_by_all_that_are_there(tmp_path):
    script = JOIN + "def main():\n    distributed.initialize(timeout_seconds=3)\n" + RUN
    with gang(script, 4, tmp_path, absent=(1, 3)) as some:
        assert some.wait() == {0: 1, 2: 1}, some.logs()
        for process in (0, 2):
            assert "process(es) 1, 3 of 4 never came within 3 s" in some.log(process), some.logs()


def test_a_missing_lead_is_named(tmp_path):
    script = JOIN + "def main():\n    distributed.initialize(timeout_seconds=2)\n" + RUN
    with gang(script, 2, tmp_path, absent=(0,)) as some:
        assert some.wait() == {1: 1}, some.logs()
        assert "process 0 of 2 never came within 2 s" in some.log(1)


def test_agreement_and_its_time_limits(tmp_path):
    script = (
        JOIN
        + """
def late(call):
    try:
        call()
    except TimeoutError as error:
        print("late:", error, flush=True)
    else:
        print("in time", flush=True)

def main():
    place = distributed.initialize()
    me = place.process_id
    assert distributed.broadcast("who", {"process": me}) == {"process": 0}
    assert distributed.broadcast("who", me + 5) == 5
    assert distributed.gather("all", [me, None]) == [[0, None], [1, None], [2, None]]
    distributed.barrier("here")
    if me == 2:
        time.sleep(2)
    late(lambda: distributed.gather("gather", me, timeout_seconds=1))
    late(lambda: distributed.barrier("barrier"))
    if me == 0:
        time.sleep(2)
    late(lambda: distributed.broadcast("broadcast", me, timeout_seconds=1))
    distributed.barrier("end")
"""
        + RUN
    )
    with gang(script, 3, tmp_path) as all_three:
        all_three.succeed()
        for process in range(3):
            log = all_three.log(process)
            assert "late: 'gather': process(es) 2 of 3 did not come within 1 s" in log, log
        assert "late: 'broadcast': process 0 (the lead) did not answer" in all_three.log(1)
        assert all_three.log(0).count("in time") == 2, "the barrier, and its own broadcast"


def test_a_promise_of_devices_that_is_not_kept_is_a_config_error(tmp_path):
    script = JOIN + "def main():\n    distributed.initialize()\n" + RUN
    env = {"MUSTER_DEVICES_PER_PROCESS": "3"}
    with gang(script, 2, tmp_path, devices_per_process=1, env=env) as wrong:
        assert set(wrong.wait().values()) == {2}, wrong.logs()
        assert (
            "error: cluster.devices_per_process=3: but process 0 has 1, process 1 has 1 cpu "
            "device(s)" in wrong.log(1)
        )


def test_an_exception_on_one_process_ends_it_at_once(tmp_path):
    script = (
        JOIN
        + """
def main():
    distributed.initialize()
    if not distributed.is_lead():
        raise ValueError("the cause")
    time.sleep(600)
"""
        + RUN
    )
    with gang(script, 2, tmp_path) as pair:
        pair.wait_for("ValueError: the cause", 1)
        assert pair.processes[1].wait(20) == 1


@pytest.mark.parametrize("receiver", [0, 1])
def test_sigterm_to_one_process_stops_both_at_one_step(tmp_path, receiver):
    script = (
        JOIN
        + """
import jax
from trainer.agreement import client
from trainer.preemption import StopSignal
def main():
    with StopSignal() as stop:
        jax.config.update("jax_enable_preemption_service", False)
        place = distributed.initialize()
        stop.join(client(), place.process_id, place.num_processes)
        stop.enter_loop()
        step = 0
        while not stop.begin():
            step += 1
            if step == 10:
                print("running", flush=True)
            time.sleep(0.01)
        print("stopped at", step, flush=True)
        return 75
"""
        + RUN
    )
    with gang(script, 2, tmp_path) as pair:
        for process in (0, 1):
            pair.wait_for("running", process)
        pair.processes[receiver].send_signal(signal.SIGTERM)
        assert pair.wait() == {0: 75, 1: 75}, pair.logs()
        stops = {line for p in (0, 1) for line in pair.log(p).splitlines() if "stopped at" in line}
        assert len(stops) == 1, pair.logs()


ALONE = """
import os, signal, time
from trainer import distributed
from trainer.exit import run_main
from trainer.preemption import StopSignal
def main():
    print(distributed.initialize(), flush=True)
    with StopSignal() as stop:
        stop.enter_loop()
        step = 0
        while not stop.begin():
            step += 1
            if step == 3:
                os.kill(os.getpid(), getattr(signal, os.environ["SEND"]))
            assert step < 3000
            time.sleep(0.01)
        return 75
run_main(main)
"""


def alone(script: str, **env: str) -> subprocess.CompletedProcess[str]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("MUSTER_", "SLURM_"))}
    return subprocess.run(
        [sys.executable, "-c", script],
        env={**clean, "JAX_PLATFORMS": "cpu", **env},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_process_alone_stops_at_a_signal_too(name):
    done = alone(ALONE, SEND=name)
    assert done.returncode == 75, done.stderr
    assert "process 0/1 (alone)" in done.stdout


@pytest.mark.parametrize(
    ("env", "code", "message"),
    [
        ({"SLURM_NTASKS": "4"}, 1, "SLURM_NTASKS=4 says that this is one of many"),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, 1, "OMPI_COMM_WORLD_SIZE=2 says"),
        ({"MUSTER_NUM_PROCESSES": "2"}, 2, "error: MUSTER_COORDINATOR_ADDRESS, MUSTER_PROCESS_ID"),
        ({"JAX_COORDINATOR_ADDRESS": "127.0.0.1:1"}, 1, "only half of this process's place"),
    ],
)
def test_one_of_many_never_goes_on_alone(env, code, message):
    done = alone(ALONE, SEND="SIGTERM", **env)
    assert done.returncode == code, done.stderr
    assert message in done.stderr


def test_explicit_arguments_make_a_gang_without_any_environment(tmp_path):
    script = """
import json, os, sys
place = json.loads(os.environ["PLACE"])
from trainer import distributed
from trainer.exit import run_main
def main():
    print(distributed.initialize(**place), distributed.gather("ids", place["process_id"]))
run_main(main)
"""
    address = f"127.0.0.1:{free_port()}"
    clean = {k: v for k, v in os.environ.items() if not k.startswith("MUSTER_")}
    running = [
        subprocess.Popen(
            [sys.executable, "-c", script],
            env={
                **clean,
                "JAX_PLATFORMS": "cpu",
                "PLACE": json.dumps(
                    {"coordinator_address": address, "num_processes": 2, "process_id": process}
                ),
            },
            stdout=subprocess.PIPE,
            text=True,
        )
        for process in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=60)[0] for process in running]
    finally:
        for process in running:
            process.kill()
    assert outputs == [f"process {process}/2 (flags) [0, 1]\n" for process in range(2)]
