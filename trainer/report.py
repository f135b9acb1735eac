"""Metrics on their way from the device to the lead's files and terminal, one step late."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax

from launch.contract import report_progress


class TrainingDiverged(RuntimeError):
    """The loss or the gradient norm is no longer a finite number."""


class Reporter:
    """Holds the metrics of dispatched steps and reads them when the device is past them.

    Every process keeps one, so that all notice a diverged loss at the same step; only the lead's
    has somewhere to write.

    Args:
      write: called with one dict per logged step (keys of metrics.jsonl) and per evaluation.
      log_every_steps: which steps are logged; `num_steps` is logged too.
      learning_rate: step -> rate that the update from `step - 1` to `step` used, or None.
      tokens_per_step: over all processes.
      mfu: seconds per step -> model FLOPs utilization, or None where a peak is unknown.
      clock: seconds, monotonic.
    """

    def __init__(
        self,
        write: Callable[[dict[str, Any]], None],
        *,
        log_every_steps: int,
        num_steps: int,
        learning_rate: Callable[[int], float] | None,
        tokens_per_step: int,
        mfu: Callable[[float], float | None],
        clock: Callable[[], float] = time.monotonic,
    ):
        self._write = write
        self._log_every = log_every_steps
        self._num_steps = num_steps
        self._learning_rate = learning_rate
        self._tokens_per_step = tokens_per_step
        self._mfu = mfu
        self._clock = clock
        self._pending: list[tuple[int, Any]] = []  # Dispatched, not yet read.
        self._log_at: tuple[int, float] | None = None  # A step to log and its data wait.
        self._window_start: float | None = None
        self._window_step = 0
        self._window_wait = 0.0
        self._saving_seconds = 0.0
        self.last_eval_loss: float | None = None
        self.last_loss: float | None = None

    def start(self, step: int) -> None:
        """Begin to measure, after everything is compiled and restored."""
        self._window_start, self._window_step = self._clock(), step

    def add(self, step: int, metrics: Any, wait_seconds: float) -> None:
        """Take the metrics of a step that was just dispatched; read those of the step before.

        Args:
          metrics: `loss` and `grad_norm`, scalars on the device.
          wait_seconds: waited for data since the start of the run.
        """
        if self._pending:
            # At most two steps are in flight: enough to keep the device busy, and few enough that
            # gloo's threads cannot starve each other on CPU (it deadlocks after some 40).
            self._pending[-1][1]["loss"].block_until_ready()
            if self._log_at:
                self._log()
        self._pending.append((step, metrics))
        if step % self._log_every == 0 or step == self._num_steps:
            self._log_at = (step, wait_seconds)

    def flush(self) -> None:
        """Read everything dispatched so far.

        Raises:
          TrainingDiverged: as below.
        """
        if self._pending:
            self._pending[-1][1]["loss"].block_until_ready()
        if self._log_at:
            self._log()
        self._read()

    def spent_saving(self, seconds: float) -> None:
        """Account for time in which a checkpoint blocked the loop."""
        self._saving_seconds += seconds

    @contextlib.contextmanager
    def not_stepping(self) -> Iterator[None]:
        """Leave the time inside out of the step time."""
        before = self._clock()
        yield
        if self._window_start is not None:
            self._window_start += self._clock() - before

    def evaluated(self, step: int, eval_loss: float) -> None:
        """Write an evaluation line."""
        self.last_eval_loss = eval_loss
        self._write({"step": step, "eval_loss": eval_loss})

    def _read(self) -> list[tuple[int, Any]]:
        """Fetch and check all pending metrics.

        Raises:
          TrainingDiverged: names the step and the window in which it was looked for.
        """
        read = jax.device_get(self._pending)
        self._pending = []
        for step, metrics in read:
            for name in ("loss", "grad_norm"):
                if not math.isfinite(metrics[name]):
                    raise TrainingDiverged(
                        f"{name} is {metrics[name]} at step {step} (read in the window of steps "
                        f"{read[0][0]} to {read[-1][0]}); the newest checkpoint is from before "
                        "it. Lower the learning rate, clip harder, or look at the data of that step"
                    )
        return read

    def _log(self) -> None:
        """Write the line of the step that waits for it; everything pending is done by now."""
        assert self._log_at is not None
        (step, wait_seconds), self._log_at = self._log_at, None
        now = self._clock()
        metrics = self._read()[-1][1]
        steps = step - self._window_step
        start = self._window_start if self._window_start is not None else now
        step_seconds = (now - start) / max(1, steps)
        self.last_loss = float(metrics["loss"])
        self._write(
            {
                "step": step,
                "loss": self.last_loss,
                "grad_norm": float(metrics["grad_norm"]),
                "learning_rate": self._learning_rate(step - 1) if self._learning_rate else None,
                "tokens_per_second": self._tokens_per_step / step_seconds if step_seconds else None,
                "step_seconds": step_seconds,
                "data_wait_seconds": wait_seconds - self._window_wait,
                "checkpoint_blocking_seconds": self._saving_seconds,
                "mfu": self._mfu(step_seconds),
            }
        )
        report_progress(step, "step", loss=self.last_loss, step_seconds=step_seconds)
        self._window_start, self._window_step, self._window_wait = now, step, wait_seconds
        self._saving_seconds = 0.0
