"""Runs the trials of a certificate, so many at once, and leaves none behind."""

from __future__ import annotations

import shutil
import signal
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType

from launch import rundir
from launch.certify.trial import Trial
from launch.spec import ConfigError

_POLL_SECONDS = 0.1
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_STOP_SECONDS = 60.0  # For a gang that is killed; it takes two or three.


_LEFT_SECONDS = 30.0  # How long what a killed certificate has left may take to end.


def clear(folder: Path) -> None:
    """Delete the trials of an earlier certificate, once nothing of them runs any more.

    Raises:
      ConfigError: something still does.
    """
    limit = time.monotonic() + _LEFT_SECONDS
    for run in sorted(folder.glob("*/run")):
        while rundir.owner(run) is not None:
            if time.monotonic() > limit:
                rule = "is still in use by a certificate that was killed; try again in a minute"
                raise ConfigError("workdir", rule, str(run))
            time.sleep(_POLL_SECONDS)
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)


class InterruptedByUser(Exception):
    """Ctrl-C, SIGTERM or SIGHUP came."""


class Fleet:
    """Trials that run; a context manager, on whose way out none does.

    Args:
      state: where their runs are remembered.
      parallel: how many at once.
      say: tells a line.

    Attributes:
      interrupted: set when Ctrl-C, SIGTERM or SIGHUP came.
    """

    def __init__(self, state: Path, parallel: int, say: Callable[[str], None]):
        self._state = state
        self._parallel = parallel
        self._say = say
        self._running: list[Trial] = []
        self.interrupted = threading.Event()
        self._before: dict[int, object] = {}

    def __enter__(self) -> Fleet:
        for number in _SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *unused: object) -> None:
        self._stop()
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _note(self, number: int, frame: FrameType | None) -> None:
        del number, frame
        self.interrupted.set()

    def run(self, trials: Sequence[Trial]) -> None:
        """Run trials to their ends.

        Raises:
          InterruptedByUser: all of them have been stopped.
        """
        waiting = list(trials)
        while waiting or self._running:
            while waiting and len(self._running) < self._parallel:
                trial = waiting.pop(0)
                self._say(f"{trial.name}: {trial.text}")
                trial.start(self._state)
                self._running.append(trial)
            self.check()
            time.sleep(_POLL_SECONDS)
            for trial in list(self._running):
                ended = trial.poll() is not None
                for line in trial.news():
                    self._say(line)
                if ended:
                    self._running.remove(trial)
                    self._say(f"{trial.name}: ended after {trial.seconds:.0f} s")

    def check(self) -> None:
        """Raise InterruptedByUser if a signal has come."""
        if self.interrupted.is_set():
            self._say("stopping")
            self._stop()
            raise InterruptedByUser

    def _stop(self) -> None:
        running, self._running = self._running, []
        for trial in running:
            trial.stop(at_once=True)
        limit = time.monotonic() + _STOP_SECONDS
        for trial in running:
            if not trial.wait(max(0.1, limit - time.monotonic())):
                trial.kill()
