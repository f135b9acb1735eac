"""A training goes on from the hosts' own storage, also when one of the hosts has been replaced."""

from __future__ import annotations

import contextlib
import re
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from launch import contract
from tests.testing import tiny
from tests.testing.gang import Gang, gang

NUM_STEPS, SHARED, LOCAL = 9, 4, 7
# A process is a host. It dies with its peers as soon as the step is on both hosts' own storage.
SCRIPT = """
import os, signal, sys, time
host = "host" + os.environ["MUSTER_PROCESS_ID"]
os.environ["MUSTER_HOST"] = host
sys.argv = ["trainer", *os.environ["FLAGS"].split()]
from trainer import distributed, main
from trainer.checkpoint import Checkpointer
from trainer.local_checkpoints import LocalCheckpoints

class Mortal(LocalCheckpoints):
    def save(self, step, *args, **kwargs):
        saved = super().save(step, *args, **kwargs)
        if str(step) == os.environ.get("DIE_AT"):
            while not os.path.isdir(os.environ["AFTER"]):  # Saved beside the steps.
                time.sleep(0.05)
            distributed.barrier("saved by all")
            os.kill(os.getpid(), signal.SIGKILL)
        return saved

class Slow(Checkpointer):
    def due(self, step, **more):  # Once is enough to know how slow it is.
        slow = "SAVES_TAKE" in os.environ and self._newest is not None
        return not slow and super().due(step, **more)

    def _committed(self):
        super()._committed()
        self.last_save_seconds = float(os.environ.get("SAVES_TAKE", self.last_save_seconds))

import trainer.train
trainer.train.LocalCheckpoints, trainer.train.Checkpointer = Mortal, Slow
main.main()
"""


class Run:
    """A run of two hosts with one process each, in a directory of its own."""

    def __init__(self, folder: Path, fsdp: int):
        self.workdir = folder / "run"
        self.folder = folder
        self._starts = 0
        self._flags = (
            f"--config={tiny.ROOT}/tests/testing/configs/tiny.py:witness --workdir={self.workdir} "
            f"--config.num_steps={NUM_STEPS} --config.mesh.fsdp={fsdp} "
            f"--config.checkpoint.every_steps={SHARED} "
        )

    def host(self, number: int) -> Path:
        return self.folder / "local" / f"host{number}"

    @contextlib.contextmanager
    def start(self, processes: int = 2, more: str = "", **env: str) -> Iterator[Gang]:
        local = (
            f"--config.checkpoint.local_dir={self.folder}/local/{{host}} "
            f"--config.checkpoint.local_every_steps={LOCAL} {more}"
        )
        env = {"FLAGS": self._flags + local, "MUSTER_CACHE_DIR": str(self.folder), **env}
        self._starts += 1
        logs = self.folder / f"start{self._starts}"
        with gang(SCRIPT, processes, logs, env=env) as started:
            yield started

    def die_after_the_local_save(self) -> None:
        shared = self.workdir / "checkpoints" / str(SHARED)
        with self.start(DIE_AT=str(LOCAL), AFTER=str(shared)) as killed:
            codes = killed.wait()  # Whoever sees the other die before may end by JAX's hand.
            assert set(codes.values()) <= {-signal.SIGKILL, -signal.SIGABRT}, killed.logs()
            assert -signal.SIGKILL in codes.values()
        assert shared.is_dir()
        for number in range(2):
            assert len(list(self.host(number).glob(f"*/{LOCAL}-{number}-*/data"))) == 1

    def finish(self, processes: int = 2) -> Gang:
        with self.start(processes) as last:
            last.succeed()
        return last

    def state(self) -> dict[str, np.ndarray]:
        return tiny.read_state(self.workdir, NUM_STEPS)


def same(found: dict[str, np.ndarray], wanted: dict[str, np.ndarray]) -> None:
    assert found.keys() == wanted.keys()
    for name, array in wanted.items():
        assert array.tobytes() == found[name].tobytes(), name


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> dict[str, np.ndarray]:
    run = Run(tmp_path_factory.mktemp("whole"), fsdp=1)
    run.finish()
    return run.state()


