"""stop.json: a request to stop, from anywhere that sees the run directory to its controller."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from launch import contract, rundir
from launch.contract import utc


@dataclasses.dataclass(frozen=True)
class StopRequest:
    """What stop.json holds.

    Attributes:
      id: of this request alone.
      count: how many times the same launcher was asked; from 2 on: kill at once.
      time: UTC ISO 8601.
      user: who asks.
      host: from where.
      owner: the lock's record when it was asked; another launcher is not meant.
    """

    id: str
    count: int
    time: str
    user: str
    host: str
    owner: Mapping[str, Any]


def read(run: Path) -> StopRequest | None:
    """The stop request in a run directory; None if there is none."""
    record = rundir.read_record(run / contract.STOP_REQUEST) or {}
    try:
        return StopRequest(**{field.name: record[field.name] for field in _FIELDS})
    except KeyError:
        return None


_FIELDS = dataclasses.fields(StopRequest)


def request(run: Path, owner: Mapping[str, Any]) -> StopRequest:
    """Ask whoever runs it to stop.

    Args:
      run: the run directory.
      owner: who holds it, as `rundir.owner` says.
    """
    before = read(run)
    again = before is not None and before.owner == owner
    asked = StopRequest(
        id=os.urandom(8).hex(),
        count=before.count + 1 if before and again else 1,
        time=utc(time.time()),
        user=rundir.user_name(),
        host=os.uname().nodename,
        owner=dict(owner),
    )
    text = json.dumps({"schema": contract.SCHEMA, **dataclasses.asdict(asked)}) + "\n"
    contract.write_atomically(run / contract.STOP_REQUEST, text, mode=0o600)
    return asked


class StopRequests:
    """The controller's ear: what `muster stop` asks of the run that it holds."""

    def __init__(self, run: Path):
        """Forget what was asked of an earlier controller; call it while holding the lock."""
        self._run = run
        self._seen_id = ""
        self._count = 0
        with contextlib.suppress(OSError):
            (run / contract.STOP_REQUEST).unlink()

    def poll(self) -> int:
        """How many times the user has asked since the last call; takes some 20 µs.

        The sum over all calls is 2 or more when the user wants it killed at once.
        """
        # NFS remembers for half a minute that a file is not there, unless its directory is opened.
        with contextlib.suppress(OSError):
            os.close(os.open(self._run, os.O_RDONLY))
        asked = read(self._run)
        if asked is None or asked.id == self._seen_id:
            return 0
        self._seen_id = asked.id
        if asked.owner and asked.owner != rundir.last_owner(self._run):
            return 0  # It was written for a launcher that ended at that moment.
        new = max(1, asked.count - self._count)
        self._count += new
        return new
