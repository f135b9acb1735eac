"""machines.json: every queued resource and TPU VM that a run ever asked for.

It is in the run directory and, in case that directory is lost, in the user's state directory, and
on disk in both before anything is asked for.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from launch import contract, registry, rundir
from launch.contract import utc
from launch.spec import ConfigError
from launch.times import seconds_of

MACHINES = "machines.json"


@dataclasses.dataclass
class Asked:
    """Something that was asked for; all of it counts as ours until it was seen to be gone.

    Attributes:
      kind: `queued-resources` or `tpu-vm`.
      name: its name, which no other thing of any run has.
      project: None for the one that gcloud is set to.
      zone: where.
      nodes: the TPU VMs' names, one a slice.
      chips: of all slices.
      asked_at: UTC ISO 8601.
      state: what the API said last; None as long as it was not seen.
      state_since: when it began to say so.
      held_at: since when its chips are there to be paid for.
      ended_at: when it was seen to be gone.
      owned: whether it is Muster's to delete; a node that was there before is not.
    """

    kind: str
    name: str
    project: str | None
    zone: str
    nodes: tuple[str, ...]
    chips: int
    asked_at: str
    state: str | None = None
    state_since: str | None = None
    held_at: str | None = None
    ended_at: str | None = None
    owned: bool = True

    @property
    def open(self) -> bool:
        """Whether it may still be there."""
        return self.ended_at is None

    def see(self, state: str) -> bool:
        """Note what the API says; whether that is new."""
        if state == self.state:
            return False
        self.state, self.state_since = state, utc(time.time())
        return True

    def held_seconds(self, now: float) -> float:
        """How long its chips have been there."""
        begin = seconds_of(self.held_at)
        if begin is None:
            return 0.0
        return max(0.0, (seconds_of(self.ended_at) or now) - begin)


class Ledger:
    """All that one run has asked for.

    Attributes:
      path: the run directory.
      run_id: the run's.
      host: from where it was written last.
      url: the run directory as it was given, if it is on gs://.
      kept: what is there stays after the run's end, by the user's wish.
      cause: with which the run ended outside of any attempt: while it waited for machines, say.
      created_at: when the machines that there are now were first asked for.
      asked: the newest last.
      on_intent: called when something is about to be asked for, and is written down.
    """

    def __init__(self, run: Path, run_id: str):
        """Reads what is on disk.

        Args:
          run: the run directory.
          run_id: the run's.
        """
        self.path = run
        self._lock = threading.Lock()  # Nodes are created side by side.
        self.run_id = run_id
        self.host = os.uname().nodename
        self.url: str | None = None
        self.kept = False
        self.cause: str | None = None
        self.created_at = ""
        self.asked: list[Asked] = []
        self.on_intent: Callable[[], None] = lambda: None
        self.read_again()

    def read_again(self) -> None:
        """Take what is on disk, for it may have changed before the run was held."""
        self.kept, self.cause, self.created_at, self.asked = False, None, utc(time.time()), []
        for path in (self.path / MACHINES, _copy(self.run_id)):
            record = rundir.read_record(path) or {}
            if record.get("run") == self.run_id:
                self._take(record)
                return

    def _take(self, record: dict[str, Any]) -> None:
        self.kept, self.cause = bool(record.get("kept")), record.get("cause")
        self.host, self.url = str(record["host"]), record.get("url")
        self.created_at = record["created_at"]
        names = {field.name for field in dataclasses.fields(Asked)}
        for one in record["machines"]:
            fields = {name: value for name, value in one.items() if name in names}
            self.asked.append(Asked(**{**fields, "nodes": tuple(fields["nodes"])}))

    @property
    def open(self) -> list[Asked]:
        """What may still be there."""
        return [one for one in self.asked if one.open]

    @property
    def owned(self) -> list[Asked]:
        """What is ours to delete, and may still be there."""
        return [one for one in self.open if one.owned]

    def write(self) -> None:
        """Put it on disk, in both places.

        Raises:
          ConfigError: it cannot be; then nothing may be asked for.
        """
        with self._lock:
            self.host = os.uname().nodename
            self._write()

    def _write(self) -> None:
        record = {
            "schema": contract.SCHEMA,
            "run": self.run_id,
            "path": str(self.path),
            "host": self.host,
            "url": self.url,
            "created_at": self.created_at,
            "kept": self.kept,
            "cause": self.cause,
            "machines": [dataclasses.asdict(one) for one in self.asked],
        }
        for path in (self.path / MACHINES, _copy(self.run_id)):
            try:
                path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                rundir.write_private(path, record)
                for written in (path, path.parent):
                    fd = os.open(written, os.O_RDONLY)
                    os.fsync(fd)
                    os.close(fd)
            except OSError as error:
                rule = f"what is asked of Google Cloud cannot be written down: {error}"
                raise ConfigError("", rule) from None


def _copy(run_id: str) -> Path:
    return registry.state_dir() / "machines" / f"{run_id}.json"


def all_ledgers() -> Iterable[Ledger]:
    """Those of every run that this user has started from this machine."""
    try:
        files = sorted((registry.state_dir() / "machines").glob("*.json"))
    except (OSError, RuntimeError):
        return
    for file in files:
        record = rundir.read_record(file) or {}
        with contextlib.suppress(KeyError, TypeError):
            yield Ledger(Path(record["path"]), record["run"])


def forget(ledger: Ledger) -> None:
    """Forget a ledger of which nothing is left, as far as the user's state goes."""
    _copy(ledger.run_id).unlink(missing_ok=True)


def read(run: Path) -> Ledger | None:
    """The ledger of a run; None if it never asked for anything."""
    record = rundir.read_record(run / MACHINES)
    return Ledger(run, str(record["run"])) if record else None


def report(run: Path, price: float | None, now: float) -> dict[str, Any] | None:
    """What `muster status` says of a run's machines; None for a run that never asked for any.

    Args:
      run: the run directory.
      price: of a chip's hour; None if the user has named none.
      now: seconds since the epoch.
    """
    ledger = read(run)
    if ledger is None:
        return None
    hours = sum(one.chips * one.held_seconds(now) for one in ledger.asked) / 3600
    return {
        "kept": ledger.kept,
        "open": [dataclasses.asdict(one) for one in ledger.open],
        "asked": len(ledger.asked),
        "chip_hours": hours,
        "price_per_chip_hour": price,
        "cost": None if price is None else hours * price,
    }