@pytest.fixture(scope="module")
def once_killed(tmp_path_factory) -> Run:
    run = Run(tmp_path_factory.mktemp("killed"), fsdp=1)
    run.die_after_the_local_save()
    shutil.copytree(run.folder, run.folder.with_suffix(".copy"))
    return run


@pytest.fixture
def killed(once_killed) -> Run:
    """A run as it was left: both hosts hold all of step LOCAL, and step SHARED is shared."""
    shutil.rmtree(once_killed.folder)
    shutil.copytree(once_killed.folder.with_suffix(".copy"), once_killed.folder)
    return once_killed


def test_a_replaced_host_gets_the_state_from_its_peer(killed, uninterrupted):
    shutil.rmtree(killed.host(1))
    last = killed.finish()
    assert f"resumed from step {LOCAL}, from the hosts' own storage" in last.log(0), last.logs()
    assert "1 process(es) got" in last.log(0)
    same(killed.state(), uninterrupted)
    # A shared checkpoint of the last step is there now.
    assert not any(list(killed.host(number).iterdir()) for number in range(2))


def test_a_run_that_has_lost_a_host_goes_on_with_what_the_other_has(killed):
    last = killed.finish(processes=1)
    assert f"resumed from step {LOCAL}, from the hosts' own storage\n" in last.log(0), last.logs()
    assert int(killed.state()["model.seen"]) == tiny.fingerprint(NUM_STEPS)


def test_a_stop_goes_there_without_time_for_more_and_what_is_then_on_no_host_is_named(tmp_path):
    run = Run(tmp_path, fsdp=2)
    deadline = tmp_path / "deadline.json"
    env = {"SAVES_TAKE": "100", contract.DEADLINE_FILE: str(deadline)}
    with run.start(more="--config.num_steps=100000", **env) as told:
        told.wait_for("step 9/")
        contract.record_deadline(str(deadline), 110.0)
        told.processes[1].send_signal(signal.SIGTERM)
        assert told.wait() == {0: contract.EXIT_RESUMABLE, 1: contract.EXIT_RESUMABLE}, told.logs()
    assert "s left, and the last save took 100.0 s: no other is begun" in told.log(0)
    found = re.search(r"told to stop: step (\d+) is saved on the hosts' own", told.log(0))
    assert found, told.logs()
    step = int(found[1])
    for number in range(2):
        assert any(run.host(number).glob(f"*/{step}-{number}-*"))

    shutil.rmtree(run.host(1))
    with run.start(more=f"--config.num_steps={step + 1}") as last:
        last.succeed()
    lines = [line for line in last.log(0).splitlines() if "is not used" in line]
    assert lines[0].startswith(f"local checkpoint of step {step} is not used: [")
    assert all(line.endswith("is on no host: process(es) 1 wrote it on host1") for line in lines)
    assert f"resumed from step {SHARED} (" in last.log(0)
    seen = tiny.read_state(run.workdir, step + 1)["model.seen"]
    assert int(seen) == tiny.fingerprint(step + 1)


