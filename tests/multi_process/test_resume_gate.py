"""A run changed between two starts, as a user sees it: refused, allowed by name, or restored in
part; another run started from its params; and its checkpoints at rest."""

from __future__ import annotations

import json
import random
import secrets
from pathlib import Path

import numpy as np
import pytest

from launch import contract
from tests.testing import tiny
from tests.testing.gangs import MusterCommand

TASK = """
from tests.testing import tiny

class Mine(tiny.Witness):
    # {comment}
    def loss(self, model, batch):
        return super().loss(model, batch) * {factor}
"""


class Training(MusterCommand):
    """A witness whose task is a file of the user's, in the current directory."""

    config = f"--config={tiny.ROOT}/tests/testing/configs/tiny.py:witness"

    def edit(self, factor: float, comment: str = "") -> None:
        (self.folder / "mine.py").write_text(TASK.format(factor=factor, comment=comment))

    def train(self, *flags: str, expect: int = 0) -> str:
        done = self.run(self.config, "--config.task=mine:Mine", *flags)
        text = f"{done.stdout}\n{done.stderr}"
        assert done.returncode == expect, text
        return text

    def checkpoints(self, *words: str, expect: int = 0) -> str:
        done = self.other("checkpoints", str(self.workdir), *words)
        assert done.returncode == expect, done.stdout + done.stderr
        return done.stdout + done.stderr


@pytest.mark.timeout(600)  # Five gangs, one after the other, on a machine that may be busy.
def test_the_story_of_a_run_that_is_changed_started_from_copied_and_damaged(tmp_path):
    training = Training(tmp_path)
    # A name that no other run of this user has.
    training.workdir = tmp_path / f"first-{secrets.token_hex(4)}"
    training.edit(1.0)
    training.train("--config.num_steps=4", "--config.checkpoint.every_steps=2")
    changes_are_refused_allowed_by_name_and_applied_once(training)
    another_run_starts_from_its_params_by_name(training, tmp_path / "fine")
    its_checkpoints_are_looked_after(training, tmp_path / "copies")
    training.check_nothing_is_left()


def changes_are_refused_allowed_by_name_and_applied_once(training: Training) -> None:
    before = tiny.read_state(training.workdir, 4)
    # The launcher sees a config that differs, and starts nothing.
    text = training.train("--config.num_steps=5", "--config.seed=9", expect=2)
    assert "config.seed: 3 there, 9 now" in text
    assert not (training.workdir / contract.ATTEMPTS / "001").exists()
    # The code is for the trainer to judge: all processes refuse it alike, and nobody is accused.
    training.edit(2.0)
    flags = ["--config.restore.fresh_optimizer=true", "--config.log_every_steps=3"]
    text = training.train("--config.num_steps=5", *flags, expect=2)
    assert "code.mine.py: changed" in text
    assert "give --config.restore.allow_change=code, or" in text
    assert not (training.workdir / contract.CHANGES).exists()
    flags.append("--config.restore.allow_change=code")
    text = training.train("--config.num_steps=5", *flags)
    assert "resumed from step 4" in text
    assert "changed after step 4, as allowed: code.mine.py" in text
    assert "changed since, harmless: config.checkpoint.every_steps 2 -> 0, config.log" in text
    after = tiny.read_state(training.workdir, 5)
    assert (int(before["optimizer.step"]), int(after["optimizer.step"])) == (4, 1)
    assert int(after["model.seen"]) == tiny.fingerprint(5)
    # As an automatic restart would: the same command again. A comment is no change of the code.
    training.edit(2.0, comment="better")
    text = training.train("--config.num_steps=6", *flags)
    assert "config.restore was applied before step 5 was saved" in text
    assert int(tiny.read_state(training.workdir, 6)["optimizer.step"]) == 2
    (record,) = map(json.loads, (training.workdir / contract.CHANGES).read_text().splitlines())
    assert (record["step"], record["restore"]["fresh_optimizer"]) == (4, True)
    assert "after step 4: code.mine.py, restored in part" in " ".join(
        training.other("status", str(training.workdir)).stdout.split()
    )


def another_run_starts_from_its_params_by_name(training: Training, folder: Path) -> None:
    folder.mkdir()
    fine = Training(folder, processes_per_host=1)
    fine.edit(1.0)
    source = f"--config.init_from={training.workdir.name}@6"
    text = fine.train(source, "--config.num_steps=1", "--config.optimizer.adamw.learning_rate=0.0")
    assert f"started from the params of step 6 of {training.workdir}/checkpoints" in text
    theirs, ours = tiny.read_state(training.workdir, 6), tiny.read_state(fine.workdir, 1)
    for name in ("model.up.kernel", "model.down.bias"):  # With a rate of 0 they stay.
        np.testing.assert_array_equal(theirs[name], ours[name])
    assert int(ours["optimizer.step"]) == 1
    assert int(ours["model.seen"]) == tiny.fingerprint(1)
    record = json.loads((fine.workdir / contract.CONFIG_RECORD).read_text())
    assert record["init_from"] == f"{training.workdir}@6"
    fine.check_nothing_is_left()


def its_checkpoints_are_looked_after(training: Training, folder: Path) -> None:
    folder.mkdir()
    report = json.loads(training.checkpoints("--json"))
    assert [step["step"] for step in report["steps"]] == [6, 5, 4]
    assert [step["step"] for step in report["steps"] if step["resume"]] == [6]
    assert training.checkpoints("verify").count("every checksum holds") == 3
    victim = training.workdir / contract.CHECKPOINTS / "6" / "meta" / "metadata"
    flip(victim)
    text = training.checkpoints("verify", "6", expect=1)
    assert "step 6: damaged: meta/metadata: bytes 0 to" in text
    lines = training.checkpoints().splitlines()
    assert "damaged" in lines[1]
    assert lines[2].endswith("a resume takes this one")
    assert "step 6 is damaged" in training.checkpoints("copy", "6", str(folder), expect=2)
    assert "copied to" in training.checkpoints("copy", "5", str(folder / "other"))
    assert "a resume takes this one" in training.checkpoints("delete", "4") + training.checkpoints()
    assert "step 5 is the only good one" in training.checkpoints("delete", "5", expect=2)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[random.Random(0).randrange(len(data))] ^= 1
    path.write_bytes(data)
