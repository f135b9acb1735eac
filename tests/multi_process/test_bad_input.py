"""What a user can get wrong: each is one clear line and exit code 2, and nothing is left behind."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.testing import tiny
from tests.testing.gangs import MusterCommand, environment

CONFIG = f"--config={tiny.ROOT}/tests/testing/configs/tiny.py:lm"

# Refused before any process is started.
BEFORE = [
    (["--config.modle.dim=3"], "config.modle.dim: no such field; did you mean 'model'?"),
    (["--config.num_steps=1e3"], "config.num_steps='1e3': must be an int; write 1000"),
    (["--config.num_steps=soon"], "config.num_steps='soon': must be an int"),
    (["--config.num_steps=0"], "config.num_steps=0: must be at least 1"),
    (["--config.mesh.fsdp=3"], "fsdp=3 = 3 does not divide the 2 devices"),
    (["--config.mesh.data=4"], "data=4 = 4 devices, but the cluster has 2"),
    (["--config.global_batch_size=7"], "config.global_batch_size=7: must be a multiple of 2"),
    (["--config.task=nothing"], "config.task='nothing': must be written package.module:Class"),
    (["--config.checkpoint.keep_last=0"], "config.checkpoint.keep_last=0: must be at least 1"),
    (["--cluster.backnd=x"], "cluster.backnd: no such field; did you mean 'backend'?"),
    (["--wrkdir=x"], "did you mean"),
]

# Found by the trainer before the processes wait for each other.
INSIDE = [
    (["--config.task=trainer.tasks.language_model:LanguageModle"], "did you mean 'LanguageModel'?"),
    (["--config.task=no.such.module:Task"], "no module 'no'"),
    (["--config.data.path=/no/such/path"], "config.data.path='/no/such/path'"),
    (["--config.data.kind=bites"], "config.data.kind='bites': did you mean 'bytes'?"),
    (["--config.model.num_heads=5"], "config.model.num_kv_heads=2: must divide num_heads=5"),
    (["--config.optimizer.chain=('adamwx',)"], "Optax has no 'adamwx'; did you mean 'adamw'?"),
    (
        ["--config.optimizer.adamw.weigth_decay=0.1"],
        "config.optimizer.adamw.weigth_decay: no such argument; did you mean 'weight_decay'? adamw",
    ),
    (
        [
            "--config.optimizer.adamw.learning_rate={'warmup_cosine_decay_schedule': "
            "{'init_value': 0.0, 'peak_value': 0.1, 'warmup_steps': 5, 'decay_steps': 5}}"
        ],
        "decay_steps=5: must be more than warmup_steps=5: it counts the warm-up too; use 10?",
    ),
]

# What only the model shows, after the processes have found each other.
GROUPS = {
    "param_labels": (("kernel", "kernels"), (".*", "rest")),
    "transforms": {
        name: {"chain": ("sgd",), "sgd": {"learning_rate": 0.1}} for name in ("kernels", "rest")
    },
}


@pytest.fixture
def muster(tmp_path: Path):
    command = MusterCommand(tmp_path)
    yield command
    command.check_nothing_is_left()


def refused(muster: MusterCommand, *flags: str) -> str:
    """The one line that a refused `muster run` prints."""
    done = muster.run(CONFIG, *flags)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    lines = [line for line in (done.stdout + done.stderr).splitlines() if "error:" in line]
    assert len(lines) == 1, done.stdout + done.stderr
    return lines[0]


@pytest.mark.parametrize(("flags", "message"), BEFORE)
def test_refused_before_anything_starts(flags, message, muster):
    assert message in refused(muster, *flags)
    assert not muster.workdir.exists()


@pytest.mark.parametrize(("flags", "message"), INSIDE)
def test_refused_by_the_trainer_before_it_waits(flags, message, muster):
    muster = MusterCommand(muster.folder, processes_per_host=1)
    assert message in refused(muster, *flags)
    assert not (muster.workdir / "checkpoints").exists()


def test_one_line_also_from_a_gang_of_two(muster, tmp_path):
    (tmp_path / "empty").mkdir()
    line = refused(muster, f"--config.data.path={tmp_path}/empty")
    assert "config.data.pattern='*': matches no file" in line


def test_one_line_also_for_a_group_that_takes_no_parameter(muster):
    section = {"chain": ("partition",), "partition": GROUPS}
    line = refused(muster, f"--config.optimizer={section!r}")
    assert "config.optimizer.partition.param_labels (group 'kernels'): 'kernel' matches no" in line


def describe(*arguments, folder, **variables):
    return subprocess.run(
        [sys.executable, "-m", "trainer.describe", *arguments],
        cwd=folder,
        env={**environment(), **variables},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--config is missing; give --config=FILE; there are "),
        (["--config=configs/lm_byte.py"], "config='configs/lm_byte.py': no such file; did you me"),
        ([CONFIG, "--num_device=8"], "unknown flag --num_device; did you mean 'num_devices'?"),
    ],
)
def test_describe_refuses_in_one_line(arguments, message, tmp_path):
    done = describe(*arguments, folder=tmp_path)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith(f"error: {message}")
    assert done.stderr.count("\n") == 1


def test_describe_needs_no_accelerator_even_where_jax_is_told_to_use_one(tmp_path):
    config = f"--config={tiny.ROOT}/configs/regression.py"  # It has schedules to evaluate.
    done = describe(config, "--num_devices=256", folder=tmp_path, JAX_PLATFORMS="tpu")
    assert done.returncode == 0, done.stderr
    assert "state on mesh data=256 fsdp=1 tensor=1" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--workdir=/tmp/x"], "--config is missing"),
        ([CONFIG], "--workdir is missing"),
        ([CONFIG, "--workdir=/tmp/x", "--wrokdir=/tmp/y"], "did you mean 'workdir'?"),
        ([CONFIG, "--workdir=/tmp/x", "extra"], "unexpected argument 'extra'"),
        ([CONFIG, "--workdir=/tmp/x", "--num_processes=2"], "coordinator_address"),
    ],
)
def test_the_absl_app_by_itself_refuses_in_one_line(arguments, message, tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "trainer.main", *arguments],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 2, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_a_cluster_file_is_needed_and_the_shipped_ones_are_named(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "launch", "run", CONFIG, f"--workdir={tmp_path}/run"],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 2
    assert "--cluster is missing" in done.stderr
    assert "configs/cluster/local.py" in done.stderr
