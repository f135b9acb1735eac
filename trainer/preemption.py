"""A signal to any one process becomes one stop step that all processes agree on."""

from __future__ import annotations

import logging
import signal
from types import FrameType

import jax
from jax.experimental import multihost_utils

log = logging.getLogger(__name__)


class StopSignal:
    """Has anybody asked this run to stop, and at which step do all of us?

    In a gang JAX's preemption service does it: its own SIGTERM handler, set by
    `jax.distributed.initialize`, passes the notice on to all processes, and they settle on the
    step after the furthest one. So no handler of ours may be set there: one set before
    `initialize` is replaced, and one set after it silently disables the notice (jax 0.10.2).
    SIGINT needs nothing in a gang: its processes are in sessions of their own, and the launcher
    turns Ctrl-C into SIGTERM.

    A process alone sets handlers for SIGTERM and the first SIGINT; a second SIGINT interrupts as
    usual. Use as a context manager, on the main thread, after `trainer.distributed.initialize`.
    """

    def __init__(self) -> None:
        self._gang = jax.distributed.is_initialized()
        self._received: int | None = None
        self._agreed = False
        self._previous: dict[int, object] = {}

    def __enter__(self) -> StopSignal:
        if not self._gang:
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *unused: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._previous.clear()

    def _receive(self, number: int, frame: FrameType | None) -> None:
        del frame
        self._received = number
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, self._previous[signal.SIGINT])  # type: ignore[arg-type]

    def agreed(self, step: int) -> bool:
        """Is this the step to stop at? Collective: every process must ask it at every step.

        Args:
          step: completed updates; must grow by one from call to call, alike on every process.

        Returns:
          True on all processes at the same step, and at every later one. About 20 microseconds.
        """
        if not self._agreed:
            if self._gang:
                self._agreed = multihost_utils.reached_preemption_sync_point(step)
            else:
                self._agreed = self._received is not None
            if self._agreed:
                log.warning("asked to stop; all processes stop at step %d", step)
        return self._agreed
