"""Gangs of real processes: set-up, agreement, checkpoints, and what happens when one is missing."""

from __future__ import annotations

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from tests.testing.gang import free_port, gang

# What the scripts below share: a sharded state that any process count can make and check.
PRELUDE = """
import os, time
import logging
logging.basicConfig(level=logging.WARNING)
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from launch.spec import CheckpointSpec
from trainer import distributed
from trainer.exit import run_main
from trainer.checkpoint import Checkpointer

def shardings():
    mesh = Mesh(np.array(jax.devices()), ("fsdp",))
    row, whole = NamedSharding(mesh, P("fsdp")), NamedSharding(mesh, P())
    return {"w": row, "b": NamedSharding(mesh, P(None, "fsdp")), "key": whole, "n": whole}

def make(step, rows=16):
    def create():
        return {
            "w": jnp.arange(rows * 64, dtype=jnp.float32).reshape(rows, 64) + step,
            "b": jnp.full((3, 16), step, jnp.bfloat16),
            "key": jax.random.key(step),
            "n": jnp.int32(step),
        }
    return jax.jit(create, out_shardings=shardings())()

def abstract(rows=16):
    shapes = jax.eval_shape(lambda: make(0, rows))
    return {k: jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=shardings()[k])
            for k, v in shapes.items()}

def same(found, step, rows=16):
    for name, wanted in make(step, rows).items():
        got = found[name]
        assert got.sharding == shardings()[name], (name, got.sharding)
        if name == "key":
            got, wanted = jax.random.key_data(got), jax.random.key_data(wanted)
        for a, b in zip(got.addressable_shards, wanted.addressable_shards):
            np.testing.assert_array_equal(np.asarray(a.data), np.asarray(b.data))

def checkpointer(**more):
    return Checkpointer(os.environ["CHECKPOINTS"], CheckpointSpec(), config={"seed": 1}, **more)
"""

# For the tests that need no checkpoint.
JOIN = """
import time
from trainer import distributed
from trainer.exit import run_main
"""

RUN = """
run_main(main)
"""

SAVE = (
    PRELUDE
    + """
def main():
    distributed.initialize()
    saver = checkpointer()
    assert saver.restore(abstract()) is None
    saver.save(1, make(1), {"next": 10})
    saver.save(2, make(2), {"next": 20})
    saver.close()
"""
    + RUN
)

RESTORE = (
    PRELUDE
    + """
def main():
    distributed.initialize()
    saver = checkpointer()
    restored = saver.restore(abstract())
    print("restored", restored.step, restored.data_position, flush=True)
    same(restored.state, restored.step)
    saver.save(restored.step + 1, make(restored.step + 1), {"next": 0}, final=True)
"""
    + RUN
)


def test_a_checkpoint_moves_from_two_processes_to_one_and_to_four(tmp_path):
    env = {"CHECKPOINTS": str(tmp_path / "checkpoints")}
    with gang(SAVE, 2, tmp_path / "save", devices_per_process=2, env=env) as two:
        two.succeed()
    with gang(RESTORE, 1, tmp_path / "one", env=env) as one:
        one.succeed()
        assert "restored 2 {'next': 20}" in one.log(0)
    with gang(RESTORE, 4, tmp_path / "four", env=env) as four:
        four.succeed()
        assert all("restored 3 " in four.log(process) for process in range(4)), four.logs()


