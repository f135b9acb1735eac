"""`muster status` and `muster logs`: what a run directory says."""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from launch import contract, rundir
from launch.console import LogFollower, discard_output
from launch.spec.errors import ConfigError

_FOLLOW_SECONDS = 0.1


def status(run: str, flags: Mapping[str, str]) -> int:
    """Print how a run stands."""
    report = status_report(find_run(run))
    print(json.dumps(report, indent=1) if "json" in flags else _as_text(report))
    return contract.EXIT_DONE


def find_run(run: str) -> Path:
    """The directory of a run.

    Raises:
      ConfigError: there is no such run directory.
    """
    path = Path(run).expanduser().absolute()
    if not path.is_dir():
        raise ConfigError("", f"no run directory {run!r}; give the --workdir of a `muster run`")
    if not (path / contract.RUN_RECORD).exists():
        raise ConfigError("", f"{run!r} is no run directory: it has no {contract.RUN_RECORD}")
    return path


def status_report(path: Path) -> dict[str, Any]:
    """What `muster status --json` prints."""
    record = rundir.read_record(path / contract.RUN_RECORD) or {}
    owner = rundir.owner(path)
    attempts = []
    for number in rundir.attempt_numbers(path):
        folder = rundir.attempt_path(path, number)
        attempt = rundir.read_record(folder / rundir.ATTEMPT_RECORD) or {"attempt": number}
        if not attempt.get("cause"):
            attempt.update(rundir.steps_reached(folder))
        processes = [_process_report(folder, i) for i in rundir.process_ids(folder)]
        attempts.append({**attempt, "processes": processes})
    cause = attempts[-1].get("cause") if attempts else None
    return {
        "schema": contract.SCHEMA,
        "id": record.get("id"),
        "name": record.get("name"),
        "path": str(path),
        # Nobody holds the directory and yet there is no end: the launcher was killed.
        "state": "running" if owner is not None else (cause or "killed"),
        "owner": owner,
        "attempts": attempts,
    }


def _process_report(attempt: Path, process_id: int) -> dict[str, Any]:
    ended = rundir.read_record(rundir.exit_path(attempt, process_id)) or {}
    progress = rundir.read_record(rundir.progress_path(attempt, process_id))
    return {
        "process_id": process_id,
        "exit_code": ended.get("exit_code"),
        "signal": ended.get("signal"),
        "ended_at": ended.get("ended_at"),
        "progress": progress,
    }


def _as_text(report: Mapping[str, Any]) -> str:
    owner = report["owner"]
    by = f" by host {owner.get('host')}, process id {owner.get('pid')}" if owner else ""
    lines = [f"{report['name']} ({report['id']}): {report['state']}{by}", f"in {report['path']}"]
    for attempt in report["attempts"]:
        steps = f"steps {attempt.get('first_step')} to {attempt.get('last_step')}"
        if attempt.get("last_step") is None:
            steps = "no step reported"
        lines.append(
            f"attempt {attempt['attempt']}: {attempt.get('cause') or 'no end yet'}, {steps}, "
            f"from {attempt.get('started_at')} to {attempt.get('ended_at') or '...'}"
        )
        if attempt.get("message"):
            lines.append(f"  {attempt['message']}")
        for process in attempt["processes"]:
            lines.append(f"  process {process['process_id']}: {_process_text(process)}")
    return "\n".join(lines)


def _process_text(process: Mapping[str, Any]) -> str:
    if process["signal"] is not None:
        how = f"signal {process['signal']}"
    elif process["exit_code"] is not None:
        how = f"exit code {process['exit_code']}"
    else:
        how = "could not be started" if process["ended_at"] else "no end yet"
    progress = process["progress"]
    if not progress:
        return how
    age = max(0.0, time.time() - progress.get("time", 0.0))
    since = "" if process["ended_at"] else f", {age:.0f} s ago"
    return f"{how}, step {progress.get('step')} ({progress.get('phase')}{since})"


def logs(run: str, flags: Mapping[str, str]) -> int:
    """Print a process's log, and with --follow what is added to it until the run ends."""
    path = find_run(run)
    numbers = rundir.attempt_numbers(path)
    number = _number("attempt", flags.get("attempt", str(max(numbers, default=0))), numbers)
    attempt = rundir.attempt_path(path, number)
    known = rundir.process_ids(attempt)
    process_id = _number("process", flags.get("process", "0"), known)
    log = rundir.log_path(attempt, process_id)
    try:
        with open(log, "rb") as file:
            shutil.copyfileobj(file, sys.stdout.buffer)
            offset = file.tell()
        sys.stdout.buffer.flush()
        if "follow" in flags:
            _follow(path, attempt, process_id, LogFollower(log, offset))
    except BrokenPipeError:
        discard_output()  # The reader had enough.
    return contract.EXIT_DONE


def _follow(run: Path, attempt: Path, process_id: int, follower: LogFollower) -> None:
    ended = False
    while not ended:
        ended = rundir.exit_path(attempt, process_id).exists() or rundir.owner(run) is None
        for line in follower.read(last=ended):
            sys.stdout.buffer.write(line + b"\n")
        sys.stdout.buffer.flush()
        if not ended:
            time.sleep(_FOLLOW_SECONDS)


def _number(flag: str, value: str, known: list[int]) -> int:
    if not value.isdigit() or int(value) not in known:
        shown = ", ".join(map(str, known)) or "none"
        raise ConfigError(f"--{flag}", f"there is no such {flag}; there are: {shown}", value)
    return int(value)