# Two processes, a host each, with two devices each; what befalls their files, one after the other.
MISHAPS = """
import os, shutil, signal
os.environ["MUSTER_HOST"] = host = "host" + os.environ["MUSTER_PROCESS_ID"]
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from launch.spec import CheckpointSpec
from trainer import distributed, local_directory, local_resume, local_transfer
from trainer.exit import run_main
from trainer.local_checkpoints import LocalCheckpoints

FOLDER = os.environ["FOLDER"]
SPEC = CheckpointSpec(local_dir=FOLDER + "/local/{host}")

def shardings(data, fsdp):
    mesh = Mesh(np.array(jax.devices()).reshape(data, fsdp), ("data", "fsdp"))
    specs = {"w": P("fsdp"), "b": P(None, "fsdp"), "keys": P("data"), "key": P(), "n": P()}
    return {name: NamedSharding(mesh, spec) for name, spec in specs.items()}

def make(step, where):
    def create():
        words = jax.random.bits(jax.random.key(step + 1), (8, 64), jnp.uint32)
        words = words.at[:, :3].set(jnp.uint32([0x80000000, 0x7FA00001, 1]))
        return {  # Minus zero, a signalling NaN and a denormal are not to be touched.
            "w": jax.lax.bitcast_convert_type(words, jnp.float32),
            "b": jnp.full((3, 16), jnp.nan, jnp.bfloat16).at[0].set(step),
            "keys": jax.random.split(jax.random.key(step), 4),
            "key": jax.random.key(step),
            "n": jnp.array(step % 2 == 0),
        }
    return jax.jit(create, out_shardings=where)()

def abstract(where):
    shapes = jax.eval_shape(lambda: make(0, where))
    return {k: jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=where[k]) for k, v in shapes.items()}

def same(found, step, where):
    for name, wanted in make(step, where).items():
        got = found[name]
        assert got.sharding == where[name], (name, got.sharding)
        if name.startswith("key"):
            got, wanted = jax.random.key_data(got), jax.random.key_data(wanted)
        for a, b in zip(got.addressable_shards, wanted.addressable_shards, strict=True):
            assert np.asarray(a.data).tobytes() == np.asarray(b.data).tobytes(), name

def start():
    return LocalCheckpoints(SPEC, FOLDER, {"config": {}})

def damage(local, step):
    path, = local.files.path.glob(f"{step}-*/data")
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 4
    path.write_bytes(data)

def main():
    distributed.initialize()
    me = jax.process_index()
    local_transfer.BLOCK_BYTES = 512
    replicas, shards = shardings(2, 2), shardings(1, 4)

    local = start()
    assert local.save(10, make(10, replicas), {"next": 10})
    local.close(None)

    # A file that has changed on one host is not used: the other has the same.
    local = start()
    if me == 0:
        damage(local, 10)
    distributed.barrier("damaged")
    found = local_resume.restore(local, abstract(replicas), None)
    assert (found.step, found.data_position) == (10, {"next": 10})
    same(found.state, 10, replicas)
    # On another mesh, too.
    same(local_resume.restore(local, abstract(shards), 9).state, 10, shards)
    assert local_resume.restore(local, abstract(replicas), 10) is None

    # A disk that is full on one host: no host keeps the step, and the one before is there still.
    whole = local_directory._write_piece
    def full(*unused):
        raise OSError(28, "No space left on device")
    if me == 1:
        local_directory._write_piece = full
    assert not local.save(20, make(20, replicas), None)
    local_directory._write_piece = whole
    distributed.barrier("full")
    assert [entry.step for entry in local.files.entries()] == [10]
    assert local.save(30, make(30, shards), None)
    assert local.save(40, make(40, shards), None)
    assert [entry.step for entry in local.files.entries()] == [40, 30]
    local.committed(30)
    assert [entry.step for entry in local.files.entries()] == [40]
    local.close(None)

    # Halves that no other host has: the step before is used.
    local = start()
    same(local_resume.restore(local, abstract(shards), None).state, 40, shards)
    assert local.save(50, make(50, shards), None)
    if me == 1:
        damage(local, 50)
    distributed.barrier("damaged again")
    same(local_resume.restore(local, abstract(shards), None).state, 40, shards)

    # Whoever does not come is named, and what the other wrote stays.
    if me == 1:
        distributed.broadcast("never", None, 60)
    try:
        local.save(60, make(60, replicas), None, timeout_seconds=2)
    except TimeoutError as error:
        print("late:", error, flush=True)
    os._exit(0)

run_main(main)
"""


def test_damage_full_disks_and_absent_processes(tmp_path):
    with gang(MISHAPS, 2, tmp_path, devices_per_process=2, env={"FOLDER": str(tmp_path)}) as two:
        codes = two.wait()
        assert codes[0] == 0, two.logs()
        log = two.log(0)
        assert "local checkpoint of step 10: not all can be read: " in log, two.logs()
        assert "have changed since they were written" in log
        assert (
            "step 20 is not saved on the hosts' own storage: process 1 on host1: No space left on "
            "device" in log
        )
        assert "local checkpoint of step 50 is not used: [" in log
        assert (
            "late: 'local/saved': process(es) 1 of 2 did not come within 2 s; see their logs" in log
        )
