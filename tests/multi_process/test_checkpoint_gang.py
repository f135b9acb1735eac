"""Checkpoints of gangs: on another number of processes, killed, damaged, and on a full disk."""

from __future__ import annotations

import os
import pathlib
import shutil
import signal
import subprocess
from collections.abc import Iterator

import pytest

from tests.testing.gang import gang

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
