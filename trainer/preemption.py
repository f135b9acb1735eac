"""A signal to any one process becomes one stop that all processes agree on, whatever they do.

JAX's preemption service agrees on a step at step boundaries alone. Here a thread of every process
does it, through the coordination service's key-value store: it answers while the main thread
compiles, restores, evaluates or waits for data. No collective computation is involved, and no
process waits for another's main thread, so there is nothing to hang in.

How: what all processes do alike is counted in units (a training step, a batch of an evaluation).
Once a stop is heard, each process promises to begin no further unit, and says how many it has
begun. All go on to the largest of these numbers, which nobody has to wait for: whoever has begun a
unit has dispatched all of it. Where some process has not begun the loop, nothing worth saving has
happened, and all leave at once.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, NoReturn

from launch import contract

log = logging.getLogger(__name__)

POLL_SECONDS = 0.5  # How long until a stop is heard of that another process was told.
ANSWER_SECONDS = 15.0  # How long the lead waits for the processes' numbers.
# A grace period that is about to end with the process still busy: it leaves by itself, so that its
# log says what is lost. The lead leaves last; with it goes the service that the others speak to.
_LEAVE_SECONDS = 3.0
_LEAD_LEAVE_SECONDS = 1.5
_SHORT_GRACE_SECONDS = 6.0  # The rest of a failed gang is not given time to do anything.
# From the saved state to the process's end, which a thread that reads data may hold up.
_END_SECONDS = 10.0

_NOTICE = "muster/stop/notice"
_BEGUN = "muster/stop/begun"
_DECISION = "muster/stop/decision"
_GONE = "muster/stop/gone"
_NOT_BEGUN = -1


class Stopped(BaseException):
    """The main thread waits for what a stop makes unnecessary. No error: nothing may catch it."""


class StopSignal:
    """Has anybody asked this run to stop, and where do all of us?

    Use as a context manager, on the main thread, before anything takes long and before
    `jax.distributed` is initialized, without JAX's preemption service (which would replace the
    handler). A process alone also takes SIGINT; a second one interrupts as usual. In a gang SIGINT
    means nothing to it: its processes are in sessions of their own, and the launcher turns Ctrl-C
    into SIGTERM.

    Attributes:
      step: completed updates; the loop keeps it, for the log.
      standing: says what is kept and lost if all ended now; for the log.
    """

    def __init__(self) -> None:
        self.step = 0
        self.standing: Callable[[], str] = lambda: "nothing is lost"
        self._changed = threading.Condition()
        self._client: Any = None  # of the coordination service, in a gang
        self._process, self._num_processes = 0, 1
        self._begun = _NOT_BEGUN  # units
        self._frozen = False
        self._last_unit: int | None = None  # the decision
        self._saved_at: float | None = None
        self._waiting = False
        self._interrupts = 0
        self._previous: dict[int, Any] = {}
        self._wakeup = (-1, -1)  # a pipe that the C signal handler writes to
        self._previous_wakeup = -1
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="stop_signal", daemon=True)

    # ---- Set-up ----

    def __enter__(self) -> StopSignal:
        self._wakeup = os.pipe()
        for fd in self._wakeup:
            os.set_blocking(fd, False)
        self._previous_wakeup = signal.set_wakeup_fd(self._wakeup[1], warn_on_full_buffer=False)
        in_gang = bool(os.environ.get(contract.NUM_PROCESSES))
        for number in (signal.SIGTERM,) if in_gang else (signal.SIGTERM, signal.SIGINT):
            self._previous[number] = signal.signal(number, self._receive)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *unused: object) -> None:
        if kind is not None and self._last_unit is not None and self._time_is_over(_LEAVE_SECONDS):
            threading.Event().wait()  # The others have left: this process's turn is next.
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._previous_wakeup)
        if self._saved_at is not None and self._last_unit is not None:
            return  # The thread sees to it that the process ends.
        self._closed.set()
        os.write(self._wakeup[1], b"\0")
        self._thread.join()
        for fd in self._wakeup:
            os.close(fd)

    def join(self, client: Any, process: int, num_processes: int) -> None:
        """This process is one of a gang from now on.

        Args:
          client: of the coordination service; None for a process alone.
          process, num_processes: its place.
        """
        with self._changed:
            self._client, self._process, self._num_processes = client, process, num_processes

    def _receive(self, number: int, frame: FrameType | None) -> None:
        """On the main thread, between two of its instructions."""
        del frame
        if number == signal.SIGINT:
            self._interrupts += 1
            if self._interrupts > 1:
                raise KeyboardInterrupt
        if self._waiting and self._ends_here():
            self._waiting = False
            raise Stopped

    # ---- What the main thread asks ----

    def enter_loop(self) -> None:
        """From now on a stop waits for units that have begun. Nothing has begun yet."""
        with self._changed:
            if not self._frozen:
                self._begun = 0
                return
        threading.Event().wait()  # All leave.

    def begin(self) -> bool:
        """Ask before each unit. Collective: every process must ask before the same units.

        Returns:
          False: go ahead. True, on all processes at the same unit: stop here, do not begin it.
          About a microsecond.
        """
        with self._changed:
            if self._frozen:
                self._changed.wait_for(lambda: self._last_unit is not None)
                if self._ends_here():
                    return True
            self._begun += 1
            return False

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Around a wait for what only a further unit needs.

        Raises:
          Stopped: there will be no further unit.
        """
        self._waiting = True
        try:
            if self._ends_here():
                raise Stopped
            yield
        finally:
            self._waiting = False

    def _ends_here(self) -> bool:
        return self._last_unit is not None and self._begun >= self._last_unit

    @staticmethod
    def seconds_left() -> float | None:
        """Until this process is killed, as far as its launcher has said."""
        deadline = contract.deadline()
        return None if deadline is None else deadline[0] - time.monotonic()

    def saved(self) -> None:
        """All is safe: what still holds the process up is not waited for long."""
        self._saved_at = time.monotonic()

    # ---- The thread ----

    def _watch(self) -> None:
        while not self._hears():
            if self._closed.is_set():
                return
        with self._changed:
            self._frozen = True
            begun = self._begun
        last_unit = self._agree(begun)
        if last_unit == _NOT_BEGUN:
            where = "before the loop began" if begun == _NOT_BEGUN else "where not all can go on"
            self._leave(f"told to stop {where}: {self.standing()}")
        with self._changed:
            self._last_unit = last_unit
            self._changed.notify_all()
        while not self._closed.wait(0.1):
            if self._waiting and self._ends_here():
                signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)
            self._leave_in_time()

    def _hears(self) -> bool:
        """Wait a little for a stop; whether there is one."""
        every = max(POLL_SECONDS, self._num_processes / 2000)
        woken = select.select([self._wakeup[0]], [], [], every)[0]
        numbers = os.read(self._wakeup[0], 64) if woken else b""
        if signal.SIGTERM in numbers or signal.SIGINT in numbers:
            self._put(_NOTICE, self._process)
            return True
        return self._get(_NOTICE) is not None

    def _agree(self, begun: int) -> int:
        """The unit to stop behind, _NOT_BEGUN if some process has not begun the loop.

        The lead decides, and the others hear it: one question from each, not one from each to each.
        """
        if self._client is None:
            return begun  # Of a gang that has not come together, each leaves by itself.
        if self._process != 0:
            self._put(f"{_BEGUN}/{self._process}", begun)
            decision = self._get(_DECISION, ANSWER_SECONDS + 5.0)
            # Without the lead there is no gang: its service ends all.
            return begun if decision is None else decision
        left = self.seconds_left()
        patience = ANSWER_SECONDS if left is None else min(ANSWER_SECONDS, left / 2)
        until = time.monotonic() + patience
        numbers = [begun]
        for process in range(1, self._num_processes):
            # Those that come after a missing one have had their time too.
            number = self._get(f"{_BEGUN}/{process}", max(0.01, until - time.monotonic()))
            if number is None:
                log.warning("process %d does not answer: no unit can end without it", process)
            numbers.append(_NOT_BEGUN if number is None else number)
        decision = _NOT_BEGUN if _NOT_BEGUN in numbers else max(numbers)
        self._put(_DECISION, decision)
        return decision

    def _leave_in_time(self) -> None:
        """Leave, where the time is nearly over or the state was saved long ago."""
        margin = _LEAVE_SECONDS if self._process else _LEAD_LEAVE_SECONDS
        if self._saved_at is not None:
            # What is written is written; a thread that reads data may hold this process up.
            if time.monotonic() > self._saved_at + _END_SECONDS - margin:
                self._leave("told to stop, and what was left to end does not")
            return
        if self._time_is_over(margin):
            self._leave(f"told to stop, and the time for it is over: {self.standing()}")

    @staticmethod
    def _time_is_over(margin: float) -> bool:
        deadline = contract.deadline()
        if deadline is None or deadline[1] < _SHORT_GRACE_SECONDS:
            return False
        return time.monotonic() > deadline[0] - margin

    def _leave(self, why: str) -> NoReturn:
        """End this process from here. The lead is the last: its service aborts who still speaks."""
        if self._process == 0:
            print(f"{why}; the same command goes on from there", flush=True)
            until = time.monotonic() + _LEAD_LEAVE_SECONDS
            for process in range(1, self._num_processes):
                self._get(f"{_GONE}/{process}", max(0.01, until - time.monotonic()))
            time.sleep(0.1 if self._client is not None else 0.0)
        contract.report_exit()
        sys.stdout.flush()
        sys.stderr.flush()
        self._put(f"{_GONE}/{self._process}", True)
        os._exit(contract.EXIT_RESUMABLE)

    # ---- The coordination service ----

    def _put(self, key: str, value: Any) -> None:
        if self._client is not None:
            with contextlib.suppress(Exception):  # It may be gone, and then so are we all.
                self._client.key_value_set(key, json.dumps(value), allow_overwrite=True)

    def _get(self, key: str, seconds: float = 0.0) -> Any:
        """A key's value, waited for so long; None without one."""
        if self._client is None:
            return None
        try:
            if not seconds:
                return json.loads(self._client.key_value_try_get(key))
            return json.loads(self._client.blocking_key_value_get(key, math.ceil(seconds * 1000)))
        except Exception:  # Not there, or the service is gone.
            return None
