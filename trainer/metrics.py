"""What a run shows of itself: metrics.jsonl, TensorBoard events, the progress line, throughput."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import sys
import time
from collections.abc import Callable, Mapping
from typing import IO, Any

from launch import contract
from trainer import storage
from trainer.events import Events
from trainer.mirror import CLOSE_SECONDS, CRASH_SECONDS, Mirror


class MetricWriter:
    """Appends metrics to `metrics.jsonl` and to TensorBoard events beside it. Lead process only.

    Each line is one JSON object with `schema` and `step`, written out at once. Lines of steps
    after `start_step`, left by a run that was killed, are dropped first, as is a half-written one,
    so that each step appears once.

    On Google Cloud Storage both are written into a temporary directory, and uploaded from there
    every few seconds, when `flush` is called, and at the end.

    Args:
      directory: the run directory; made if missing. May be on GCS.
      start_step: the step that the run goes on from; 0 for a new one.
    """

    def __init__(self, directory: str | os.PathLike[str], start_step: int = 0):
        self._mirror: Mirror | None = None
        if storage.is_remote(directory):
            self._mirror = Mirror(os.fspath(directory), (contract.METRICS_FILE,))
            directory = self._mirror.local
        self._directory = os.fspath(directory)
        self._start_step = start_step
        os.makedirs(self._directory, exist_ok=True)
        path = os.path.join(self._directory, contract.METRICS_FILE)
        _drop_after(path, start_step)
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 (closed by close)
        self._events = Events(self._directory, start_step)

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Write one line.

        Args:
          step: completed optimizer updates.
          values: Python or numpy scalars on the host. None, and a number that is not finite, is
            null in the JSON; TensorBoard gets the number.

        Raises:
          OSError: the disk is full, say.
        """
        record: dict[str, Any] = {"schema": contract.SCHEMA, "step": int(step)}
        record.update({name: _json_number(value) for name, value in values.items()})
        self._file.write(json.dumps(record, allow_nan=False) + "\n")
        self._file.flush()
        self._events.add(step, values)

    def flush(self) -> None:
        """See that what was written is where it belongs. Any thread."""
        if self._mirror is not None:
            self._mirror.flush()

    def close(self, *, crashed: bool = False) -> None:
        """Write out what is held back, and close both; `crashed`: it must not take long."""
        self._file.close()
        self._events.close()
        if self._mirror is not None:
            self._mirror.close(CRASH_SECONDS if crashed else CLOSE_SECONDS)
            self._mirror = None

    def __enter__(self) -> MetricWriter:
        return self

    def __exit__(self, kind: object, *error: object) -> None:
        self.close(crashed=kind is not None)


def _drop_after(path: str, start_step: int) -> None:
    """Rewrite a metrics file without the lines of steps after `start_step` and broken ones."""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            lines = file.readlines()
    except FileNotFoundError:
        return
    kept = [line for line in lines if line.endswith("\n") and _step_of(line) <= start_step]
    if len(kept) < len(lines):
        contract.write_atomically(path, "".join(kept))


