"""The run directory: what is where in it, and what its records say."""

from __future__ import annotations

import fcntl
import json
import os
import pwd
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from launch import contract
from launch.spec import RestoreSpec, build, compare_configs, resume

LOCK_FILE = "lock"
ATTEMPT_RECORD = "attempt.json"


def check_config(run: Path, config: Any) -> None:
    """Refuse a config that would make another run of what the directory holds.

    The trainer judges by the step that it takes, which may be an older one; this is said before
    anything starts.

    Raises:
      ConfigError: lists the fields that differ, and the flag that allows them.
    """
    step, before = _stored_config(run)
    if before is None:
        return
    allow = build(RestoreSpec, config.get("restore", {}), "config.restore").allow_change
    earlier = [] if step is None else resume.changes_at(changes(run), step)
    judged = resume.judge(compare_configs(before, config), allow, earlier)
    resume.check_names(allow, before, config, judged.refused)
    resume.refuse(str(run), judged)


def _stored_config(run: Path) -> tuple[int | None, dict[str, Any] | None]:
    """The newest step and the config that it was saved with; the config on record where the steps
    are not here."""
    folder = run / contract.CHECKPOINTS
    try:
        steps = sorted((int(name) for name in os.listdir(folder) if name.isdigit()), reverse=True)
    except OSError:
        return None, read_record(run / contract.CONFIG_RECORD)
    for step in steps:
        meta = read_record(folder / str(step) / "meta" / "metadata") or {}
        if isinstance(meta.get("config"), dict):
            return step, meta["config"]
    return None, None  # Nothing was saved yet that a config could contradict.


def changes(run: Path) -> list[dict[str, Any]]:
    """What was changed in the middle of the run, and after which step."""
    try:
        return resume.parse_changes((run / contract.CHANGES).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError):
        return []


def attempt_path(run: Path, number: int) -> Path:
    """Directory of an attempt."""
    return run / contract.ATTEMPTS / f"{number:03d}"


def attempt_numbers(run: Path) -> list[int]:
    """The attempts there are, in order."""
    try:
        return sorted(int(name) for name in os.listdir(run / contract.ATTEMPTS) if name.isdigit())
    except OSError:
        return []


def next_attempt(run: Path) -> int:
    """The number that the next attempt gets."""
    return max(attempt_numbers(run), default=-1) + 1


def log_path(attempt: Path, process_id: int) -> Path:
    """A process's log."""
    return attempt / f"process-{process_id:05d}.log"


def exit_path(attempt: Path, process_id: int) -> Path:
    """A process's exit record."""
    return attempt / f"process-{process_id:05d}.exit.json"


def progress_path(attempt: Path, process_id: int) -> Path:
    """Where a process reports its progress (contract.report_progress)."""
    return attempt / f"process-{process_id:05d}.progress.json"


def failure_path(attempt: Path, process_id: int) -> Path:
    """Where a process says which exception ends it (contract.record_failure)."""
    return attempt / f"process-{process_id:05d}.failure.json"


def agent_log_path(attempt: Path, host: str) -> Path:
    """Where a host's agent complains."""
    return attempt / f"agent-{host}.log"


def deadline_path(attempt: Path, process_id: int) -> Path:
    """When a process that is told to stop will be killed (contract.record_deadline)."""
    return attempt / f"process-{process_id:05d}.deadline.json"


def stacks_path(attempt: Path, process_id: int) -> Path:
    """Where a process's Python stacks are written."""
    return attempt / contract.STACKS / f"process-{process_id:05d}.txt"


def exited_ids(attempt: Path) -> list[int]:
    """The processes that have an exit record in this attempt."""
    return _numbered(attempt, ".exit.json")


def process_ids(attempt: Path) -> list[int]:
    """The processes that have a log in this attempt."""
    return _numbered(attempt, ".log")


def attempt_record(run: Path, number: int) -> dict[str, Any]:
    """An attempt's record; its number alone where it cannot be read."""
    record = read_record(attempt_path(run, number) / ATTEMPT_RECORD)
    return record or {"attempt": number}


def num_processes(run: Path, attempt: Mapping[str, Any]) -> int:
    """How many processes an attempt had, of its record; those that have a log in an old one."""
    count = attempt.get("num_processes")
    if isinstance(count, int):
        return count
    return max(process_ids(attempt_path(run, attempt["attempt"])), default=-1) + 1


def steps_reached(attempt: Path) -> dict[str, Any]:
    """First and last step that the lead process, or else any, has reported, and how many seconds
    it has spent in each phase; as fields of an attempt's record."""
    for process_id in process_ids(attempt):
        progress = read_record(progress_path(attempt, process_id))
        if progress and isinstance(progress.get("step"), int):
            return {
                "first_step": progress.get("first_step", progress["step"]),
                "last_step": progress["step"],
                "phase_seconds": progress.get("seconds", {}),
            }
    return {"first_step": None, "last_step": None, "phase_seconds": {}}


def furthest_step(run: Path) -> int | None:
    """The furthest step that any attempt has reported; None when none did."""
    records = [read_record(attempt_path(run, n) / ATTEMPT_RECORD) for n in attempt_numbers(run)]
    steps = [record.get("last_step") for record in records if record]
    return max((step for step in steps if isinstance(step, int)), default=None)


def owner(run: Path) -> dict[str, Any] | None:
    """Who holds the run directory now: id, host and pid; None when nobody does."""
    try:
        fd = os.open(run / LOCK_FILE, os.O_RDONLY)
    except OSError:
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return loads(os.pread(fd, 65536, 0))
    finally:
        os.close(fd)
    return None


def last_owner(run: Path) -> dict[str, Any] | None:
    """Who holds the run directory, or held it last; None if nobody ever did."""
    try:
        return loads((run / LOCK_FILE).read_bytes()) or None
    except OSError:
        return None


def is_dead(owner: Mapping[str, Any]) -> bool:
    """Whether an owner is certainly gone: it was on this host, and no such process is there."""
    pid = owner.get("pid")
    return owner.get("host") == os.uname().nodename and isinstance(pid, int) and not _alive(pid)


def read_record(path: Path) -> dict[str, Any] | None:
    """A JSON object from a file, or None."""
    try:
        return loads(path.read_bytes()) or None
    except OSError:
        return None


def _numbered(attempt: Path, end: str) -> list[int]:
    try:
        names = os.listdir(attempt)
    except OSError:
        return []
    start = "process-"
    numbers = (n[len(start) : -len(end)] for n in names if n.startswith(start) and n.endswith(end))
    return sorted(int(number) for number in numbers if number.isdigit())


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def loads(data: bytes) -> dict[str, Any]:
    """A JSON object from bytes; {} if they hold none."""
    try:
        record = json.loads(data)
    except ValueError:
        return {}
    return record if isinstance(record, dict) else {}


def write_private(path: Path, record: Mapping[str, Any]) -> None:
    """Write a record that may hold secrets (environment, arguments): its owner's alone."""
    contract.write_atomically(path, json.dumps(record, indent=1, default=str) + "\n", mode=0o600)


def user_name() -> str:
    """The user's name, or number where it has none."""
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        return str(os.getuid())
