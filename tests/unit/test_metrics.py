"""Every step is in metrics.jsonl once, as valid JSON, and the rates are right."""

import io
import json
import os
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from launch import contract
from tests.testing.gangs import ROOT
from trainer.events import Events
from trainer.metrics import (
    MetricWriter,
    ProgressPrinter,
    Rates,
    Throughput,
    duration,
    progress_line,
)


def lines_of(directory):
    text = (directory / contract.METRICS_FILE).read_text()
    return [json.loads(line, parse_constant=pytest.fail) for line in text.splitlines()]


def events_of(directory):
    """(step, tag, value) of all events, and the steps from which a session start hides others."""
    from tensorboardX.proto.event_pb2 import Event

    scalars, starts = [], []
    for path in sorted(directory.glob("events.*")):
        for record in read_records(path.read_bytes()):
            event = Event.FromString(record)
            if event.HasField("session_log"):
                starts.append(event.step)
            for value in event.summary.value:
                scalars.append((event.step, value.tag, value.simple_value))
    return scalars, starts


def test_lines_are_there_at_once_with_schema_and_step(tmp_path):
    with MetricWriter(tmp_path / "run") as writer:
        writer.write(10, {"loss": np.float32(2.5), "learning_rate": 1e-3, "mfu": None})
        assert lines_of(tmp_path / "run") == [
            {"schema": 1, "step": 10, "loss": 2.5, "learning_rate": 1e-3, "mfu": None}
        ]
        writer.write(10, {"eval_loss": jnp.float32(2.0)})
    assert lines_of(tmp_path / "run")[1] == {"schema": 1, "step": 10, "eval_loss": 2.0}


def test_numbers_that_json_does_not_know_become_null(tmp_path):
    with MetricWriter(tmp_path) as writer:
        writer.write(1, {"loss": float("nan"), "a": np.float32("inf"), "b": -np.inf, "c": 3})
    assert lines_of(tmp_path) == [
        {"schema": 1, "step": 1, "loss": None, "a": None, "b": None, "c": 3}
    ]


@pytest.mark.parametrize("half", ['{"schema": 1, "step": 15, "lo', '{"schema": 1, "step": 15}'])
def test_after_a_resume_each_step_appears_once(tmp_path, half):
    with MetricWriter(tmp_path) as writer:
        for step in (10, 20, 30, 40):
            writer.write(step, {"loss": step})
        writer.write(20, {"eval_loss": 1.0})
    with open(tmp_path / contract.METRICS_FILE, "a") as file:
        file.write(half)  # Killed in the middle of a line.
    with MetricWriter(tmp_path, start_step=20) as writer:
        assert [line["step"] for line in lines_of(tmp_path)] == [10, 20, 20]
        for step in (30, 40):
            writer.write(step, {"loss": -step})
    assert [(line["step"], line.get("loss")) for line in lines_of(tmp_path)] == [
        (10, 10), (20, 20), (20, None), (30, -30), (40, -40),
    ]  # fmt: skip


def test_a_resume_that_has_nothing_to_drop_leaves_the_file_alone(tmp_path):
    with MetricWriter(tmp_path) as writer:
        writer.write(10, {"loss": 1.0})
    before = (tmp_path / contract.METRICS_FILE).stat().st_ino
    MetricWriter(tmp_path, start_step=10).close()
    assert (tmp_path / contract.METRICS_FILE).stat().st_ino == before


def test_a_new_run_in_a_directory_with_old_lines_starts_empty(tmp_path):
    with MetricWriter(tmp_path) as writer:
        writer.write(10, {"loss": 1.0})
    MetricWriter(tmp_path).close()
    assert lines_of(tmp_path) == []


def test_tensorboard_gets_the_same_and_hides_the_killed_runs_steps(tmp_path):
    with MetricWriter(tmp_path) as writer:
        writer.write(10, {"loss": 2.0, "mfu": None})
    with MetricWriter(tmp_path, start_step=5) as writer:
        writer.write(10, {"loss": 3.0})
    scalars, starts = events_of(tmp_path)
    assert scalars == [(10, "loss", 2.0), (10, "loss", 3.0)]
    assert starts == [1, 6]