def _step_of(line: str) -> float:
    """The step of a line; infinite for one that is none of ours."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf


def _json_number(value: Any) -> float | int | None:
    """A number that JSON can hold; null for one that is not finite."""
    number = value.item() if hasattr(value, "item") else value
    return number if number is None or math.isfinite(number) else None


@dataclasses.dataclass(frozen=True)
class Rates:
    """How quick the steps of an interval were.

    Attributes:
      step_seconds: wall clock per step, without what was paused for.
      tokens_per_second: over all processes.
      mfu: model FLOP/s as a share of what the devices could do at most; None where not known.
      data_wait_fraction, checkpoint_fraction: of the interval's wall clock, in [0, 1].
      seconds_left: until the last step at the pace of the run so far, evaluation and saving
        included.
    """

    step_seconds: float
    tokens_per_second: float
    mfu: float | None
    data_wait_fraction: float
    checkpoint_fraction: float
    seconds_left: float


class Throughput:
    """Measures steps by the wall clock.

    Call `start` when the first step has been *completed*, so that compiling is not counted, and
    `measure` at each logging step, when that step has been completed.

    Args:
      num_steps: the run's last step.
      tokens_per_step: over all processes.
      flops_per_step: model FLOPs, forward and backward, over all processes; None if not known.
      peak_flops_per_device: of `launch.topology.peak_flops`; None if not known.
      num_devices: over all processes.
      clock: seconds that only grow.
    """

    def __init__(
        self,
        *,
        num_steps: int,
        tokens_per_step: int,
        flops_per_step: float | None = None,
        peak_flops_per_device: float | None = None,
        num_devices: int = 1,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._num_steps = num_steps
        self._tokens_per_step = tokens_per_step
        self._flops_per_step = flops_per_step
        self._peak = peak_flops_per_device * num_devices if peak_flops_per_device else None
        self._clock = clock
        self._started: _Mark | None = None
        self._last: _Mark | None = None
        self._paused = 0.0

    def start(
        self, step: int, data_wait_seconds: float = 0.0, checkpoint_seconds: float = 0.0
    ) -> None:
        """Begin to measure, `step` having been completed just now."""
        self._started = self._last = _Mark(
            step, self._clock(), data_wait_seconds, checkpoint_seconds
        )
        self._paused = 0.0

    def pause(self, seconds: float) -> None:
        """Leave out seconds that were spent on something else than steps, such as evaluation."""
        self._paused += seconds

    def measure(
        self, step: int, data_wait_seconds: float = 0.0, checkpoint_seconds: float = 0.0
    ) -> Rates | None:
        """The rates since the last call; None when no step was completed since.

        Args:
          step: completed just now.
          data_wait_seconds: waited for data since the beginning, e.g. `BatchIterator.wait_seconds`.
          checkpoint_seconds: lost to saving since the beginning. Counted as part of the steps.
        """
        now = _Mark(step, self._clock(), data_wait_seconds, checkpoint_seconds)
        if self._last is None or self._started is None:
            self.start(step, data_wait_seconds, checkpoint_seconds)
            return None
        last, started = self._last, self._started
        if step <= last.step:
            return None
        elapsed = max(now.seconds - last.seconds, 1e-9)
        step_seconds = max(elapsed - self._paused, 1e-9) / (step - last.step)
        mfu = None
        if self._flops_per_step is not None and self._peak is not None:
            mfu = self._flops_per_step / step_seconds / self._peak
        pace = (now.seconds - started.seconds) / (step - started.step)
        self._last, self._paused = now, 0.0
        return Rates(
            step_seconds=step_seconds,
            tokens_per_second=self._tokens_per_step / step_seconds,
            mfu=mfu,
            data_wait_fraction=(data_wait_seconds - last.data_wait_seconds) / elapsed,
            checkpoint_fraction=(checkpoint_seconds - last.checkpoint_seconds) / elapsed,
            seconds_left=max(self._num_steps - step, 0) * pace,
        )


@dataclasses.dataclass(frozen=True)
class _Mark:
    step: int
    seconds: float
    data_wait_seconds: float
    checkpoint_seconds: float


def progress_line(step: int, num_steps: int, loss: float, rates: Rates | None) -> str:
    """The line that shows where a run stands, as the launcher knows it.

    `step 120/1500  loss 2.310  12,345 tokens/s  left 1m 20s  data wait 0.3%  checkpoint 0.1%`
    """
    parts = [f"{contract.PROGRESS_PREFIX}{step}/{num_steps}", f"loss {loss:.3f}"]
    if rates is not None:
        parts += [
            f"{rates.tokens_per_second:,.0f} tokens/s",
            f"left {duration(rates.seconds_left)}",
            f"data wait {rates.data_wait_fraction:.1%}",
            f"checkpoint {rates.checkpoint_fraction:.1%}",
        ]
        if rates.mfu is not None:
            parts.append(f"MFU {rates.mfu:.1%}")
    return "  ".join(parts)


def duration(seconds: float) -> str:
    """Seconds for people: `45s`, `1m 20s`, `3h 05m`, `2d 04h`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m {whole % 60:02d}s"
    if whole < 86400:
        return f"{whole // 3600}h {whole % 3600 // 60:02d}m"
    return f"{whole // 86400}d {whole % 86400 // 3600:02d}h"


class ProgressPrinter:
    """Prints progress lines: redrawn in place on a terminal, one below the other elsewhere.

    Lead process only. Under the launcher stdout is a pipe, and the launcher does the redrawing.
    """

    def __init__(self, stream: IO[str] | None = None):
        self._stream = sys.stdout if stream is None else stream
        self._in_place = self._stream.isatty()
        self._drawn = False

    def show(self, line: str) -> None:
        """Show a progress line in place of the last one."""
        self._stream.write(f"\r{line}\x1b[K" if self._in_place else f"{line}\n")
        self._stream.flush()
        self._drawn = self._in_place

    def say(self, line: str) -> None:
        """Print a line that stays, below the last progress line."""
        self.finish()
        self._stream.write(f"{line}\n")
        self._stream.flush()

    def finish(self) -> None:
        """End a line drawn in place, so that what comes next begins a new one."""
        if self._drawn:
            self._stream.write("\n")
            self._stream.flush()
            self._drawn = False
