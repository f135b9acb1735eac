"""`muster status` for people: a report as a page that fits the terminal. Pure."""

from __future__ import annotations

import shlex
import shutil
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from launch import contract, rundir
from launch.backends.tpu.words import rows as machine_rows
from launch.console import last_lines
from launch.goodput import PARTS
from launch.live import WAITING
from launch.standing import QUEUED, RUNNING, SILENT
from launch.table import table
from launch.times import ago, duration, rough, seconds_of

_MOST_ATTEMPTS = 20
_MOST_LINES = 20  # Of a log or a traceback.
_MOST_SINGLE = 8  # Processes that are shown one by one.
_TOLD_IN_FULL = ("completed", "stopped", "preempted", "time_limit")  # By their message.


def as_text(report: Mapping[str, Any], now: float, width: int | None = None) -> str:
    """The page.

    Args:
      report: what `status.status_report` gives.
      now: seconds since the epoch.
      width: columns; None for the terminal's.
    """
    width = width or shutil.get_terminal_size().columns
    parts = [_header(report, now, width), _attempts(report, now, width)]
    failed = _newest_failure(report)
    if failed:
        parts.append(_failure(report, failed, width))
    if report["state"] == RUNNING or _is_open(report):
        parts.append(_gang(report, now))
    parts.append(_goodput(report, width))
    return "\n\n".join("\n".join(lines) for lines in parts if lines)


def _header(report: Mapping[str, Any], now: float, width: int) -> list[str]:
    rows = {"path": report["path"]}
    if report["command"]:
        rows["command"] = shlex.join(report["command"])
    code = report["code"]
    if code:
        dirty = ", with changes that are not committed" if code.get("dirty") else ""
        rows["code"] = f"commit {str(code.get('commit'))[:12]}{dirty}"
    if report["cluster"]:
        rows["cluster"] = cluster_in_words(report["cluster"])
    if (report["job"] or {}).get("id") and report["state"] != QUEUED:
        rows["job"] = f"SLURM job {report['job']['id']}"
    if report["machines"]:
        rows |= machine_rows(report["machines"], now)
    if report["changes"]:
        rows["changed"] = _changes(report["changes"])
    owner = report["owner"]
    if owner:
        rows["owner"] = f"process id {owner.get('pid')} on {owner.get('host')}"
        rows["owner"] += " (dead: its agents are stopping the gang)" * report["orphaned"]
    asked = report["stop_request"]
    if asked:
        again = ", to be killed at once" if asked["count"] > 1 else ""
        when = ago(seconds_of(asked["time"]), now)
        rows["stop"] = f"asked for {when} by {asked['user']} on {asked['host']}{again}"
    title = f"{report['name']} ({report['id']}): {state_in_words(report, now)}"
    indent = " " * 10
    return [
        title,
        *(
            line
            for name, text in rows.items()
            for line in textwrap.wrap(
                text,
                max(width, 40),
                initial_indent=f"  {name:8}",
                subsequent_indent=indent,
                break_long_words=False,
                break_on_hyphens=False,
            )
        ),
    ]


def _changes(records: Sequence[Mapping[str, Any]]) -> str:
    """`after step 10: config.seed 0 -> 1; at step 0: params of step 20 of /runs/a`."""
    told = []
    for record in records:
        parts = [
            change["field"]
            if str(change["field"]).startswith("code.")
            else f"{change['field']} {change['old']!r} -> {change['new']!r}"
            for change in record.get("changes") or ()
        ]
        if record.get("restore"):
            parts.append("restored in part")
        source = record.get("init_from")
        if source:
            parts.append(f"params of step {source['step']} of {source['directory']}")
        told.append(f"after step {record.get('step')}: {', '.join(parts)}")
    return "; ".join(told)


def state_in_words(report: Mapping[str, Any], now: float) -> str:
    """`running`, `waiting for attempt 3, in 12 s`, `not heard of for 3 h`, or how it ended."""
    heard_at = seconds_of(report["heard_at"])
    if report["state"] == SILENT and heard_at is not None:
        return f"not heard of for {rough(now - heard_at)}"
    said = report["live"]
    if report["state"] == QUEUED:
        return job_in_words(report["job"] or {}, now)
    if said is None:
        return str(report["state"])
    words = str(said["state"])
    if words == WAITING:
        words = f"waiting for attempt {said['attempt'] + 1}"
        next_at = seconds_of(said["next_attempt_at"])
        words += "" if next_at is None else f", in {rough(next_at - now)}"
    if heard_at is not None and now - heard_at > 10:
        words += f" (the launcher was heard of {ago(heard_at, now)})"
    return words