def test_tensorboard_is_not_imported_before_it_is_needed_nor_what_it_needs_for_others(tmp_path):
    (tmp_path / "boto3.py").write_text("print('boto3 was imported')")
    code = (
        "import sys; from trainer.metrics import MetricWriter; "
        f"w = MetricWriter({str(tmp_path)!r}); print('tensorboardX' in sys.modules); "
        "w.write(1, {'a': 1.0}); print('tensorboardX' in sys.modules); w.close(); import boto3"
    )
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines() == ["False", "True", "boto3 was imported"]


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def test_rates_leave_out_the_first_step_and_what_was_paused_for():
    clock = Clock()
    throughput = Throughput(
        num_steps=100, tokens_per_step=1000, flops_per_step=8e9, peak_flops_per_device=1e10,
        num_devices=4, clock=clock,
    )  # fmt: skip
    clock.now += 60  # Compiling.
    throughput.start(1, data_wait_seconds=7.0, checkpoint_seconds=0.0)
    clock.now += 2
    rates = throughput.measure(11, data_wait_seconds=7.1, checkpoint_seconds=0.5)
    assert rates.step_seconds == pytest.approx(0.2)
    assert rates.tokens_per_second == pytest.approx(5000)
    assert rates.mfu == pytest.approx(8e9 / 0.2 / 4e10)
    assert rates.data_wait_fraction == pytest.approx(0.05)
    assert rates.checkpoint_fraction == pytest.approx(0.25)
    assert rates.seconds_left == pytest.approx(89 * 0.2)

    clock.now += 6
    throughput.pause(5)  # Evaluated.
    rates = throughput.measure(21, 7.1, 0.5)
    assert rates.step_seconds == pytest.approx(0.1)
    assert rates.data_wait_fraction == 0
    assert rates.seconds_left == pytest.approx(79 * 8 / 20)  # Evaluations to come are counted.

    clock.now += 1
    assert throughput.measure(31, 7.1, 0.5).step_seconds == pytest.approx(0.1)


def test_rates_without_a_known_peak_have_no_mfu_and_need_a_step():
    throughput = Throughput(num_steps=10, tokens_per_step=1, flops_per_step=1.0, clock=Clock())
    assert throughput.measure(1) is None  # Starts.
    assert throughput.measure(1) is None  # No step since.
    assert throughput.measure(2).mfu is None


RATES = Rates(
    step_seconds=0.1,
    tokens_per_second=12345.4,
    mfu=None,
    data_wait_fraction=0.003,
    checkpoint_fraction=0.001,
    seconds_left=80,
)


def test_progress_line_reads_as_designed():
    line = progress_line(120, 1500, 2.31, RATES)
    assert line == (
        "step 120/1500  loss 2.310  12,345 tokens/s  left 1m 20s  data wait 0.3%  checkpoint 0.1%"
    )
    assert line.startswith(contract.PROGRESS_PREFIX)
    assert progress_line(1, 1500, float("nan"), None) == "step 1/1500  loss nan"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0s"), (59.4, "59s"), (59.6, "1m 00s"), (80, "1m 20s"), (11100, "3h 05m"),
     (86399.9, "1d 00h"), (187200, "2d 04h")],
)  # fmt: skip
def test_durations_are_for_people(seconds, text):
    assert duration(seconds) == text


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_progress_is_redrawn_on_a_terminal_and_plain_elsewhere():
    terminal, file = Terminal(), io.StringIO()
    for stream in (terminal, file):
        printer = ProgressPrinter(stream)
        printer.show("step 1")
        printer.show("step 2")
        printer.say("saved")
        printer.show("step 3")
        printer.finish()
        printer.finish()
    assert file.getvalue() == "step 1\nstep 2\nsaved\nstep 3\n"
    assert terminal.getvalue() == "\rstep 1\x1b[K\rstep 2\x1b[K\nsaved\n\rstep 3\x1b[K\n"


def read_records(content):
    """The records of a TFRecord file: length, checksum, data, checksum."""
    while content:
        length = int.from_bytes(content[:8], "little")
        yield content[12 : 12 + length]
        content = content[16 + length :]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_events_that_cannot_be_written_hold_nobody_up(tmp_path, caplog):
    events = Events(str(tmp_path), 0)
    events.add(1, {"loss": 1.0})
    writer = events._writer.file_writer.event_writer

    def full(event):
        raise OSError(28, "No space left on device")

    writer._ev_writer.write_event = full
    events.add(2, {"loss": 1.0})
    writer._worker.join(timeout=30)
    for step in range(3, 100):  # More than the queue takes.
        events.add(step, {"loss": 1.0})
    events.close()
    assert caplog.text.count("no more TensorBoard events") == 1
