"""The trainer under `muster run`: the same training on every topology, and across every end."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from launch import contract
from tests.testing import tiny
from tests.testing.gangs import MusterCommand, command_line

# Sums are taken in another order on another mesh; over 6 steps of Adam that grows. Seen: 2e-5.
RELATIVE_TOLERANCE = 1e-3


class Training(MusterCommand):
    """`muster run` of one of the tiny trainings."""

    def __init__(self, folder: Path, task: str, processes: int = 2, devices: int = 1):
        folder.mkdir(parents=True, exist_ok=True)
        super().__init__(folder, processes_per_host=processes, devices_per_process=devices)
        self.config = f"--config={tiny.ROOT}/tests/testing/configs/tiny.py:{task}"

    def train(self, *flags: str, expect: int = 0) -> str:
        """Run to the end; what it printed."""
        done = self.run(self.config, *flags)
        text = f"{done.stdout}\n{done.stderr}"
        assert done.returncode == expect, text
        assert not self.left()
        return text

    def ledger(self) -> dict[str, str]:
        """Leaf -> PartitionSpec."""
        record = json.loads((self.workdir / contract.LEDGER_RECORD).read_text())
        return {leaf["name"]: leaf["spec"] for leaf in record["leaves"]}


@pytest.fixture
def train_in(tmp_path: Path) -> Iterator[Callable[..., Training]]:
    """Makes a Training in this test's own directory; nothing of it outlives the test."""
    made: list[Training] = []

    def make(*args: Any, **kwargs: Any) -> Training:
        made.append(Training(tmp_path, *args, **kwargs))
        return made[-1]

    yield make
    for training in made:
        training.check_nothing_is_left()


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> dict[int, float]:
    """Losses of the language model on one process with one device."""
    training = Training(tmp_path_factory.mktemp("alone"), "lm", processes=1)
    training.train()
    losses = training.metrics()
    assert list(losses) == [1, 2, 3, 4, 5, 6]
    assert losses[6] < losses[1] - 0.3  # It learns, so equal losses say something.
    return losses


@pytest.mark.parametrize(
    ("processes", "devices", "mesh"),
    [
        (1, 8, {"data": 8}),
        (2, 4, {"data": 8}),  # Gradients in one flat all-reduce.
        (2, 4, {"fsdp": 8, "data": 1}),
        (4, 2, {"data": 2, "fsdp": 2, "tensor": 2}),
    ],
)
def test_the_loss_does_not_depend_on_processes_devices_or_mesh(
    processes, devices, mesh, alone, train_in
):
    training = train_in("lm", processes, devices)
    training.train(*(f"--config.mesh.{axis}={size}" for axis, size in mesh.items()))
    losses = training.metrics()
    assert list(losses) == list(alone)
    np.testing.assert_allclose(list(losses.values()), list(alone.values()), rtol=RELATIVE_TOLERANCE)
    specs = training.ledger()
    params = [name.removeprefix("model.") for name in specs if name.startswith("model.")]
    for param in params:
        for moment in ("mu", "nu"):
            (found,) = [n for n in specs if n.endswith(f".{moment}.{param}")]
            assert specs[found] == specs[f"model.{param}"]
    if mesh.get("fsdp", 1) > 1:
        assert any("fsdp" in spec for name, spec in specs.items() if ".mu." in name)
    if mesh.get("tensor", 1) > 1:
        assert any("tensor" in spec for name, spec in specs.items() if ".mu." in name)


@pytest.fixture(scope="module")
def straight(tmp_path_factory) -> Training:
    """20 steps without interruption, on 2 processes."""
    training = Training(tmp_path_factory.mktemp("straight"), "witness")
    training.train("--config.num_steps=20")
    return training


@pytest.fixture(scope="module")
def once_killed(tmp_path_factory) -> Path:
    """A directory with a run of two processes, all killed after the checkpoint of step 10."""
    training = Training(tmp_path_factory.mktemp("killed"), "witness")
    kill_at_10(training)
    return training.folder


@pytest.fixture
def killed(once_killed: Path, tmp_path: Path) -> None:
    """That run in this test's own directory."""
    shutil.copytree(once_killed, tmp_path, dirs_exist_ok=True)


