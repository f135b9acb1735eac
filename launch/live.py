"""live.json: how a gang stands at this moment. The controller writes it, everybody may read it."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import time
from collections.abc import Iterable
from pathlib import Path

from launch import contract, rundir
from launch.contract import utc
from launch.times import seconds_of

STARTING = "starting"  # Agents and processes are being started.
RUNNING = "running"
STOPPING = "stopping"  # The processes have been told to stop.
WAITING = "waiting"  # For the time of the next attempt; there is no gang.
ACQUIRING = "getting machines"
RELEASING = "giving machines back"
STATES = (STARTING, RUNNING, STOPPING, WAITING, ACQUIRING, RELEASING)

# How often the controller writes it, and after how long a silence it is not believed any more.
EVERY_SECONDS = 1.0
SILENT_SECONDS = 60.0


@dataclasses.dataclass(frozen=True)
class LiveProcess:
    """A process of the gang.

    Attributes:
      process_id: which.
      host: where.
      pid: its number there; None before it is started.
      step: completed updates; None before its first report.
      phase: what it says it is doing; None before its first report.
      since_seconds: how long its step and phase have been the same; None before its first report.
    """

    process_id: int
    host: str
    pid: int | None = None
    step: int | None = None
    phase: str | None = None
    since_seconds: float | None = None


@dataclasses.dataclass(frozen=True)
class Live:
    """What live.json holds.

    Attributes:
      time: when it was written, by the controller's clock.
      attempt: the newest attempt's number.
      state: one of STATES.
      next_attempt_at: when the next attempt starts, while `waiting`.
      processes: those that have not ended, in order of their ids.
    """

    time: float
    attempt: int
    state: str
    next_attempt_at: float | None = None
    processes: tuple[LiveProcess, ...] = ()


def write(
    run: Path,
    attempt: int,
    state: str,
    processes: Iterable[LiveProcess] = (),
    next_attempt_at: float | None = None,
) -> None:
    """Say how the gang stands; about every EVERY_SECONDS, and whenever `state` changes.

    A disk that takes nothing more must not end a run: what cannot be written is not.

    Args:
      run: the run directory.
      attempt: the newest attempt's number.
      state: one of STATES.
      processes: those that have not ended.
      next_attempt_at: seconds since the epoch, while `waiting`.
    """
    assert state in STATES, state
    record = {
        "schema": contract.SCHEMA,
        "time": time.time(),
        "attempt": attempt,
        "state": state,
        "next_attempt_at": None if next_attempt_at is None else utc(next_attempt_at),
        "processes": [vars(process) for process in processes],
    }
    with contextlib.suppress(OSError):
        text = json.dumps(record, separators=(",", ":"))
        contract.write_atomically(run / contract.LIVE_RECORD, text + "\n", mode=0o600)


def read(run: Path) -> Live | None:
    """What live.json says; None if there is none, or it is not what this version writes."""
    record = rundir.read_record(run / contract.LIVE_RECORD) or {}
    try:
        return Live(
            time=float(record["time"]),
            attempt=int(record["attempt"]),
            state=str(record["state"]),
            next_attempt_at=seconds_of(record.get("next_attempt_at")),
            processes=tuple(
                LiveProcess(**{name: process[name] for name in _FIELDS if name in process})
                for process in record.get("processes", ())
            ),
        )
    except (KeyError, TypeError, ValueError):
        return None


_FIELDS = tuple(field.name for field in dataclasses.fields(LiveProcess))


def clear(run: Path) -> None:
    """Take it away: the run is over. The last that the controller does before it lets go."""
    with contextlib.suppress(OSError):
        (run / contract.LIVE_RECORD).unlink()
