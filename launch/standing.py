"""How a run stands: who runs it, or how it ended. What `list`, `status`, `logs` and `stop` ask."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from launch import contract, live, rundir
from launch.times import seconds_of

RUNNING = "running"  # Somebody holds the directory.
KILLED = "killed"  # Nobody does, and there is no end on record.
SILENT = "silent"  # It ran on another host; from here one cannot see whether it still does.


@dataclasses.dataclass(frozen=True)
class Standing:
    """How a run stands.

    Attributes:
      state: RUNNING, SILENT, KILLED, or the cause of its last attempt's end.
      owner: who runs it (id, host, pid); None unless it runs.
      orphaned: its launcher is dead, and its agents are stopping the gang by themselves.
      live: what its controller said last; None when nothing is to be believed any more.
      heard_at: when that was, by the clock of the controller's host.
      last: the newest attempt's record; None if there is none.
    """

    state: str
    owner: Mapping[str, Any] | None
    orphaned: bool
    live: live.Live | None
    heard_at: float | None
    last: Mapping[str, Any] | None

    @property
    def running(self) -> bool:
        """Whether it runs, as far as can be seen from here."""
        return self.state == RUNNING

    @property
    def ended_at(self) -> float | None:
        """When its last attempt ended, where there is a record of that."""
        return seconds_of(self.last.get("ended_at")) if self.last else None


def standing(run: Path, now: float | None = None) -> Standing:
    """Look how a run stands.

    Args:
      run: the run directory.
      now: seconds since the epoch; for tests.
    """
    now = time.time() if now is None else now
    # First of all: when nobody holds it now, the records below are final.
    owner = rundir.owner(run)
    said = live.read(run)
    numbers = rundir.attempt_numbers(run)
    last = rundir.attempt_record(run, numbers[-1]) if numbers else None
    heard_at = said.time if said else None
    if owner is not None:
        orphaned = rundir.is_dead(owner)
        return Standing(RUNNING, owner, orphaned, None if orphaned else said, heard_at, last)
    cause = _final_cause(run, last)
    if cause is None and heard_at is not None:
        # Does the file system here not show locks that are taken on another host?
        holder = rundir.last_owner(run) or {}
        if holder.get("host") not in (None, os.uname().nodename):
            if now - heard_at <= live.SILENT_SECONDS:
                return Standing(RUNNING, holder, False, said, heard_at, last)
            return Standing(SILENT, None, False, None, heard_at, last)
    return Standing(cause or KILLED, None, False, None, heard_at, last)


def _final_cause(run: Path, last: Mapping[str, Any] | None) -> str | None:
    """The cause with which a run ended that nobody holds; None if it was not brought to an end."""
    if not last or not last.get("cause"):
        return None
    if not (last.get("retry") or {}).get("again"):
        return str(last["cause"])
    # Another attempt was to follow. Did the user not want it any more, or was the launcher killed?
    request = rundir.read_record(run / contract.STOP_REQUEST) or {}
    asked_at = seconds_of(request.get("time")) or 0.0
    return "stopped" if asked_at >= (seconds_of(last.get("ended_at")) or 0.0) > 0 else None
