"""Every run that this user has started, wherever its directory is.

One small file a run in `$XDG_STATE_HOME/muster/runs` (`~/.local/state/muster/runs`;
MUSTER_STATE_DIR names another place than `.../muster`). It says where a run is and nothing of how
it stands: that is in the run directory alone.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from launch import contract, rundir
from launch.contract import utc
from launch.errors import ConfigError, closest
from launch.ownership import RunDir

STATE_DIR = "MUSTER_STATE_DIR"
_MOST_NAMES = 8  # In an error message.


@dataclasses.dataclass(frozen=True)
class Entry:
    """A run that was started once.

    Attributes:
      id: the run's, from its run.json.
      name: its directory's.
      path: absolute.
      host: where `muster run` was started last.
      user: by whom.
      started_at: when, UTC ISO 8601.
    """

    id: str
    name: str
    path: Path
    host: str
    user: str
    started_at: str

    @property
    def is_there(self) -> bool:
        """Whether its directory still holds it."""
        return (rundir.read_record(self.path / contract.RUN_RECORD) or {}).get("id") == self.id

    @property
    def is_gone(self) -> bool:
        """Whether its directory was moved or deleted; another host's may just not be seen here."""
        return self.host == os.uname().nodename and not self.is_there


def state_dir() -> Path:
    """Where Muster remembers a user's runs.

    Raises:
      RuntimeError: the user has no home.
    """
    own = os.environ.get(STATE_DIR)
    if own:
        return Path(own).expanduser().absolute()
    base = os.environ.get("XDG_STATE_HOME", "")
    if not os.path.isabs(base):  # As the XDG standard has it, what is relative does not count.
        base = str(Path.home() / ".local" / "state")
    return Path(base) / "muster"


def register(run: RunDir) -> None:
    """Remember a run; call it when run.json is written. What fails is one warning."""
    entry: dict[str, Any] = {
        "schema": contract.SCHEMA,
        "id": run.run_id,
        "name": run.name,
        "path": str(run.path),
        "host": os.uname().nodename,
        "user": rundir.user_name(),
        "started_at": utc(time.time()),
    }
    try:
        folder = state_dir() / "runs"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        text = json.dumps(entry, indent=1) + "\n"
        contract.write_atomically(folder / f"{run.run_id}.json", text, mode=0o600)
    except (OSError, RuntimeError) as error:
        with contextlib.suppress(OSError):
            print(
                f"muster: warning: `muster list` will not know this run: {error}; {STATE_DIR} "
                "names another directory for what it knows",
                file=sys.stderr,
            )


def forget(entry: Entry) -> None:
    """Take a run out of the registry; its directory is not touched."""
    (state_dir() / "runs" / f"{entry.id}.json").unlink(missing_ok=True)


def entries() -> list[Entry]:
    """Every run of the registry, the one that was started last first."""
    try:
        files = list((state_dir() / "runs").glob("*.json"))
    except (OSError, RuntimeError):
        return []
    found = []
    for file in files:
        record = rundir.read_record(file) or {}
        try:
            found.append(
                Entry(
                    id=str(record["id"]),
                    name=str(record["name"]),
                    path=Path(record["path"]),
                    host=str(record.get("host")),
                    user=str(record.get("user")),
                    started_at=str(record["started_at"]),
                )
            )
        except (KeyError, TypeError):
            continue  # Not one of ours, or torn by a full disk.
    return sorted(found, key=lambda entry: entry.started_at, reverse=True)


def find(run: str) -> Path:
    """The directory of a run.

    Args:
      run: a run directory, or a run's name, its id or the beginning of its id.

    Raises:
      ConfigError: there is no such run, or there are several.
    """
    if not run:
        raise ConfigError("", "RUN is empty; give a run directory or the name of a run")
    if run.startswith("gs://"):
        return _fetched(run)
    path = Path(run).expanduser().absolute()
    if (path / contract.RUN_RECORD).exists():
        return path
    is_path = os.sep in run or run.startswith((".", "~"))
    known = [] if is_path else entries()
    matches = _matches(run, known)
    if len(matches) == 1:
        return _there(matches[0], run)
    if matches:
        shown = ", ".join(f"{entry.id} in {entry.path}" for entry in matches[:_MOST_NAMES])
        rest = len(matches) - _MOST_NAMES
        more = f" and {rest} more" if rest > 0 else ""
        raise ConfigError("", f"{run!r} can be {shown}{more}; give the id or the directory")
    if path.is_dir():
        raise ConfigError("", f"{run!r} is no run directory: it has no {contract.RUN_RECORD}")
    if is_path or not known:
        raise ConfigError("", f"no run directory {run!r}; give the --workdir of a `muster run`")
    names = {entry.name for entry in known}
    raise ConfigError("", f"no run {run!r}; {closest(run, names, most=_MOST_NAMES)}")


def _fetched(url: str) -> Path:
    """The records of a run on gs://, as they were published last."""
    from launch.backends.tpu import gcloud, published

    gcloud.check_installed()
    try:
        found = published.fetch(url)
    except gcloud.GcloudError as error:
        raise ConfigError("", f"{url} cannot be looked at: {error}") from None
    if not found:
        raise ConfigError("", f"no run in {url}; give the --workdir of a `muster run`")
    return published.place(url)


def _matches(run: str, known: Sequence[Entry]) -> list[Entry]:
    """The runs that are meant: by name, or else by id; those that are gone only if all are."""
    for meant in (
        [entry for entry in known if entry.name == run],
        [entry for entry in known if entry.id == run],
        [entry for entry in known if entry.id.startswith(run)],
    ):
        if meant:
            return [entry for entry in meant if entry.is_there] or meant
    return []


def _there(entry: Entry, run: str) -> Path:
    if entry.is_there:
        return entry.path
    if entry.is_gone:
        rule = f"run {run!r} is gone: {entry.path} does not hold it any more"
        raise ConfigError("", f"{rule}; `muster list --prune` forgets such runs")
    rule = f"run {run!r} was started on host {entry.host}, and {entry.path} is not seen from here"
    raise ConfigError("", f"{rule}; ask there")
