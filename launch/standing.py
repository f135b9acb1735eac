"""How a run stands: who runs it, or how it ended. What `list`, `status`, `logs` and `stop` ask."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from launch import contract, live, rundir
from launch.backends.slurm import client, jobs
from launch.backends.slurm.client import Job
from launch.backends.tpu import ledger, published
from launch.times import seconds_of

RUNNING = "running"  # Somebody holds the directory.
KILLED = "killed"  # Nobody does, and there is no end on record.
QUEUED = "queued"  # A job of it waits for machines.
UNATTENDED = "unattended"  # It has machines of a cloud, and nobody looks after them.
SILENT = "silent"  # It ran on another host; from here one cannot see whether it still does.

# How a run stands that never came so far as to have an attempt, by the end of its job.
_OF_A_JOB = {"CANCELLED": "stopped", "refused": "config"}


@dataclasses.dataclass(frozen=True)
class Standing:
    """How a run stands.

    Attributes:
      state: RUNNING, QUEUED, UNATTENDED, SILENT, KILLED, or the cause of its last attempt's end.
      owner: who runs it (id, host, pid); None unless it runs.
      orphaned: its launcher is dead, and its agents are stopping the gang by themselves.
      live: what its controller said last; None when nothing is to be believed any more.
      heard_at: when that was, by the clock of the controller's host.
      last: the newest attempt's record; None if there is none.
      job: that waits for machines; None if there is none, or SLURM gives no answer.
    """

    state: str
    owner: Mapping[str, Any] | None
    orphaned: bool
    live: live.Live | None
    heard_at: float | None
    last: Mapping[str, Any] | None
    job: Job | None = None

    @property
    def goes_on(self) -> bool:
        """Whether more is to be expected of it."""
        return self.state in (RUNNING, QUEUED)

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
    ended = None
    asked = jobs.open_job(run)
    # Its end may be on record before SLURM has cleared up behind it.
    if asked is not None and not (_is_final(last) and [asked.job_id] == _ids(last)):
        try:
            found = jobs.settle(run)
        except (client.UnavailableError, OSError):
            return Standing(QUEUED, None, False, None, heard_at, last)
        if found is not None:
            job, holder = found[1], rundir.last_owner(run)
            # Runs it, and only its lock is not seen from here?
            runs = job is not None and job.state == "RUNNING" and said is not None and holder
            if runs:
                return Standing(RUNNING, holder, False, said, heard_at, last, job)
            return Standing(QUEUED, None, False, None, heard_at, last, job)
    if last is None:
        ended = next((job.end for job in reversed(jobs.asked_jobs(run))), None)
    cause = _OF_A_JOB.get(ended) if ended else _final_cause(run, last)
    if cause is None and heard_at is not None:
        # Does the file system here not show locks that are taken on another host?
        holder = rundir.last_owner(run) or {}
        if holder.get("host") not in (None, os.uname().nodename):
            if now - heard_at <= live.SILENT_SECONDS:
                return Standing(RUNNING, holder, False, said, heard_at, last)
            return Standing(SILENT, None, False, None, heard_at, last)
    elsewhere = published.elsewhere(run)
    if elsewhere is not None and not _is_final(last):
        return Standing(RUNNING, elsewhere, False, None, heard_at, last)
    machines = ledger.read(run) if cause is None else None
    if machines is not None:
        cause = UNATTENDED if machines.open else machines.cause
    return Standing(cause or KILLED, None, False, None, heard_at, last)


def _is_final(attempt: Mapping[str, Any] | None) -> bool:
    """Whether an attempt has ended and no other is to follow it."""
    record = attempt or {}
    return bool(record.get("cause")) and not (record.get("retry") or {}).get("again")


def _ids(attempt: Mapping[str, Any] | None) -> list[str]:
    return (attempt or {}).get("backend_ids") or []


def _final_cause(run: Path, last: Mapping[str, Any] | None) -> str | None:
    """The cause with which a run ended that nobody holds; None if it was not brought to an end."""
    if not last or not last.get("cause"):
        # What its controller knew of its end, and was killed before it could bring about.
        told = ((last or {}).get("notice") or {}).get("cause")
        return str(told) if told else None
    if _is_final(last):
        return str(last["cause"])
    # Another attempt was to follow. Did the user not want it any more, or was the launcher killed?
    request = rundir.read_record(run / contract.STOP_REQUEST) or {}
    asked_at = seconds_of(request.get("time")) or 0.0
    return "stopped" if asked_at >= (seconds_of(last.get("ended_at")) or 0.0) > 0 else None
