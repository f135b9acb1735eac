"""The configs of the small tasks reach on two processes what their headers say."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from configs import schedules
from launch.spec.fields import plain
from tests.testing import tiny
from tests.testing.gangs import MusterCommand
from tests.testing.packages import required_package
from trainer.schedules import make_schedule


@pytest.fixture
def muster(tmp_path: Path):
    command = MusterCommand(tmp_path, devices_per_process=1)
    yield command
    command.check_nothing_is_left()


def train(muster: MusterCommand, config: str, *flags: str) -> str:
    """What training a config of configs/ printed."""
    done = muster.run(f"--config={tiny.ROOT}/configs/{config}", *flags)
    text = f"{done.stdout}\n{done.stderr}"
    assert done.returncode == 0, text
    return text


def number(pattern: str, text: str) -> float:
    """The number that a pattern's group finds."""
    match = re.search(pattern, text)
    assert match, text
    return float(match[1])


def test_regression_comes_close_to_the_noise(muster):
    text = train(muster, "regression.py")
    loss = muster.metrics("eval_loss")
    assert list(loss) == [200, 400]
    assert 0.9 < loss[400] < 1.4  # The noise is 1.0; the seed alone makes 0.1 of difference.
    explained = number(r"R\^2 on held-out rows (\S+) \(the noise allows 0\.959", text)
    assert explained == pytest.approx(1 - loss[400] / 24.38, abs=1e-3)


def test_rows_without_weight_do_not_spoil_what_is_learned_from_the_others(muster):
    # Microbatches of unlike weight, and targets of -999 that must not count.
    train(muster, "regression.py", "--config.data.mask_fraction=0.5", "--config.num_microbatches=4")
    assert 0.9 < muster.metrics("eval_loss")[400] < 1.6


def test_digits_are_told_apart(muster):
    required_package("sklearn")
    text = train(muster, "digits.py")
    assert muster.metrics("eval_loss")[150] < 0.12
    accuracy = number(r"accuracy on 256 held-out digits: ([\d.]+)%", text)
    assert accuracy >= 97.0  # Four seeds gave 98.4 to 99.2.


@pytest.mark.parametrize("name", ["warmup_stable_decay", "inverse_sqrt"])
def test_a_schedule_that_was_asked_for_is_the_one_that_is_trained_with(name, tmp_path):
    muster = MusterCommand(tmp_path, processes_per_host=1)
    train(
        muster,
        f"regression.py:{name}",
        "--config.num_steps=42",
        "--config.log_every_steps=7",
        "--config.eval.every_steps=0",
    )
    for key, peak in [("learning_rate/biases", 4e-2), ("learning_rate/kernels", 2e-2)]:
        expected = make_schedule(name, plain(schedules.by_name(name, peak, 400)))
        rates = muster.metrics(key)
        assert rates == {step: pytest.approx(float(expected(step - 1))) for step in range(7, 43, 7)}
    assert muster.metrics("learning_rate") == rates  # Of the last group.