def job_in_words(job: Mapping[str, Any], now: float) -> str:
    """`queued as SLURM job 12: Resources, expected to start in 5 min`."""
    if job.get("state") is None:
        return f"queued as SLURM job {job.get('id')}; SLURM gives no answer now"
    if job["state"] != "PENDING":
        return f"SLURM job {job['id']} is {job['state'].lower()}"
    words = f"queued as SLURM job {job['id']}: {job['why_pending']}"
    start_at = seconds_of(job["expected_start"])
    if start_at is not None and start_at > now:
        words += f", expected to start in {rough(start_at - now)}"
    return words


def cluster_in_words(cluster: Mapping[str, Any]) -> str:
    """`local: 2 hosts × 4 processes × 1 device`."""
    counts = [
        _count(int(cluster.get(field) or 1), word)
        for field, word in (
            ("hosts", "host"),
            ("processes_per_host", "process"),
            ("devices_per_process", "device"),
        )
    ]
    kind = f" {cluster['accelerator']}" if cluster.get("accelerator") else ""
    return f"{cluster.get('backend')}{kind}: {' × '.join(counts)}"


def _attempts(report: Mapping[str, Any], now: float, width: int) -> list[str]:
    attempts = report["attempts"]
    rows = [["attempt", "started", "took", "steps", "end", "guilty", "then"]]
    for attempt in attempts[-_MOST_ATTEMPTS:]:
        started_at, ended_at = (
            seconds_of(attempt.get(f"{end}_at")) for end in ("started", "ended")
        )
        open_end = now if attempt is attempts[-1] and report["state"] == RUNNING else None
        until = ended_at if ended_at is not None else open_end
        took = "" if until is None or started_at is None else duration(until - started_at)
        retry = attempt.get("retry") or {}
        rows.append(
            [
                str(attempt["attempt"]),
                ago(started_at, now),
                took,
                steps_in_words(attempt),
                attempt.get("cause") or (RUNNING if open_end else "no end on record"),
                _guilty(attempt),
                _then(retry),
            ]
        )
    left_out = len(attempts) - len(rows) + 1
    note = [f"({left_out} earlier attempts are in --json)"] if left_out > 0 else []
    return note + table(rows, width, right=(0,), squeeze=(6, 5)) if attempts else ["no attempt yet"]


def steps_in_words(attempt: Mapping[str, Any]) -> str:
    """`300 to 420 (+120)`."""
    first, last = attempt.get("resumed_step"), attempt.get("last_step")
    first = attempt.get("first_step") if first is None else first
    if last is None:
        return "none reported"
    return f"{last}" if first is None else f"{first} to {last} (+{max(0, last - first)})"


def _guilty(attempt: Mapping[str, Any]) -> str:
    process, host = attempt.get("guilty_process"), attempt.get("guilty_host")
    if process is None:
        return f"host {host}" if host else ""
    return f"process {process} on {host}"


def _then(retry: Mapping[str, Any]) -> str:
    if not retry:
        return ""
    delay = retry.get("delay_seconds") or 0.0
    what = f"again after {duration(delay)}" if retry.get("again") else "not again"
    return what + (f": {retry['why']}" if retry.get("why") else "")


