"""`muster list`: every run that this user has started, and how it stands."""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from launch import contract, registry, rundir
from launch.console import print_all
from launch.contract import utc
from launch.live import WAITING
from launch.registry import Entry
from launch.standing import QUEUED, SILENT, Standing, standing
from launch.table import table
from launch.times import ago, rough, seconds_of

GONE = "gone"  # Its directory was moved or deleted.
UNSEEN = "unseen"  # Its directory is on another host.


def list_runs(flags: Mapping[str, str]) -> int:
    """Print every run of the registry; returns the exit code."""
    now = time.time()
    if "prune" in flags:
        for entry in registry.entries():
            if entry.is_gone:
                registry.forget(entry)
                print(f"muster: forgot {entry.name} ({entry.id}), was in {entry.path}")
        return contract.EXIT_DONE
    runs = runs_report(now)
    if "json" in flags:
        print_all(json.dumps({"schema": contract.SCHEMA, "runs": runs}, indent=1))
    else:
        width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
        print_all(as_text(runs, now, width))
    return contract.EXIT_DONE


def runs_report(now: float) -> list[dict[str, Any]]:
    """What `muster list --json` prints, the run that was started last first."""
    return [_run_report(entry, now) for entry in registry.entries()]


def _run_report(entry: Entry, now: float) -> dict[str, Any]:
    report: dict[str, Any] = {
        "id": entry.id,
        "name": entry.name,
        "path": str(entry.path),
        "host": entry.host,
        "user": entry.user,
        "started_at": entry.started_at,
        "state": GONE if entry.is_gone else UNSEEN,
        "doing": None,
        "job": None,
        "attempts": None,
        "step": None,
        "changed_at": None,
        "heard_at": None,
    }
    if not entry.is_there:
        return report
    stands = standing(entry.path, now)
    changed_at = _changed_at(stands)
    return {
        **report,
        "state": stands.state,
        "doing": stands.live.state if stands.live else None,
        "job": stands.job.id if stands.job else None,
        "attempts": len(rundir.attempt_numbers(entry.path)),
        "step": _step(entry.path, stands),
        "changed_at": None if changed_at is None else utc(changed_at),
        "heard_at": None if stands.heard_at is None else utc(stands.heard_at),
    }


def _step(run: Path, stands: Standing) -> int | None:
    """How far it is: what the slowest process has done, or what is on record."""
    if stands.live:
        steps = [p.step for p in stands.live.processes if p.step is not None]
        if steps:
            return min(steps)
    if stands.last is None:
        return None
    step = stands.last.get("last_step")
    if step is None and not stands.last.get("cause"):
        step = rundir.steps_reached(rundir.attempt_path(run, stands.last["attempt"]))["last_step"]
    return step if isinstance(step, int) else None


def _changed_at(stands: Standing) -> float | None:
    """When anything was seen to happen last: a step, a phase, a start, an end."""
    times = [stands.ended_at, seconds_of((stands.last or {}).get("started_at"))]
    if stands.live:
        still = [p.since_seconds for p in stands.live.processes if p.since_seconds is not None]
        times += [stands.live.time - min(still)] if still else []
    return max((at for at in times if at is not None), default=None)


def as_text(runs: Sequence[Mapping[str, Any]], now: float, width: int | None) -> str:
    """The table.

    Args:
      runs: what `runs_report` gives.
      now: seconds since the epoch.
      width: of the terminal, in columns; None for lines as long as they get.
    """
    if not runs:
        return "no run yet: `muster run` starts one"
    rows = [["run", "id", "state", "attempts", "step", "started", "changed", "path"]]
    for run in runs:
        rows.append(
            [
                run["name"],
                run["id"],
                _state(run, now),
                "" if run["attempts"] is None else str(run["attempts"]),
                "" if run["step"] is None else str(run["step"]),
                ago(seconds_of(run["started_at"]), now),
                ago(seconds_of(run["changed_at"]), now),
                run["path"],
            ]
        )
    lines = table(rows, width, right=(3, 4), squeeze=(7, 0, 2), keep_end=(7,))
    gone = sum(run["state"] == GONE for run in runs)
    if gone:
        lines += [f"{gone} gone: moved or deleted; `muster list --prune` forgets them"]
    return "\n".join(lines)


def _state(run: Mapping[str, Any], now: float) -> str:
    heard_at = seconds_of(run["heard_at"])
    if run["state"] == SILENT and heard_at is not None:
        return f"not heard of for {rough(now - heard_at)}"
    if run["state"] == UNSEEN:
        return f"on host {run['host']}"
    if run["state"] == QUEUED and run["job"]:
        return f"queued, job {run['job']}"
    return "waiting to start again" if run["doing"] == WAITING else run["doing"] or run["state"]
