"""Metrics on their way from the device to the lead's files and terminal, one step late."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any

import jax

from launch.contract import report_progress
from trainer.metrics import MetricWriter, ProgressPrinter, Rates, Throughput, progress_line

_SKIPS = ("skipped_nonfinite", "skipped_spikes")  # Counters of steps left out, in the metrics.


class TrainingDiverged(RuntimeError):
    """The loss or the gradient norm is no longer finite, or too many steps were left out."""


class Reporter:
    """Holds the metrics of dispatched steps and reads them when the device is past them.

    Every process keeps one, so that all notice a diverged loss at the same step; only the lead's
    has somewhere to write.

    Args:
      output: files and terminal; None on processes that write nothing.
      throughput: of this run.
      log_every_steps: which steps are logged; `num_steps` is logged too.
      num_steps: of the run.
      learning_rate: count of updates before a step -> the rate it used; None if not known.
      group_rates: such functions by group of params, logged as `learning_rate/GROUP`.
      max_skipped: so many steps in a row left out end the run; None where none are left out.
      clock: seconds that only grow.
    """

    def __init__(
        self,
        output: Output | None,
        throughput: Throughput,
        *,
        log_every_steps: int,
        num_steps: int,
        learning_rate: Callable[[int], Any] | None,
        group_rates: Mapping[str, Callable[[int], Any]] = MappingProxyType({}),
        max_skipped: int | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._output = output
        self._throughput = throughput
        self._log_every = log_every_steps
        self._num_steps = num_steps
        self._learning_rate = learning_rate
        self._group_rates = group_rates
        self._max_skipped = max_skipped
        self._clock = clock
        self._pending: list[tuple[int, Any]] = []  # Dispatched, not yet read.
        self._wait_seconds = 0.0  # For data, when the newest pending step was dispatched.
        self._saving_seconds = 0.0  # Since the start.
        self._logged = (0.0, 0.0)  # The two above, at the last logged step.
        self._measuring = False
        self.last_eval_loss: float | None = None

    def add(self, step: int, metrics: Any, wait_seconds: float) -> None:
        """Take the metrics of a step that was just dispatched; read those of the step before.

        Args:
          step: it completes.
          metrics: `loss`, `grad_norm` and perhaps counters of skipped steps, scalars on the device.
          wait_seconds: waited for data since the start of the run.

        Raises:
          TrainingDiverged: at the next logged step after the loss ceased to be finite, or too
            many steps were left out.
        """
        # At most two steps are in flight: enough to keep the device busy, and few enough that
        # gloo's threads cannot starve each other on CPU (it deadlocks after some 40).
        self._finish_newest()
        self._pending.append((step, metrics))
        self._wait_seconds = wait_seconds

    def flush(self) -> None:
        """Read everything dispatched so far.

        Raises:
          TrainingDiverged: the loss of one of these steps is not finite.
        """
        self._finish_newest()
        self._read()

    def spent_saving(self, seconds: float) -> None:
        """Account for time in which a checkpoint blocked the loop."""
        self._saving_seconds += seconds

    @contextlib.contextmanager
    def not_stepping(self) -> Iterator[None]:
        """Leave the time inside out of the step time."""
        before = self._clock()
        yield
        self._throughput.pause(self._clock() - before)

    def evaluated(self, step: int, eval_loss: float) -> None:
        """Write an evaluation line."""
        self.last_eval_loss = eval_loss
        if self._output:
            self._output.evaluated(step, eval_loss)

    def _finish_newest(self) -> None:
        """Wait for the newest pending step, and log it if it is one to log."""
        if not self._pending:
            return
        step, metrics = self._pending[-1]
        metrics["loss"].block_until_ready()
        if not self._measuring:
            # From the first completed step on: what came before was mostly not stepping.
            self._throughput.start(step, self._wait_seconds, self._saving_seconds)
            self._measuring = True
        if step % self._log_every == 0 or step == self._num_steps:
            self._log(step)

    def _read(self) -> Any:
        """Fetch and check all pending metrics; the newest step's, on the host.

        Raises:
          TrainingDiverged: names the step and the window in which it was looked for.
        """
        read = jax.device_get(self._pending)
        self._pending = []
        window = f"(read in the window of steps {read[0][0]} to {read[-1][0]})" if read else ""
        for step, metrics in read:
            if metrics.get("skipped_in_a_row", 0) > 0:
                self._left_out(step, metrics, window)
                continue
            for name in ("loss", "grad_norm"):
                if not math.isfinite(metrics[name]):
                    raise TrainingDiverged(
                        f"{name} is {metrics[name]} at step {step} {window}; checkpoints are from "
                        "before it. Lower the learning rate, clip harder, or look at the data of "
                        "that step"
                    )
        return read[-1][1] if read else None

    def _left_out(self, step: int, metrics: Any, window: str) -> None:
        """Tell of an update that was left out; too many in a row are an error."""
        what = f"loss {metrics['loss']:.4g}, gradient norm {metrics['grad_norm']:.4g}"
        if self._output:
            self._output.say(f"step {step}: update left out ({what})")
        in_a_row = int(metrics["skipped_in_a_row"])
        if self._max_skipped is not None and in_a_row >= self._max_skipped:
            raise TrainingDiverged(
                f"{in_a_row} updates in a row were left out, the last at step {step} {window} with "
                f"{what}; config.optimizer.skip.max_in_a_row={self._max_skipped}. The params are "
                f"those of step {step - in_a_row}. Lower the learning rate, clip harder, look at "
                "the data, or allow larger spikes"
            )

    def _log(self, step: int) -> None:
        metrics = self._read()
        rates = self._throughput.measure(step, self._wait_seconds, self._saving_seconds)
        loss = float(metrics["loss"])
        count = updates_before(step, metrics)
        report_progress(step, "step", loss=loss)
        if self._output:
            wait, saving = self._logged
            self._output.logged(
                step,
                self._num_steps,
                rates,
                {
                    "loss": loss,
                    "grad_norm": float(metrics["grad_norm"]),
                    "learning_rate": self._rate(self._learning_rate, count),
                    "tokens_per_second": rates.tokens_per_second if rates else None,
                    "step_seconds": rates.step_seconds if rates else None,
                    "data_wait_seconds": self._wait_seconds - wait,
                    "checkpoint_blocking_seconds": self._saving_seconds - saving,
                    "mfu": rates.mfu if rates else None,
                    **{
                        f"learning_rate/{group}": self._rate(rate, count)
                        for group, rate in self._group_rates.items()
                    },
                    **{name: int(metrics[name]) for name in _SKIPS if name in metrics},
                },
            )
        self._logged = (self._wait_seconds, self._saving_seconds)

    def _rate(self, schedule: Callable[[int], Any] | None, count: int) -> float | None:
        if schedule is None:
            return None
        with jax.transfer_guard("allow"):  # A schedule computes with jax; it is one small number.
            return float(schedule(count))


def updates_before(step: int, metrics: Any) -> int:
    """How many updates had been made before a step: the count that a schedule was asked with."""
    skipped = sum(int(metrics.get(name, 0)) for name in _SKIPS)
    return step - 1 - skipped + (int(metrics.get("skipped_in_a_row", 0)) > 0)


class Output:
    """The lead's files and terminal."""

    def __init__(self, directory: str, start_step: int):
        self._writer = MetricWriter(directory, start_step)
        self._printer = ProgressPrinter()

    def logged(
        self, step: int, num_steps: int, rates: Rates | None, values: dict[str, float | None]
    ) -> None:
        """Write the metrics of a step and show the progress line."""
        self._writer.write(step, values)
        self._printer.show(progress_line(step, num_steps, values["loss"] or 0.0, rates))

    def evaluated(self, step: int, eval_loss: float) -> None:
        """Write and show an evaluation."""
        self._writer.write(step, {"eval_loss": eval_loss})
        self._printer.say(f"held-out loss at step {step}: {eval_loss:.4f}")

    def say(self, text: str) -> None:
        """Show a line that stays."""
        self._printer.say(text)

    def flush(self) -> None:
        """See that the files are where they belong. Any thread."""
        self._writer.flush()

    def close(self, *, crashed: bool = False) -> None:
        """Write out what is buffered; `crashed`: quickly."""
        self._printer.finish()
        self._writer.close(crashed=crashed)

    def __enter__(self) -> Output:
        return self

    def __exit__(self, kind: object, *error: object) -> None:
        self.close(crashed=kind is not None)
