"""trainer.report: metrics are read one step late, and a loss that is not finite stops the run."""

import jax.numpy as jnp
import pytest

from trainer.metrics import Throughput
from trainer.report import Reporter, TrainingDiverged


class Recorder:
    """Stands where the lead's files and terminal do."""

    def __init__(self):
        self.lines = {}

    def logged(self, step, num_steps, rates, values):
        self.lines[step] = (rates, values)


def metrics(loss):
    return {"loss": jnp.float32(loss), "grad_norm": jnp.float32(1.0)}


def reporter(output, every=2, num_steps=5):
    now = iter(range(1000))
    clock = lambda: float(next(now))  # noqa: E731 (a second passes with every look)
    throughput = Throughput(num_steps=num_steps, tokens_per_step=10, clock=clock)
    return Reporter(
        output,
        throughput,
        log_every_steps=every,
        num_steps=num_steps,
        learning_rate=lambda count: 0.5 * count,
        clock=clock,
    )


def test_a_step_is_logged_when_the_next_is_dispatched_and_the_last_at_the_flush():
    output = Recorder()
    report = reporter(output)
    for step in range(1, 6):
        report.add(step, metrics(10.0 - step), wait_seconds=0.1 * step)
        assert list(output.lines) == [s for s in (2, 4) if s < step]
    report.flush()
    assert list(output.lines) == [2, 4, 5]
    assert [values["loss"] for _, values in output.lines.values()] == [8.0, 6.0, 5.0]
    # The update from step 3 to step 4 was the schedule's count 3.
    assert output.lines[4][1]["learning_rate"] == 1.5
    assert output.lines[4][1]["data_wait_seconds"] == pytest.approx(0.2)


def test_time_lost_to_saving_is_told_once():
    output = Recorder()
    report = reporter(output)
    report.add(1, metrics(1.0), 0.0)
    report.spent_saving(3.0)
    for step in range(2, 6):
        report.add(step, metrics(1.0), 0.0)
    report.flush()
    saving = [values["checkpoint_blocking_seconds"] for _, values in output.lines.values()]
    assert saving == [3.0, 0.0, 0.0]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_names_the_step_and_the_window(bad):
    report = reporter(None, every=4)
    for step, loss in ((1, 1.0), (2, bad), (3, 1.0), (4, 1.0)):
        report.add(step, metrics(loss), 0.0)
    with pytest.raises(TrainingDiverged, match=r"at step 2 .*steps 1 to 4"):
        report.add(5, metrics(1.0), 0.0)


def test_before_a_checkpoint_everything_dispatched_is_checked():
    report = reporter(None, every=100, num_steps=1000)
    report.add(1, metrics(float("nan")), 0.0)
    with pytest.raises(TrainingDiverged, match="at step 1"):
        report.flush()