def _newest_failure(report: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The newest attempt that ended, unless it completed."""
    ended = [attempt for attempt in report["attempts"] if attempt.get("cause")]
    return ended[-1] if ended and ended[-1]["cause"] != "completed" else None


def _failure(report: Mapping[str, Any], attempt: Mapping[str, Any], width: int) -> list[str]:
    number, guilty = attempt["attempt"], attempt.get("guilty_process")
    folder = rundir.attempt_path(Path(report["path"]), number)
    lines = [f"attempt {number}: {attempt['cause']}"]
    told = attempt.get("explanation") or attempt.get("message") or ""
    lines += textwrap.wrap(told, max(width, 40), initial_indent="  ", subsequent_indent="  ")
    if attempt.get("collateral"):
        many = _count(len(attempt["collateral"]), "process")
        lines.append(f"  collateral: {many} ({ranges(attempt['collateral'])})")
    if guilty is None or attempt["cause"] in _TOLD_IN_FULL:
        return lines
    last = attempt.get("last_lines") or last_lines(rundir.log_path(folder, guilty), _MOST_LINES)
    failure = attempt.get("exception") or {}
    trace = str(failure.get("traceback") or "").rstrip().splitlines()
    if failure and (not trace or trace[-1] not in last):  # Else the last lines show it.
        lines.append(f"  exception of process {guilty}:")
        lines += _quoted(trace or [f"{failure.get('type')}: {failure.get('message')}"])
    if last:
        lines.append(f"  last lines of process {guilty}:")
        lines += _quoted(last)
    lines.append(f"  log: {rundir.log_path(folder, guilty)}")
    if any((folder / contract.STACKS).glob("*.txt")):
        lines.append(f"  stacks of every process: {folder / contract.STACKS}")
    return lines


def _quoted(lines: Sequence[str]) -> list[str]:
    shown = [*(["..."] if len(lines) > _MOST_LINES else []), *lines[-_MOST_LINES:]]
    # What a program printed must not move the cursor or ring the bell.
    return [
        "    " + "".join(c if c.isprintable() else " " if c == "\t" else "·" for c in str(line))
        for line in shown
    ]


def _is_open(report: Mapping[str, Any]) -> bool:
    return bool(report["attempts"]) and not report["attempts"][-1].get("cause")


def _gang(report: Mapping[str, Any], now: float) -> list[str]:
    """The processes of the newest attempt, those alike in one line."""
    if not report["attempts"] or (report["live"] or {}).get("state") == WAITING:
        return []
    processes = report["attempts"][-1]["processes"]
    lines = [
        f"attempt {report['attempts'][-1]['attempt']} now: {_count(len(processes), 'process')}"
    ]
    alike: dict[str, list[Mapping[str, Any]]] = {}
    for process in processes:
        alike.setdefault(doing_in_words(process), []).append(process)
    for words, members in sorted(alike.items(), key=lambda item: -len(item[1])):
        if len(processes) <= _MOST_SINGLE or len(members) <= 2:
            lines += [f"  {_one(process, words, now)}" for process in members]
            continue
        ids = ranges(process["process_id"] for process in members)
        waits = [w for w in (_still(process, now) for process in members) if w is not None]
        longest = f", for {duration(max(waits))} at most" if waits else ""
        lines.append(f"  {_count(len(members), 'process')} {words}{longest}: {ids}")
    return lines


def doing_in_words(process: Mapping[str, Any]) -> str:
    """`at step 310 (data)`, `exited with code 1 at step 310`, `not heard of yet`."""
    step = "" if process["step"] is None else f" at step {process['step']}"
    if process["not_started"]:
        return "could not be started"
    if process["signal"] is not None:
        return f"was ended by signal {process['signal']}{step}"
    if process["exit_code"] is not None:
        return f"exited with code {process['exit_code']}{step}"
    if not step:
        return "has not reported yet"
    return f"{step.strip()} ({process['phase']})"


def _one(process: Mapping[str, Any], words: str, now: float) -> str:
    where = f" on {process['host']}" if process["host"] else ""
    pid = f" (pid {process['pid']})" if process["pid"] else ""
    still = _still(process, now)
    since = "" if still is None else f", for {duration(still)}"
    return f"process {process['process_id']}{where}{pid} {words}{since}"


def _still(process: Mapping[str, Any], now: float) -> float | None:
    """For how long a process that is alive has shown no progress, in seconds."""
    if process["ended_at"]:
        return None
    if process["since_seconds"] is not None:
        return float(process["since_seconds"])
    told_at = (process["progress"] or {}).get("time")
    return None if told_at is None else max(0.0, now - told_at)


def ranges(ids: Iterable[int], most: int = 12) -> str:
    """`0-15, 17, 19-1023`."""
    runs: list[list[int]] = []
    for number in sorted(ids):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    shown = [f"{a}" if a == b else f"{a}-{b}" for a, b in runs[:most]]
    return ", ".join(shown) + (", ..." if len(runs) > most else "")


def _goodput(report: Mapping[str, Any], width: int) -> list[str]:
    spent = report["goodput"]
    if not spent:
        return []
    shares = spent["shares"]
    parts = [f"{part.replace('_', ' ')} {shares[part]:.1%}" for part in PARTS]
    shown = [text for text, part in zip(parts, PARTS, strict=True) if shares[part] >= 0.0005]
    text = f"goodput {spent['goodput']:.1%} of {duration(spent['wall_seconds'])}: "
    return textwrap.wrap(text + ", ".join(shown), max(width, 40), subsequent_indent="  ")


def _count(number: int, word: str) -> str:
    plural = "es" if word.endswith("s") else "s"
    return f"{number} {word}{plural * (number != 1)}"