def kill_at_10(training: Training) -> None:
    """Start it, and kill every process after its checkpoint of step 10."""
    flags = ["--config.num_steps=1000000", "--config.checkpoint.every_steps=10"]
    flags.append("--config.checkpoint.keep_last=1000000")
    process = training.start(training.config, *flags)
    step_10 = training.workdir / contract.CHECKPOINTS / "10"
    deadline = time.monotonic() + 100
    while not step_10.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill()
    process.communicate()
    while training.left() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not training.left()
    # Later steps may have been saved by then: this run ends at the one of step 10.
    for path in step_10.parent.iterdir():
        if path.name.isdigit() and int(path.name) > 10:
            path.rename(training.folder / path.name)


def assert_same_state(one: dict, two: dict) -> None:
    assert one.keys() == two.keys()
    different = [name for name in one if not np.array_equal(one[name], two[name])]
    assert not different


@pytest.mark.usefixtures("killed")
def test_killed_and_resumed_is_bit_for_bit_the_run_that_was_not(straight, train_in):
    training = train_in("witness")
    text = training.train("--config.num_steps=20")
    assert "resumed from step 10" in text
    one, two = tiny.read_state(straight.workdir, 20), tiny.read_state(training.workdir, 20)
    assert_same_state(one, two)
    assert int(two["model.seen"]) == tiny.fingerprint(20)  # Every row, once, in order.
    assert any(".rngs." in name for name in two)
    assert training.metrics() == pytest.approx(straight.metrics(), rel=0, abs=0)


@pytest.mark.usefixtures("killed")
@pytest.mark.parametrize("processes", [1, 4])
def test_saved_on_2_processes_goes_on_with_the_same_rows_on(processes, straight, train_in):
    training = train_in("witness", processes)
    training.train("--config.num_steps=20")
    one, two = tiny.read_state(straight.workdir, 20), tiny.read_state(training.workdir, 20)
    assert int(two["model.seen"]) == tiny.fingerprint(20)
    for name, value in one.items():
        np.testing.assert_allclose(two[name], value, rtol=1e-3, atol=1e-5)
    after = {step: loss for step, loss in straight.metrics().items() if step > 10}
    resumed = {step: loss for step, loss in training.metrics().items() if step > 10}
    assert resumed == pytest.approx(after, rel=RELATIVE_TOLERANCE)


def test_a_flipped_byte_in_the_newest_checkpoint_falls_back_to_the_one_before(train_in):
    training = train_in("witness")
    training.train("--config.num_steps=20", "--config.checkpoint.every_steps=10")
    newest = training.workdir / contract.CHECKPOINTS / "20" / "state"
    victim = max((p for p in newest.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 1
    victim.write_bytes(data)
    text = training.train("--config.num_steps=20")
    assert "resumed from step 10" in text
    assert str(victim.name) in text  # What is damaged, by name.
    assert int(tiny.read_state(training.workdir, 20)["model.seen"]) == tiny.fingerprint(20)


def test_sigterm_on_one_process_is_an_agreed_stop_with_a_checkpoint_and_75(train_in):
    training = train_in("witness")
    process = training.start(training.config, "--config.num_steps=1000000")
    training.wait_for_log("step 5/", processes=1)
    pids = [pid for pid in training.left() if b"trainer.main" in command_line(pid)]
    assert len(pids) == 2
    os.kill(pids[1], signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == contract.EXIT_RESUMABLE, out + err
    (step,) = [
        int(p.name) for p in (training.workdir / "checkpoints").iterdir() if p.name.isdigit()
    ]
    assert f"told to stop: step {step} is saved" in out
    assert int(tiny.read_state(training.workdir, step)["model.seen"]) == tiny.fingerprint(step)


def test_a_loss_that_is_not_finite_names_the_step_and_saves_nothing_after_it(train_in):
    training = train_in("witness")
    text = training.train(
        "--config.optimizer.adamw.learning_rate=1e38",
        "--config.log_every_steps=3",
        "--config.checkpoint.every_steps=2",
        expect=contract.EXIT_FAILED,
    )
    assert "TrainingDiverged" in text
    assert "at step" in text
    assert "steps 1 to" in text


def test_a_longer_num_steps_trains_on_and_another_model_is_refused(train_in):
    training = train_in("lm", processes=1)
    training.train("--config.num_steps=2")
    assert "already at step 2" in training.train("--config.num_steps=2")
    assert "resumed from step 2" in training.train("--config.num_steps=4", "--config.mesh.fsdp=1")
    assert list(training.metrics()) == [1, 2, 3, 4]
    text = training.train("--config.num_steps=4", "--config.model.dim=64", expect=2)
    assert "config.model.dim: 32 there, 64 now" in text
    record = json.loads((training.workdir / contract.CONFIG_RECORD).read_text())
    assert record["schema"] == contract.SCHEMA
