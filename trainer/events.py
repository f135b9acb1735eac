"""TensorBoard's events, beside the numbers in metrics.jsonl and never in a training's way."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Mapping
from typing import Any

log = logging.getLogger(__name__)


class Events:
    """Writes scalars for TensorBoard, from the first one on.

    Args:
      directory: where to; it must be there.
      start_step: events of later steps, which earlier writers left, are hidden.
    """

    def __init__(self, directory: str, start_step: int):
        self._directory = directory
        self._start_step = start_step
        self._writer: Any = None
        self._lost = False

    def add(self, step: int, values: Mapping[str, Any]) -> None:
        """Write the numbers of a step; None is left out."""
        if self._writer is None:
            self._writer = _summary_writer()(
                self._directory,
                # TensorBoard hides events of steps >= this that earlier writers left.
                purge_step=self._start_step + 1,
                # Or else two starts within a second write to one file, one over the other.
                filename_suffix=f".from-step-{self._start_step}-{os.getpid()}",
                flush_secs=10,
            )
        for name, value in values.items():
            if value is not None and self._are_taken():
                self._writer.add_scalar(name, float(value), int(step))

    def close(self) -> None:
        """Write out what is held back."""
        if self._writer is not None and self._are_taken():
            self._writer.close()
        self._writer = None

    def _are_taken(self) -> bool:
        """Whether tensorboardX's thread lives.

        A full disk ends it, and whoever puts events into its queue then waits for ever once that is
        full (tensorboardX 2.6).
        """
        if not self._lost and not self._writer.file_writer.event_writer._worker.is_alive():
            self._lost = True
            log.warning("no more TensorBoard events in %s: they cannot be written", self._directory)
        return not self._lost


# What tensorboardX imports where it is installed: for torch's arrays, and to write to buckets.
_UNUSED = ("torch", "boto3", "google.cloud.storage")


def _summary_writer() -> Any:
    """TensorBoard's writer, imported when it is needed, without what it would import and we do not
    use: 0.2 s of the way to the first step, and 2 s where torch is installed."""
    hidden = {name: None for name in _UNUSED if name not in sys.modules}
    sys.modules.update(hidden)  # type: ignore[arg-type]
    try:
        from tensorboardX import SummaryWriter
    finally:
        for name in hidden:
            del sys.modules[name]
    return SummaryWriter
