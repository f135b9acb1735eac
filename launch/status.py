"""`muster status`: how a run stands, what became of its attempts, and why."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from launch import contract, live, registry, rundir, stop
from launch.backends.slurm import jobs
from launch.backends.tpu import ledger
from launch.console import print_all
from launch.contract import utc
from launch.goodput import AttemptTimes, Goodput, goodput
from launch.program import shown_command
from launch.standing import QUEUED, Standing, standing
from launch.times import seconds_of


def status(run: str, flags: Mapping[str, str]) -> int:
    """Print how a run stands; returns the exit code."""
    report = status_report(registry.find(run))
    if "json" in flags:
        print_all(json.dumps(report, indent=1))
    else:
        from launch.status_text import as_text

        print_all(as_text(report, time.time()))
    return contract.EXIT_DONE


def status_report(path: Path, now: float | None = None) -> dict[str, Any]:
    """What `muster status --json` prints.

    Args:
      path: the run directory.
      now: seconds since the epoch; for tests.
    """
    now = time.time() if now is None else now
    stands = standing(path, now)  # First: a run that ends meanwhile still counts as running.
    record = rundir.read_record(path / contract.RUN_RECORD) or {}
    numbers = rundir.attempt_numbers(path)
    attempts = [rundir.attempt_record(path, number) for number in numbers]
    for attempt in attempts:
        _complete(path, attempt)
        attempt["processes"] = []
    if attempts:
        newest = attempts[-1]
        newest["processes"] = _processes(path, newest, stands, now)
        if newest.get("last_step") is None and not newest.get("cause"):
            # Its progress files are where its hosts are; the controller has heard of them.
            steps = [p["step"] for p in newest["processes"] if p["step"] is not None]
            newest["last_step"] = min(steps, default=None)
    asked = stop.read(path) if stands.running else None
    spent = goodput(*_times(attempts, stands, now), queued=stands.state == QUEUED)
    return {
        "schema": contract.SCHEMA,
        "id": record.get("id"),
        "name": path.name,
        "path": str(path),
        "state": stands.state,
        "owner": stands.owner,
        "user": record.get("user"),
        "host": record.get("host"),
        "created_at": record.get("created_at"),
        "command": shown_command(record.get("command") or ()),
        "code": record.get("code"),
        "cluster": record.get("cluster"),
        "orphaned": stands.orphaned,
        "heard_at": None if stands.heard_at is None else utc(stands.heard_at),
        "live": _live_report(stands),
        "job": _job_report(path, stands),
        "machines": ledger.report(path, _price(record), now),
        "stop_request": None if asked is None else {**vars(asked)},
        "changes": rundir.changes(path),
        "goodput": None if spent is None else _goodput_report(spent),
        "attempts": attempts,
    }


def _price(record: Mapping[str, Any]) -> float | None:
    """What an hour of a chip costs, by the run's config."""
    return ((record.get("cluster") or {}).get("tpu") or {}).get("price_per_chip_hour")


def _complete(run: Path, attempt: dict[str, Any]) -> None:
    """Fill in what the record of an attempt that was not brought to its end does not say."""
    folder = rundir.attempt_path(run, attempt["attempt"])
    if not attempt.get("cause"):
        attempt.update(rundir.steps_reached(folder))
    if not attempt.get("phase_seconds"):
        progress = rundir.read_record(rundir.progress_path(folder, 0)) or {}
        attempt["phase_seconds"] = progress.get("seconds") or {}
        if not attempt.get("cause") and attempt["phase_seconds"]:
            attempt["phase"], attempt["phase_at"] = progress.get("phase"), progress.get("time")


def _processes(
    run: Path, attempt: Mapping[str, Any], stands: Standing, now: float
) -> list[dict[str, Any]]:
    """The processes of the newest attempt.

    With thousands of processes a file for each is much to read: exit records are read of those that
    have ended, and progress files only if the controller has nothing to say.
    """
    folder = rundir.attempt_path(run, attempt["attempt"])
    ended = set(rundir.exited_ids(folder))
    said = stands.live
    alive = {}
    if said is not None and said.attempt == attempt["attempt"]:
        alive = {process.process_id: process for process in said.processes}
    known = ended | alive.keys() | set(range(rundir.num_processes(run, attempt)))
    return [
        _ended_process(folder, i)
        if i in ended
        else _live_process(alive[i], said.time if said else now)
        if i in alive
        else _unheard_process(folder, i)
        for i in sorted(known)
    ]


