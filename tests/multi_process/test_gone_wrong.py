"""Steps that go wrong, and the optimizer's extras, on two real processes and across a restart."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from launch import contract
from tests.testing import tiny
from tests.testing.gangs import MusterCommand

BAD_ROW = 5


def bad_steps(num_steps: int) -> list[int]:
    """The steps whose batch has the bad row, from the data alone."""
    rows = [tiny.rows_of_step(step) for step in range(num_steps)]
    return [step + 1 for step in range(num_steps) if BAD_ROW in rows[step]]


class Training(MusterCommand):
    """`muster run` of the tiny training with everything around its chain."""

    def __init__(self, folder: Path):
        folder.mkdir(parents=True, exist_ok=True)
        super().__init__(folder, processes_per_host=2, devices_per_process=1)

    def train(self, *flags: str, task: str = "around", expect: int = 0) -> str:
        config = f"--config={tiny.ROOT}/tests/testing/configs/tiny.py:{task}"
        done = self.run(config, *flags)
        text = f"{done.stdout}\n{done.stderr}"
        assert done.returncode == expect, text
        self.check_nothing_is_left()
        return text

    def metric_lines(self) -> list[dict]:
        lines = (self.workdir / contract.METRICS_FILE).read_text().splitlines()
        return [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def straight(tmp_path_factory) -> Training:
    """12 steps in one go; the bad row is read by one of the two processes."""
    training = Training(tmp_path_factory.mktemp("straight"))
    training.train("--config.num_steps=12")
    return training


def test_both_processes_leave_out_the_steps_that_one_of_them_spoils(straight):
    expected = bad_steps(12)
    assert 0 < len(expected) < 4
    losses = {line["step"]: line["loss"] for line in straight.metric_lines() if "loss" in line}
    assert [step for step, loss in losses.items() if loss is None] == expected
    assert straight.metric_lines()[-1]["skipped_nonfinite"] == len(expected)
    state = tiny.read_state(straight.workdir, 12)
    # The schedule's count stood still for these steps; the data went on.
    assert int(state["optimizer.opt_state.taken"]) == 12 - len(expected)
    assert int(state["optimizer.step"]) == 12
    assert int(state["model.seen"]) == tiny.fingerprint(12)
    assert all(np.isfinite(leaf).all() for leaf in state.values())


def test_groups_average_counters_and_split_moments_resume_bit_for_bit(straight, tmp_path):
    training = Training(tmp_path)
    training.train("--config.num_steps=7")
    assert "resumed from step 7" in training.train("--config.num_steps=12")
    expected = tiny.read_state(straight.workdir, 12)
    found = tiny.read_state(training.workdir, 12)
    assert found.keys() == expected.keys()
    for name, leaf in found.items():
        np.testing.assert_array_equal(leaf, expected[name], err_msg=name)
    average = "optimizer.opt_state.inner.average.up.kernel"
    assert not np.array_equal(found[average], found["model.up.kernel"])
    specs = {
        leaf["name"]: leaf["spec"]
        for leaf in json.loads((training.workdir / contract.LEDGER_RECORD).read_text())["leaves"]
    }
    assert specs["model.up.kernel"] == "P(None, 'fsdp')"
    assert specs[average] == "P(None, ('fsdp', 'data'))"


def test_too_many_bad_steps_in_a_row_end_the_run_with_one_clear_error(tmp_path):
    training = Training(tmp_path)
    flags = ("--config.data.bad_row=-1", "--config.optimizer.skip.max_in_a_row=3")
    text = training.train("--config.num_steps=20", *flags, expect=contract.EXIT_FAILED)
    assert "3 updates in a row were left out" in text
    assert "config.optimizer.skip.max_in_a_row=3" in text


def test_averaged_params_are_evaluated_and_sampled_from_when_asked_for(tmp_path):
    training = Training(tmp_path)
    flags = ("--config.num_steps=6", "--config.eval.every_steps=6", "--config.eval.params=ema")
    text = training.train("--config.optimizer.ema_decay=0.99", *flags, task="lm")
    lines = {name: line[name] for line in training.metric_lines() for name in line}
    # The average is still near the beginning, where the loss is log(256) = 5.55.
    assert lines["loss"] < 5.3
    assert 5.4 < lines["eval_loss"] < 5.6
    assert "the model's own text:" in text


def test_params_to_evaluate_that_nothing_keeps_are_refused_before_the_first_step(tmp_path):
    flags = ("--config.eval.every_steps=6", "--config.eval.params=ema")
    text = Training(tmp_path).train(*flags, task="lm", expect=contract.EXIT_CONFIG)
    assert "config.eval.params='ema': nothing keeps them" in text
    assert "Traceback" not in text