def test_a_gang_killed_in_the_middle_of_a_save_goes_on_from_the_step_before(tmp_path):
    script = (
        PRELUDE
        + """
def main():
    distributed.initialize()
    saver = checkpointer()
    restored = saver.restore(abstract(2**16))
    if restored:
        same(restored.state, 1, 2**16)
        print("restored", restored.step, flush=True)
        saver.save(2, make(2, 2**16), None, final=True)
        return
    saver.save(1, make(1, 2**16), None, final=True)
    saver.save(2, make(2, 2**16), None)
    print("saving", flush=True)
    while True:
        saver.check()
"""
        + RUN
    )
    checkpoints = tmp_path / "checkpoints"
    env = {"CHECKPOINTS": str(checkpoints)}
    with gang(script, 2, tmp_path / "killed", env=env) as killed:
        killed.wait_for("saving", 0)
        killed.kill(signal.SIGKILL)
        assert not (checkpoints / "2").exists(), "the save was over before the kill"
        assert (checkpoints / "2.orbax-checkpoint-tmp").exists()
    with gang(script, 2, tmp_path / "again", env=env) as again:
        again.succeed()
        assert "2.orbax-checkpoint-tmp was never finished" in again.log(0), again.logs()
        assert all("restored 1" in again.log(process) for process in (0, 1)), again.logs()
    assert (checkpoints / "2").exists()


def test_damage_that_one_process_sees_is_heeded_by_all(tmp_path):
    checkpoints = tmp_path / "checkpoints"
    env = {"CHECKPOINTS": str(checkpoints)}
    with gang(SAVE, 2, tmp_path / "save", env=env) as saved:
        saved.succeed()
    victim = max((checkpoints / "2").rglob("ocdbt.process_1/d/*"), key=lambda p: p.stat().st_size)
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 1
    victim.write_bytes(data)
    with gang(RESTORE, 2, tmp_path / "restore", env=env) as restored:
        restored.succeed()
        assert all("restored 1 " in restored.log(process) for process in (0, 1)), restored.logs()
        assert victim.name in restored.log(0)
    assert (checkpoints / "damaged" / "2-0").exists()


@pytest.fixture
def small_disk(tmp_path) -> Iterator[pathlib.Path]:
    """A file system of 8 MiB."""
    where = tmp_path / "disk"
    where.mkdir()
    mount = shutil.which("mount")
    command = [mount or "mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(where)]
    if not mount or subprocess.run(command, capture_output=True, check=False).returncode:
        if os.environ.get("CI") == "true":
            pytest.fail("a tmpfs cannot be mounted here, and CI must not pass this by")
        pytest.skip("mounting a tmpfs is not permitted here")
    yield where
    subprocess.run(["umount", "-l", str(where)], check=True)


def test_a_full_disk_ends_the_gang_with_an_error_and_spares_the_last_good_step(
    tmp_path, small_disk
):
    script = (
        PRELUDE
        + """
rows = 2**13  # 2 MiB; with a filler of 5 MiB one step fits on the disk and two do not
def main():
    distributed.initialize()
    saver = checkpointer(save_timeout_seconds=20)
    restored = saver.restore(abstract(rows))
    if restored:
        same(restored.state, 1, rows)
        print("restored", restored.step, flush=True)
        return
    saver.save(1, make(1, rows), None, final=True)
    if distributed.is_lead():
        with open(os.environ["CHECKPOINTS"] + "/../filler", "wb") as file:
            file.write(bytes(5 * 2**20))
    distributed.barrier("filled")
    saver.save(2, make(2, rows), None)
    while True:
        saver.check()
        time.sleep(0.01)
"""
        + RUN
    )
    env = {"CHECKPOINTS": str(small_disk / "checkpoints")}
    with gang(script, 2, tmp_path / "full", env=env) as full:
        codes = full.wait()
        failed = [process for process, code in codes.items() if code == 1]
        assert failed, f"{codes}\n{full.logs()}"
        assert all(codes.values())
        for process in failed:
            assert "CheckpointError: saving step 2" in full.log(process), full.logs()
            assert "step 1 is untouched" in full.log(process), full.logs()
    with gang(script, 2, tmp_path / "again", env=env) as again:
        again.succeed()
        assert "restored 1" in again.log(0)
    left = sorted(path.name for path in (small_disk / "checkpoints").iterdir() if path.is_dir())
    assert left == ["1"], "what the failed save left was not deleted"


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
