"""The trainer itself on SLURM: real `jax.distributed`, real Orbax."""

from __future__ import annotations

import fcntl
import os
import sys

import pytest

from launch import contract
from tests.testing.gangs import MusterCommand
from tests.testing.slurm import SlurmMuster
from tests.testing.tiny import ROOT

TINY = f"--config={ROOT}/tests/testing/configs/tiny.py"


@pytest.fixture(scope="module")
def losses(tmp_path_factory) -> dict[int, float]:
    """Of the byte model on two local hosts of two processes, trained once for all of pytest's
    workers."""
    base = tmp_path_factory.getbasetemp()
    folder = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    local = MusterCommand(folder, hosts=2, devices_per_process=2)
    local.workdir = folder / "local-losses"
    with open(folder / "local-losses.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not local.workdir.exists():
            done = local.run(TINY, "--config.num_steps=8")
            assert done.returncode == contract.EXIT_DONE, done.stderr
    return local.metrics("loss")


def test_the_byte_model_trains_to_the_same_losses_as_on_this_machine(slurm, tmp_path, losses):
    muster = SlurmMuster(tmp_path, devices_per_process=2)
    done = muster.run(TINY, "--config.num_steps=8")
    assert done.returncode == contract.EXIT_DONE, done.stderr
    assert muster.metrics("loss") == losses
    assert list(losses) == list(range(1, 9))


def test_a_training_that_is_put_back_resumes_from_its_checkpoint(slurm, tmp_path, losses):
    muster = SlurmMuster(tmp_path, devices_per_process=2)
    started = muster.start(TINY, "--config.num_steps=100000")
    muster.wait_for_step(10)
    slurm.command("scontrol", "requeue", muster.job_id())
    muster.wait_for_step(12, number=1)
    slurm.command("scancel", muster.job_id())
    _, err = started.communicate(timeout=120)
    assert muster.causes() == ["preempted", "stopped"], err
    first, second = muster.attempt(0), muster.attempt(1)
    assert second["first_step"] == first["last_step"]
    assert (muster.workdir / contract.CHECKPOINTS / str(first["last_step"])).is_dir()
    assert {step: muster.metrics("loss")[step] for step in losses} == losses


def test_who_edits_the_config_meanwhile_does_not_change_a_queued_job(slurm, tmp_path, losses):
    muster = SlurmMuster(tmp_path, devices_per_process=2)
    config = tmp_path / "mine.py"
    config.write_text("from tests.testing.configs.tiny import get_config\n")
    options = ["-N4", "--exclusive", "-t10", "--output=/dev/null"]
    other = slurm.command("sbatch", "--parsable", *options, "--wrap=sleep 600").strip()
    started = muster.start(f"--config={config}", "--config.num_steps=8")
    job_id = muster.job_id()
    assert slurm.job(job_id)["JobState"] == "PENDING"
    config.write_text("raise SystemExit('edited')")
    slurm.command("scancel", other)
    _, err = started.communicate(timeout=120)
    assert started.returncode == contract.EXIT_DONE, err
    assert muster.metrics("loss") == losses


def test_a_process_that_hangs_is_named_with_its_node(slurm, tmp_path):
    limits = {"step_min_seconds": 3.0, "compile_seconds": 60.0, "data_seconds": 3.0}
    muster = SlurmMuster(tmp_path, restart={"max_failures": 0}, watch=limits)
    done = muster.run(
        program="""
            from tests.testing import faults
            faults.main("sleep")
        """
    )
    assert done.returncode == contract.EXIT_FAILED, done.stderr
    record = muster.attempt()
    assert (record["cause"], record["guilty_process"]) == ("hang", 2), done.stderr
    assert record["guilty_host"] == "node2"
    assert "sleep" in done.stderr or "befall" in done.stderr


def test_a_node_with_fewer_devices_than_promised_is_named(slurm, tmp_path):
    muster = SlurmMuster(
        tmp_path,
        processes_per_host=1,
        devices_per_process=2,
        slurm={"gpus_per_node": 2},
        env={"JAX_PLATFORMS": "cpu"},
    )
    train = f"{sys.executable} -m trainer.main {TINY} --workdir={muster.workdir}"
    lost = f'test "$SLURMD_NODENAME" != node2 || export JAX_NUM_CPU_DEVICES=1; exec {train}'
    done = muster.run_words([*muster.command(), "--", "sh", "-c", lost], cwd=ROOT)
    assert done.returncode == contract.EXIT_CONFIG, done.stderr
    record = muster.attempt()
    assert (record["cause"], record["guilty_host"]) == ("config", "node2")
    assert "cluster.devices_per_process=2: but process 1 has 1 cpu device" in done.stderr
    assert slurm.job(muster.job_id())["Restarts"] == "0"


def test_nodes_on_which_jax_finds_no_gpu_end_the_job_and_do_not_train_on_cpus(slurm, tmp_path):
    muster = SlurmMuster(tmp_path, hosts=1, slurm={"gpus_per_node": 2})
    done = muster.run(TINY)
    assert done.returncode == contract.EXIT_CONFIG, done.stderr
    assert "JAX_PLATFORMS='cuda': JAX finds no such devices on node1" in done.stderr
    record = muster.attempt()
    assert (record["cause"], record["guilty_host"]) == ("config", "node1")