def _process(process_id: int, **known: Any) -> dict[str, Any]:
    report = dict.fromkeys(_PROCESS_FIELDS)
    return {**report, "process_id": process_id, **known}


_PROCESS_FIELDS = (
    "process_id",
    "host",
    "pid",
    "exit_code",
    "signal",
    "not_started",
    "ended_at",
    "step",
    "phase",
    "since_seconds",
    "peak_memory_bytes",
    "oom_killed",
    "progress",
)


def _ended_process(attempt: Path, process_id: int) -> dict[str, Any]:
    record = rundir.read_record(rundir.exit_path(attempt, process_id)) or {}
    progress = record.get("progress") or {}
    known = {name: record[name] for name in _PROCESS_FIELDS if name in record}
    return _process(
        **{
            "process_id": process_id,
            "step": progress.get("step"),
            "phase": progress.get("phase"),
            **known,
        }
    )


def _live_process(process: live.LiveProcess, said_at: float) -> dict[str, Any]:
    progress = None
    if process.step is not None:
        changed_at = said_at - (process.since_seconds or 0.0)
        progress = {"step": process.step, "phase": process.phase, "time": changed_at}
    return _process(**vars(process), progress=progress)


def _unheard_process(attempt: Path, process_id: int) -> dict[str, Any]:
    """A process of which neither the controller nor an exit record says anything."""
    progress = rundir.read_record(rundir.progress_path(attempt, process_id))
    told = progress or {}
    return _process(process_id, step=told.get("step"), phase=told.get("phase"), progress=progress)


def _live_report(stands: Standing) -> dict[str, Any] | None:
    """What the controller says of the gang as a whole."""
    if stands.live is None:
        return None
    next_at = stands.live.next_attempt_at
    return {
        "state": stands.live.state,
        "attempt": stands.live.attempt,
        "next_attempt_at": None if next_at is None else utc(next_at),
    }


def _job_report(run: Path, stands: Standing) -> dict[str, Any] | None:
    """The run's newest SLURM job, and what SLURM says of it while it waits."""
    asked = jobs.asked_jobs(run)
    if not asked:
        return None
    job = stands.job
    start_at = job.start_at if job and job.state == "PENDING" else None
    return {
        "id": asked[-1].job_id,
        "state": job.state if job else asked[-1].end,
        "reason": job.reason if job else None,
        "why_pending": job.why_pending if job else None,
        "partition": job.partition if job else None,
        "expected_start": None if start_at is None else utc(start_at),
        "restarts": job.restarts if job else None,
    }


def _times(
    attempts: Sequence[Mapping[str, Any]], stands: Standing, now: float
) -> tuple[list[AttemptTimes], float | None]:
    """What goodput needs: the attempts, and the time now while the next one is waited for."""
    found = []
    for attempt in attempts:
        started_at = seconds_of(attempt.get("started_at"))
        if started_at is None:
            continue
        seconds = dict(attempt["phase_seconds"])
        ended_at = seconds_of(attempt.get("ended_at"))
        newest = attempt is attempts[-1]
        if ended_at is None and newest and stands.running:
            ended_at = now
        if ended_at is None:
            heard_at = stands.heard_at if newest else None
            known = (attempt.get("phase_at"), heard_at, *_ends(attempt))
            ended_at = max(started_at, *(at or 0.0 for at in known))
        elif attempt.get("phase_at"):
            # What it has been doing since its last report.
            phase = str(attempt["phase"])
            seconds[phase] = seconds.get(phase, 0.0) + max(0.0, ended_at - attempt["phase_at"])
        found.append(
            AttemptTimes(
                started_at,
                ended_at,
                seconds,
                attempt.get("first_step"),
                attempt.get("last_step"),
                attempt.get("resumed_step"),
                seconds_of(attempt.get("queued_since")),
                attempt.get("wall_seconds"),
                attempt.get("waited_seconds"),
                wanted_after=attempt.get("cause") not in ("stopped", "completed"),
            )
        )
    waiting = stands.goes_on and bool(found) and bool(attempts[-1].get("cause"))
    return found, now if waiting and found[-1].wanted_after else None


def _ends(attempt: Mapping[str, Any]) -> list[float | None]:
    return [seconds_of(process["ended_at"]) for process in attempt["processes"]]


def _goodput_report(spent: Goodput) -> dict[str, Any]:
    shares = spent.shares
    return {
        "wall_seconds": spent.wall_seconds,
        "goodput": shares["stepping"],
        "seconds": dict(spent.seconds),
        "shares": shares,
    }
