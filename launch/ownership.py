"""Who runs a run: holds its directory, opens its attempts and writes its records."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from launch import contract, rundir, steady
from launch.contract import utc
from launch.events import Interrupted, Retry, Verdict
from launch.patience import patiently
from launch.spec import ConfigError


class InUseError(ConfigError):
    """Another launcher has the run directory.

    Attributes:
      owner: its id, host and pid.
      abandoned: the launcher was killed, and its gang is being stopped by its agents.
    """

    def __init__(self, owner: Mapping[str, Any], path: Path):
        self.owner = owner
        self.abandoned = rundir.is_dead(owner)
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
            self.lock_fd = os.open(self.path / rundir.LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as error:
            rule = f"cannot be used as a run directory: {error.strerror}; choose another"
            raise ConfigError("workdir", rule, str(self.path)) from None
        if not _lock(self.lock_fd):
            owner = rundir.loads(os.pread(self.lock_fd, 65536, 0))
            os.close(self.lock_fd)
            raise InUseError(owner, self.path)
        record = rundir.read_record(self.path / contract.RUN_RECORD) or {}
        self.run_id = record.get("id") or f"{time.strftime('%Y%m%d')}-{os.urandom(3).hex()}"
        self.created_at = record.get("created_at") or utc(time.time())
        self.write_owner()

    def write_owner(self) -> None:
        """Say in the lock that this process holds it; a child that goes on alone says so too."""
        owner = {"id": self.run_id, "host": os.uname().nodename, "pid": os.getpid()}
        text = json.dumps(owner).encode() + b"\n"
        path = self.path / rundir.LOCK_FILE
        patiently(lambda: _overwrite(self.lock_fd, text), path)

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
            "user": rundir.user_name(),
            "host": os.uname().nodename,
            "created_at": self.created_at,
            **fields,
        }
        path = self.path / contract.RUN_RECORD
        patiently(lambda: rundir.write_private(path, record), path)

    def release(self) -> None:
        """Give the directory back, as far as this process is concerned."""
        os.close(self.lock_fd)

    def new_attempt(
        self, hosts: list[str], processes_per_host: int = 1, backend_ids: Sequence[str] = ()
    ) -> Attempt:
        """Open the next attempt; one that its launcher never closed is closed first.

        Args:
          hosts: in the order of the process ids that run over them.
          processes_per_host: on each.
          backend_ids: what its machines are known by.
        """
        number = rundir.next_attempt(self.path)
        self.close_abandoned()
        path = rundir.attempt_path(self.path, number)
        before = rundir.attempt_record(self.path, number - 1)

        def make() -> None:
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            (path / contract.STACKS).mkdir(mode=0o700, exist_ok=True)

        patiently(make, path)
        return Attempt(
            path,
            number,
            hosts,
            processes_per_host,
            backend_ids,
            waited_seconds=steady.seconds_since_end(before),
        )

    def reopen_attempt(self, number: int) -> Attempt:
        """Go on with an attempt that another controller has left running."""
        path = rundir.attempt_path(self.path, number)
        return Attempt.again(path, rundir.attempt_record(self.path, number))

    def close_abandoned(self, **how: Any) -> bool:
        """Say of a newest attempt without an end what became of it.

        Args:
          **how: fields of its record: cause, message, ...; that its launcher was killed, if there
            are none.

        Returns:
          Whether there was one.
        """
        number = rundir.next_attempt(self.path) - 1
        return number >= 0 and _close_abandoned(rundir.attempt_path(self.path, number), how)


class Attempt:
    """One start of the whole gang, and its record.

    Attributes:
      process_hosts: each process's host, by process id.
    """

    def __init__(
        self,
        path: Path,
        number: int,
        hosts: list[str],
        processes_per_host: int = 1,
        backend_ids: Sequence[str] = (),
        *,
        waited_seconds: float | None = None,
    ):
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
            # The wall clock may be set while it runs; how long it all took is known all the same.
            **steady.now(),
            "waited_seconds": waited_seconds,
            "wall_seconds": None,
            "hosts": hosts,
            "num_processes": self.num_processes,
            "backend_ids": list(backend_ids),
        }
        self._write_patiently()

    @classmethod
    def again(cls, path: Path, record: Mapping[str, Any]) -> Attempt:
        """An attempt that is on record already, as it stands."""
        attempt = cls.__new__(cls)
        attempt.path, attempt.number = path, record["attempt"]
        hosts = record["hosts"]
        each = record["num_processes"] // len(hosts)
        attempt.process_hosts = [host for host in hosts for _ in range(each)]
        attempt._record = dict(record)
        return attempt

    @property
    def num_processes(self) -> int:
        """Members of the gang."""
        return len(self.process_hosts)

    def recorded(self, name: str) -> Any:
        """A field of its record; None if it has none."""
        return self._record.get(name)

    def write(self, **fields: Any) -> None:
        """Write attempt.json with these fields changed."""
        self._record.update(fields)
        rundir.write_private(self.path / rundir.ATTEMPT_RECORD, self._record)

    def _write_patiently(self, **fields: Any) -> None:
        patiently(lambda: self.write(**fields), self.path / rundir.ATTEMPT_RECORD)

    def note(self, event: Interrupted) -> None:
        """Record why it is to end, in case that nobody is left to record its end."""
        notice = {"cause": event.cause, "message": event.message, "guilty_host": event.host}
        with contextlib.suppress(OSError):  # A full disk; the gang is alive, and does not wait.
            self.write(notice=notice)

    def close(
        self,
        verdict: Verdict,
        retry: Retry,
        guilty_step: int | None = None,
        heard_step: int | None = None,
    ) -> None:
        """Record the end.

        Args:
          verdict: on it.
          retry: what follows.
          guilty_step: where the guilty process was; None if it did not say.
          heard_step: what the lead process was last heard to have reached; of another machine's
            process, its file here may be older.
        """
        failure = verdict.failure
        reached = rundir.steps_reached(self.path)
        if heard_step is not None and heard_step > (reached["last_step"] or 0):
            reached["last_step"] = heard_step
        self._record.pop("notice", None)
        self._write_patiently(
            cause=verdict.cause,
            exit_code=verdict.exit_code,
            message=verdict.message,
            explanation=verdict.explanation,
            guilty_process=verdict.guilty_process,
            guilty_host=verdict.guilty_host,
            guilty_step=guilty_step,
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
            wall_seconds=steady.seconds_since_start(self._record),
            **reached,
        )


def _lock(fd: int) -> bool:
    """Take the lock; several tries, because `muster status` holds it for a moment to ask."""
    for _ in range(5):
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except OSError:
            time.sleep(0.02)
    return False


def _close_abandoned(attempt: Path, how: Mapping[str, Any]) -> bool:
    record = rundir.read_record(attempt / rundir.ATTEMPT_RECORD)
    if record is None or record.get("cause"):
        return False
    exits = [
        rundir.read_record(rundir.exit_path(attempt, i)) or {} for i in rundir.process_ids(attempt)
    ]
    ends = [end["ended_at"] for end in exits if end.get("ended_at")]
    killed = {"cause": "killed", "message": "the launcher was killed, and the gang with it"}
    record.update(
        **(how or killed),
        ended_at=max(ends, default=record.get("started_at")),
        wall_seconds=steady.longest_life(exits),
        **rundir.steps_reached(attempt),
    )
    # What the controller knew and could not bring to an end.
    record.update(record.pop("notice", None) or {})
    path = attempt / rundir.ATTEMPT_RECORD
    patiently(lambda: rundir.write_private(path, record), path)
    return True


def _overwrite(fd: int, data: bytes) -> None:
    os.pwrite(fd, data, 0)
    os.ftruncate(fd, len(data))
