"""A run whose directory is on `gs://`: its records are here, and published there, so that a
controller on any other machine can go on with them.

`muster.json` beside the checkpoints holds them all, in one object, so that they fit together.
"""

from __future__ import annotations

import json
import os
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from launch import contract, registry, rundir
from launch.backends.tpu import gcloud
from launch.backends.tpu.gcloud import MISSING, GcloudError
from launch.backends.tpu.ledger import MACHINES
from launch.contract import utc
from launch.spec import ConfigError
from launch.submission import CONFIG, SUBMISSION
from launch.times import seconds_of

OBJECT = "muster.json"
_PUBLISHED = "published.json"  # Here: what was published, or fetched, last.
_RECORDS = (
    *(contract.RUN_RECORD, MACHINES, SUBMISSION, CONFIG),
    *(contract.PLAN_RECORD, contract.PLAN_TEXT),
)
_LOOK_SECONDS = 2.0  # Between two looks for what has changed.
_ALIVE_SECONDS = 60.0  # Between two signs of life of a controller.
_DEAD_SECONDS = 180.0  # After which it is not believed any more.


def place(url: str) -> Path:
    """Where the records of a run on `gs://` are on this machine."""
    return registry.state_dir() / "remote" / url.removeprefix("gs://").strip("/")


def fetch(url: str) -> bool:
    """Have the newest records of a run here.

    Args:
      url: the run directory, `gs://BUCKET/PATH`.

    Returns:
      Whether there are any.

    Raises:
      GcloudError: no answer, or no leave.
    """
    try:
        published = gcloud.run(["gcloud", "storage", "cat", _object(url), "--quiet"])
    except GcloudError as error:
        if error.kind == MISSING or "matched no objects" in error.said:
            return False
        raise
    run = place(url)
    known = rundir.read_record(run / _PUBLISHED) or {}
    if published["serial"] > known.get("serial", 0):
        run.mkdir(mode=0o700, parents=True, exist_ok=True)
        for name, text in published["records"].items():
            path = run / name
            if not path.resolve().is_relative_to(run.resolve()):
                continue
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            contract.write_atomically(path, text, mode=0o600)
    if published["serial"] >= known.get("serial", 0):
        _note(run, published["serial"], published["owner"])
    return True


def take(url: str) -> None:
    """Have the newest records here, unless a controller elsewhere is writing them.

    Raises:
      ConfigError: there is one, or gcloud gives no answer.
    """
    try:
        fetch(url)
    except GcloudError as error:
        raise ConfigError("workdir", f"cannot be looked at: {error}", url) from None
    owner = elsewhere(place(url))
    if owner is not None:
        rule = (
            f"is in use by process id {owner['pid']} on host {owner['host']}; wait for its end, "
            "stop it there, or choose another --workdir"
        )
        raise ConfigError("workdir", rule, url)


def elsewhere(run: Path) -> dict[str, Any] | None:
    """Who looks after a run from another machine, by what was fetched last; None if nobody does.

    Args:
      run: where its records are on this machine.
    """
    owner = (rundir.read_record(run / _PUBLISHED) or {}).get("owner")
    if not owner or owner["over"] or owner["host"] == os.uname().nodename:
        return None
    heard = time.time() - (seconds_of(owner["time"]) or 0.0)
    return dict(owner) if heard < _DEAD_SECONDS else None


def _note(run: Path, serial: int, owner: Mapping[str, Any]) -> None:
    rundir.write_private(run / _PUBLISHED, {"serial": serial, "owner": dict(owner)})


def _object(url: str) -> str:
    return f"{url.rstrip('/')}/{OBJECT}"


class Publisher:
    """Keeps what is published up to date, in a thread of its own."""

    def __init__(self, url: str, run: Path, say: Callable[[str], None]):
        """Publishes once, so that what cannot be is known before anything is asked for.

        Raises:
          ConfigError: it cannot be.
        """
        self._url = url
        self._run = run
        self._say = say
        self._serial = int((rundir.read_record(run / _PUBLISHED) or {}).get("serial", 0))
        self._text = ""
        self._at = 0.0
        self._told = ""
        self._lock = threading.Lock()
        self._closed = threading.Event()
        try:
            self.publish()
        except GcloudError as error:
            raise ConfigError("workdir", f"cannot be written: {error}", url) from None
        self._thread = threading.Thread(target=self._keep, daemon=True)
        self._thread.start()

    def publish(self, over: bool = False) -> None:
        """Publish what is new, and wait until it is there.

        Raises:
          GcloudError: it cannot be.
        """
        with self._lock:
            records = self._records()
            text = json.dumps(records)
            if text == self._text and not over and time.monotonic() < self._at + _ALIVE_SECONDS:
                return
            owner = {
                "host": os.uname().nodename,
                "pid": os.getpid(),
                "time": utc(time.time()),
                "over": over,
            }
            published = {
                "schema": contract.SCHEMA,
                "serial": self._serial + 1,
                "owner": owner,
                "records": records,
            }
            with tempfile.NamedTemporaryFile("w", dir=self._run, suffix=".tmp") as file:
                json.dump(published, file)
                file.flush()
                gcloud.run(
                    ["gcloud", "storage", "cp", file.name, _object(self._url), "--quiet"],
                    json_output=False,
                )
            self._serial += 1
            self._text, self._at = text, time.monotonic()
            _note(self._run, self._serial, owner)

    def close(self) -> None:
        """Publish the end."""
        self._closed.set()
        self._thread.join()
        self._try(over=True)

    def _keep(self) -> None:
        while not self._closed.wait(_LOOK_SECONDS):
            self._try()

    def _try(self, over: bool = False) -> None:
        try:
            self.publish(over)
        except GcloudError as error:
            if error.said != self._told:
                self._told = error.said
                self._say(f"muster: {self._url}: records cannot be published: {error.said}")

    def _records(self) -> dict[str, str]:
        """What another controller needs, by its path in the run directory."""
        names = list(_RECORDS)
        for number in rundir.attempt_numbers(self._run):
            path = rundir.attempt_path(self._run, number) / rundir.ATTEMPT_RECORD
            names.append(str(path.relative_to(self._run)))
        found = {}
        for name in names:
            try:
                found[name] = (self._run / name).read_text()
            except OSError:
                continue
        return found
