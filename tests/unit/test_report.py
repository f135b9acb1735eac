"""trainer.report: metrics are read one step late, and a loss that is not finite stops the run."""

import jax.numpy as jnp
import pytest

from trainer.metrics import Throughput
from trainer.report import Reporter, TrainingDiverged


class Recorder:
    """Stands where the lead's files and terminal do."""

    def __init__(self):
        self.lines = {}
        self.said = []

    def say(self, text):
        self.said.append(text)

    def logged(self, step, num_steps, rates, values):
        self.lines[step] = (rates, values)


def metrics(loss):
    return {"loss": jnp.float32(loss), "grad_norm": jnp.float32(1.0)}


def reporter(output, every=2, num_steps=5, **options):
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
        **options,
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


def skipped(loss, nonfinite=0, spikes=0, in_a_row=0):
    counters = {"nonfinite": nonfinite, "spikes": spikes, "in_a_row": in_a_row}
    return metrics(loss) | {f"skipped_{k}": jnp.int32(v) for k, v in counters.items()}


def test_a_step_that_was_left_out_is_told_and_counted_and_moves_no_schedule():
    output = Recorder()
    report = reporter(output, every=1, num_steps=4, group_rates={"biases": lambda n: 2.0 * n})
    steps = [
        skipped(1.0),
        skipped(float("nan"), nonfinite=1, in_a_row=1),
        skipped(2.0, nonfinite=1),
        skipped(9.0, nonfinite=1, spikes=1, in_a_row=1),
    ]
    for step, values in enumerate(steps, start=1):
        report.add(step, values, 0.0)
    report.flush()
    assert output.said == [
        "step 2: update left out (loss nan, gradient norm 1)",
        "step 4: update left out (loss 9, gradient norm 1)",
    ]
    last = output.lines[4][1]
    assert [last["skipped_nonfinite"], last["skipped_spikes"]] == [1, 1]
    # Updates made before steps 1 to 4: 0, 1, 1, 2.
    assert [values["learning_rate"] for _, values in output.lines.values()] == [0.0, 0.5, 0.5, 1.0]
    assert last["learning_rate/biases"] == 4.0


def test_too_many_left_out_in_a_row_end_the_run_with_the_numbers():
    report = reporter(Recorder(), every=1, num_steps=9, max_skipped=2)
    report.add(6, skipped(1.0, nonfinite=3), 0.0)
    report.add(7, skipped(float("inf"), nonfinite=4, in_a_row=1), 0.0)
    report.add(8, skipped(float("inf"), nonfinite=5, in_a_row=2), 0.0)
    with pytest.raises(TrainingDiverged, match=r"2 updates in a row .* step 8 .*loss inf.*=2.*6"):
        report.flush()
