"""Learns of a save's end without asking the storage, and when it takes too long."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable


class SaveWatch:
    """Waits for a save in a thread of its own.

    Args:
      wait: returns when the save is committed on all processes; raises what went wrong with it.
      timeout_seconds: a save that takes longer has failed. They are counted by a clock that nobody
        sets; Orbax's own limits go by the time of day (orbax-checkpoint 0.12.8).
    """

    def __init__(self, wait: Callable[[], None], timeout_seconds: float):
        self._wait = wait
        self._timeout_seconds = timeout_seconds
        self._limit = time.monotonic() + timeout_seconds
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="save_watch", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._wait()
        except BaseException as error:
            self._error = error

    @property
    def ended(self) -> bool:
        """Has the save come to its end, good or bad, or has it taken too long?"""
        return not self._thread.is_alive() or time.monotonic() > self._limit

    def join(self) -> None:
        """Wait for the save.

        Raises:
          TimeoutError: it took too long; it may be at work still.
          BaseException: what went wrong with it.
        """
        self._thread.join(max(0.0, self._limit - time.monotonic()))
        if self._thread.is_alive():
            raise TimeoutError(f"it is not done after {self._timeout_seconds:g} s")
        if self._error is not None:
            raise self._error
