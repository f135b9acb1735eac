"""Learns of a save's end without asking the storage: on GCS each question is a request."""

from __future__ import annotations

import threading
from collections.abc import Callable


class SaveWatch:
    """Waits for a save in a thread of its own.

    Args:
      wait: returns when the save is committed on all processes; raises what went wrong with it.
    """

    def __init__(self, wait: Callable[[], None]):
        self._wait = wait
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
        """Has the save come to its end, good or bad?"""
        return not self._thread.is_alive()

    def join(self) -> None:
        """Wait for the save; raise what went wrong with it."""
        self._thread.join()
        if self._error is not None:
            raise self._error
