"""Interrupts this process where a plan says, and leaves word of it before it does.

A fault counts as delivered by the marks of the processes that it befell, each written in the very
phase, just before the fault. An attempt carries out the first fault that has no mark: all marks of
the attempts before are there when it starts.
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from launch import contract

KILL, EXCEPTION, SIGTERM = "kill", "exception", "sigterm"

_POLL_SECONDS = 0.002
_HEARD_SECONDS = 2.0
_TOGETHER_SECONDS = 20.0  # How long the processes of a gang wait for each other before they die.


class AskedFor(RuntimeError):
    """The exception that `muster certify` asked for."""


@dataclasses.dataclass(frozen=True)
class Fault:
    """One interruption.

    Attributes:
      id: of the interruption, from 1.
      kind: KILL, EXCEPTION or SIGTERM.
      phase: `restore`, `compile`, `step`, `save` or `eval`.
      step: the first at which it may happen; None in the phases that come before any step.
      process: that it befalls; None for all at the same time.
      delay_seconds: after the phase has begun, where a thread can do it.
    """

    id: int
    kind: str
    phase: str
    step: int | None
    process: int | None
    delay_seconds: float


class Faults:
    """The fault of this attempt, if there is one left.

    Args:
      planned: all faults of the run, in order.
      directory: of the marks, which all processes share.
      process_id, num_processes: this process's place.
      attempt: of the run.
    """

    def __init__(
        self,
        planned: Sequence[Fault],
        directory: Path,
        *,
        process_id: int,
        num_processes: int,
        attempt: int,
    ):
        self._directory = directory
        self._process_id = process_id
        self._num_processes = num_processes
        self._attempt = attempt
        self._lock = threading.Lock()  # A thread and the main thread may both come to the place.
        self._over = False
        self.fault: Fault | None = None
        for fault in planned:
            if not any(directory.glob(f"fault-{fault.id:02d}.process-*.json")):
                self.fault = fault
                break

    def due(self, phase: str, step: int | None) -> Fault | None:
        """The fault, if the gang has come to its place; on every process alike."""
        fault = self.fault
        if fault is None or self._over or fault.phase != phase:
            return None
        if fault.step is not None and (step is None or step < fault.step):
            return None
        return fault

    def befall(self, phase: str, step: int | None, where: str) -> None:
        """Let it happen to this process now, if this is the place and it is meant.

        Args:
          phase: that the process is in.
          step: completed updates.
          where: in words, for the certificate.

        Raises:
          AskedFor: the fault is an exception.
        """
        fault = self.due(phase, step)
        if fault is None:
            return
        if fault.process is not None and fault.process != self._process_id:
            self._over = True  # It is another process's, which is at the same place.
            return
        with self._lock:
            if self._over:
                return
            self._over = True
        if fault.process is None:
            self._together(fault, "here")
        self._mark(fault, phase, step, where)
        if fault.process is None:
            self._together(fault, "json")
        if fault.kind == EXCEPTION:
            raise AskedFor(f"interruption {fault.id} of this certificate, at step {step}")
        if fault.kind == SIGTERM:
            os.kill(os.getpid(), signal.SIGTERM)
            # A short run would be over before all processes have heard of it and agreed on a step.
            time.sleep(_HEARD_SECONDS)
            return
        os.kill(os.getpid(), signal.SIGKILL)

    def later(self, phase: str, step: int | None, where: str) -> None:
        """Let it happen from a thread after the fault's delay, unless the phase is over by then.

        Whoever calls this calls `befall` at the end of the phase. For one process alone: all of
        them are brought together by `befall`.
        """
        fault = self.due(phase, step)
        if fault is None or fault.process != self._process_id or fault.kind == EXCEPTION:
            return

        def wait() -> None:
            time.sleep(fault.delay_seconds)
            self.befall(phase, step, where)

        threading.Thread(target=wait, name="certify_fault", daemon=True).start()

    def marked(self, fault: Fault) -> bool:
        """Whether it has befallen all whom it was meant for."""
        count = self._num_processes if fault.process is None else 1
        return len(list(self._directory.glob(f"fault-{fault.id:02d}.process-*.json"))) >= count

    def _together(self, fault: Fault, ending: str) -> None:
        """Wait until all processes have come as far as this one."""
        if ending == "here":
            self._path(fault, ending).touch(mode=0o600)
        pattern = f"fault-{fault.id:02d}.process-*.{ending}"
        wait_for(
            lambda: len(list(self._directory.glob(pattern))) >= self._num_processes,
            _TOGETHER_SECONDS,
        )

    def _mark(self, fault: Fault, phase: str, step: int | None, where: str) -> None:
        mark = {
            "schema": contract.SCHEMA,
            "fault": fault.id,
            "kind": fault.kind,
            "process": self._process_id,
            "attempt": self._attempt,
            "phase": phase,
            "step": step,
            "where": where,
            "at": contract.utc(time.time()),
        }
        contract.write_atomically(self._path(fault, "json"), json.dumps(mark), mode=0o600)

    def _path(self, fault: Fault, ending: str) -> Path:
        name = f"fault-{fault.id:02d}.process-{self._process_id:05d}.{ending}"
        return self._directory / name


def wait_for(condition: Callable[[], bool], seconds: float) -> bool:
    """Wait until a condition holds; whether it did in time."""
    limit = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > limit:
            return False
        time.sleep(_POLL_SECONDS)
    return True


def faults_of(plan: Mapping[str, Any]) -> list[Fault]:
    """The faults of a plan file."""
    return [Fault(**fault) for fault in plan["faults"]]
