"""What `muster gc` does for one run on TPUs."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence

from launch import contract, rundir
from launch.backends.tpu import commands, published
from launch.backends.tpu.gcloud import GcloudError
from launch.backends.tpu.holdings import Found, Holdings
from launch.backends.tpu.ledger import Asked, Ledger, forget
from launch.backends.tpu.nodes import ACTIVE, READY
from launch.ownership import InUseError, RunDir
from launch.standing import UNATTENDED, standing


def collect(
    ledger: Ledger, dry_run: bool, labelled: Callable[[str | None, str], Sequence[Found]]
) -> bool:
    """Delete what a run has and does not need; whether something is still there that should not.

    Args:
      ledger: of the run.
      labelled: see Holdings; one answer does for many runs.
      dry_run: only say what would be deleted.
    """
    name = f"{ledger.path.name} ({ledger.run_id})"
    if not ledger.path.exists() and ledger.host != os.uname().nodename:
        _say(f"{name}: its directory {ledger.path} is on host {ledger.host}: ask there")
        return bool(ledger.open)
    if ledger.url is not None:
        try:
            published.fetch(ledger.url)
        except GcloudError as error:
            _say(f"{name}: {ledger.url} cannot be looked at: {error}")
            return True
        owner = published.elsewhere(ledger.path)
        if owner is not None:
            _say(f"{name}: runs on host {owner['host']}: left to its controller there")
            return False
    held = _take(ledger)
    if isinstance(held, InUseError):
        _say(f"{name}: runs; {_named(ledger.open)}: left to its controller")
        return False
    try:
        ledger.read_again()
        holdings = Holdings(
            ledger, lambda text: _say(text.removeprefix("muster: ")), labelled=labelled
        )
        unwanted = _unwanted(ledger, holdings, name)
        if dry_run:
            for one in unwanted:
                argv = commands.delete(one.project, one.kind, one.zone, one.name)
                _say(f"{name}: would delete: {' '.join(argv)}")
            return False
        left = holdings.delete(unwanted)
        gone = [one for one in unwanted if one not in left]
        if gone:
            _say(f"{name}: deleted {_named(gone)}")
        if not ledger.open and held is None:
            forget(ledger)  # Its directory is gone too.
        return bool(left)
    except GcloudError as error:
        _say(f"{name}: {_named(ledger.open) or 'its zones'} cannot be looked at: {error}")
        return True
    finally:
        if held is not None:
            held.release()


def _take(ledger: Ledger) -> RunDir | InUseError | None:
    """The run's directory, held; None if it is gone."""
    record = rundir.read_record(ledger.path / contract.RUN_RECORD) or {}
    if record.get("id") != ledger.run_id:
        return None
    try:
        return RunDir(ledger.path)
    except InUseError as error:
        return error


def _unwanted(ledger: Ledger, holdings: Holdings, name: str) -> Sequence[Asked]:
    """What nobody needs any more."""
    holdings.look()
    strays = holdings.strays()
    if not ledger.open:
        return strays
    if _goes_on(ledger):
        if not strays:
            _say(
                f"{name}: goes on without a controller on {_named(ledger.open)}: the same `muster "
                f"run` takes it over, `muster stop {ledger.path}` ends it"
            )
        return [*holdings.dead(), *strays]
    if ledger.kept:
        _say(f"{name}: kept: {_named(ledger.owned)}; `muster stop {ledger.path}` deletes them")
        return [*holdings.dead(), *strays]
    return ledger.owned


def _goes_on(ledger: Ledger) -> bool:
    """Whether an attempt may still be running on a run's machines, with nobody to look after it.

    Its agents know until when; by themselves they give back what the run does not use any more.
    """
    if standing(ledger.path, time.time()).state != UNATTENDED:
        return False
    newest = rundir.next_attempt(ledger.path) - 1
    record = rundir.attempt_record(ledger.path, newest) if newest >= 0 else {}
    if newest < 0 or record.get("cause"):
        return False
    ids = record.get("backend_ids") or []
    return all(one.state in (ACTIVE, READY) for one in ledger.open if one.name in ids)


def _named(asked: Sequence[Asked]) -> str:
    return ", ".join(f"{one.name} in {one.zone}" for one in asked)


def _say(text: str) -> None:
    print(text, flush=True)
