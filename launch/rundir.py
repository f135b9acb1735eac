"""The run directory: who owns it, its records and its attempts."""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
import pwd
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from launch import contract
from launch.contract import utc
from launch.events import Retry, Verdict
from launch.spec import ConfigError, check_same_run

LOCK_FILE = "lock"
ATTEMPT_RECORD = "attempt.json"


class InUseError(ConfigError):
    """Another launcher has the run directory.

    Attributes:
      owner: its id, host and pid.
      abandoned: the launcher was killed, and its gang is being stopped by its agents.
    """

    def __init__(self, owner: Mapping[str, Any], path: Path):
        self.owner = owner
        self.abandoned = is_dead(owner)
        who = f"run {owner.get('id')} on host {owner.get('host')}, process id {owner.get('pid')}"
        super().__init__(
            "workdir",
            f"{who}, was killed and its processes are still not stopped; look at them there"
            if self.abandoned
            else f"is in use by {who}; wait for its end, stop it, or choose another --workdir",
            str(path),
        )


class RunDir:
    """A run directory held by this process: nobody else starts a gang in it meanwhile.

    Attributes:
      path: absolute.
      run_id: made when the directory was first used; the run keeps it.
      lock_fd: descriptor that holds the lock. Agents inherit it, so that the directory stays taken
        until the last of them has cleaned up, even if the launcher is killed.
    """

    def __init__(self, workdir: str | os.PathLike[str]):
        """Make the directory where there is none, and take it.

        Raises:
          ConfigError: it cannot be written, or another launcher has it.
        """
        self.path = Path(workdir).expanduser().absolute()
        try:
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
            self.lock_fd = os.open(self.path / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as error:
            rule = f"cannot be used as a run directory: {error.strerror}; choose another"
            raise ConfigError("workdir", rule, str(self.path)) from None
        if not _lock(self.lock_fd):
            owner = _loads(os.pread(self.lock_fd, 65536, 0))
            os.close(self.lock_fd)
            raise InUseError(owner, self.path)
        record = read_record(self.path / contract.RUN_RECORD) or {}
        self.run_id = record.get("id") or f"{time.strftime('%Y%m%d')}-{os.urandom(3).hex()}"
        self.created_at = record.get("created_at") or utc(time.time())
        self.write_owner()

    def write_owner(self) -> None:
        """Say in the lock that this process holds it; a child that goes on alone says so too."""
        owner = {"id": self.run_id, "host": os.uname().nodename, "pid": os.getpid()}
        text = json.dumps(owner).encode() + b"\n"
        os.pwrite(self.lock_fd, text, 0)
        os.ftruncate(self.lock_fd, len(text))

    @property
    def name(self) -> str:
        """The run's name: its directory's."""
        return self.path.name

    def write_run(self, **fields: Any) -> None:
        """Write run.json: the identity, and how the newest attempt was started."""
        record = {
            "schema": contract.SCHEMA,
            "id": self.run_id,
            "name": self.name,
            "user": user_name(),
            "host": os.uname().nodename,
            "created_at": self.created_at,
            **fields,
        }
        _write_private(self.path / contract.RUN_RECORD, record)

    def release(self) -> None:
        """Give the directory back, as far as this process is concerned."""
        os.close(self.lock_fd)

    def new_attempt(self, hosts: list[str], processes_per_host: int = 1) -> Attempt:
        """Open the next attempt; one that its launcher never closed is closed first."""
        number = next_attempt(self.path)
        if number:
            _close_abandoned(attempt_path(self.path, number - 1))
        path = attempt_path(self.path, number)
        path.mkdir(mode=0o700, parents=True)
        (path / contract.STACKS).mkdir(mode=0o700)
        return Attempt(path, number, hosts, processes_per_host)


class Attempt:
    """One start of the whole gang, and its record.

    Attributes:
      process_hosts: each process's host, by process id.
    """

    def __init__(self, path: Path, number: int, hosts: list[str], processes_per_host: int = 1):
        self.path = path
        self.number = number
        self.process_hosts = [host for host in hosts for _ in range(processes_per_host)]
        self._record: dict[str, Any] = {
            "schema": contract.SCHEMA,
            "attempt": number,
            "cause": None,
            "guilty_process": None,
            "guilty_host": None,
            "message": "",
            "first_step": None,
            "last_step": None,
            "started_at": utc(time.time()),
            "ended_at": None,
            "hosts": hosts,
            "num_processes": self.num_processes,
            "backend_ids": [],
        }
        self.write()

    @property
    def num_processes(self) -> int:
        """Members of the gang."""
        return len(self.process_hosts)

    def write(self, **fields: Any) -> None:
        """Write attempt.json with these fields changed."""
        self._record.update(fields)
        _write_private(self.path / ATTEMPT_RECORD, self._record)

    def close(self, verdict: Verdict, retry: Retry) -> None:
        """Record the end."""
        failure = verdict.failure
        self.write(
            cause=verdict.cause,
            exit_code=verdict.exit_code,
            message=verdict.message,
            explanation=verdict.explanation,
            guilty_process=verdict.guilty_process,
            guilty_host=verdict.guilty_host,
            exception=None
            if failure is None
            else {
                "type": failure.type,
                "message": failure.message,
                "traceback": failure.traceback,
            },
            last_lines=list(verdict.last_lines),
            collateral=list(verdict.collateral),
            retry=dataclasses.asdict(retry),
            ended_at=utc(time.time()),
            **steps_reached(self.path),
        )


def check_config(run: Path, config: Any) -> None:
    """Refuse a config that would make another run of what the directory holds.

    Raises:
      ConfigError: lists the fields that differ.
    """
    check_same_run(str(run), read_record(run / contract.CONFIG_RECORD), config)


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
        return _loads(os.pread(fd, 65536, 0))
    finally:
        os.close(fd)
    return None


def last_owner(run: Path) -> dict[str, Any] | None:
    """Who holds the run directory, or held it last; None if nobody ever did."""
    try:
        return _loads((run / LOCK_FILE).read_bytes()) or None
    except OSError:
        return None


def is_dead(owner: Mapping[str, Any]) -> bool:
    """Whether an owner is certainly gone: it was on this host, and no such process is there."""
    pid = owner.get("pid")
    return owner.get("host") == os.uname().nodename and isinstance(pid, int) and not _alive(pid)


def read_record(path: Path) -> dict[str, Any] | None:
    """A JSON object from a file, or None."""
    try:
        return _loads(path.read_bytes()) or None
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


def _lock(fd: int) -> bool:
    """Take the lock; several tries, because `muster status` holds it for a moment to ask."""
    for _ in range(5):
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except OSError:
            time.sleep(0.02)
    return False


def _close_abandoned(attempt: Path) -> None:
    """Say of an attempt without an end that its launcher was killed."""
    record = read_record(attempt / ATTEMPT_RECORD)
    if record is None or record.get("cause"):
        return
    exits = [read_record(exit_path(attempt, i)) or {} for i in process_ids(attempt)]
    ends = [end["ended_at"] for end in exits if end.get("ended_at")]
    record.update(
        cause="killed",
        message="the launcher was killed, and the gang with it",
        ended_at=max(ends, default=record.get("started_at")),
        **steps_reached(attempt),
    )
    _write_private(attempt / ATTEMPT_RECORD, record)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _loads(data: bytes) -> dict[str, Any]:
    try:
        record = json.loads(data)
    except ValueError:
        return {}
    return record if isinstance(record, dict) else {}


def _write_private(path: Path, record: Mapping[str, Any]) -> None:
    """Write a record that may hold secrets (environment, arguments): its owner's alone."""
    contract.write_atomically(path, json.dumps(record, indent=1, default=str) + "\n", mode=0o600)


def user_name() -> str:
    """The user's name, or number where it has none."""
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        return str(os.getuid())
