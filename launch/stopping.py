"""`muster stop`: ask for the end of a run, and tell what happens until then."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from pathlib import Path

from launch import contract, live, registry, rundir, stop
from launch.backends.slurm import client, jobs
from launch.backends.tpu import ledger, published
from launch.spec import ConfigError
from launch.standing import QUEUED, SILENT, UNATTENDED, Standing, standing
from launch.times import ago, duration, rough

_POLL_SECONDS = 0.2
# What a stop may take beside grace period and lease: writing records, a busy machine.
_MARGIN_SECONDS = 30.0
_CANCEL_SECONDS = 60.0  # SLURM kills what does not end by itself; KillWait is 30 s by default.


def ask_to_stop(name: str, flags: Mapping[str, str]) -> int:
    """`muster stop`: ask, and tell what happens until the run has ended; returns the exit code."""
    del flags  # It has none.
    run = registry.find(name)
    before = standing(run)
    if before.state == QUEUED:
        return _cancel(run)
    if published.elsewhere(run):
        owner = before.owner or {}
        rule = f"is looked after by process id {owner.get('pid')} on host {owner.get('host')}"
        raise ConfigError("", f"{name} {rule}; stop it there")
    if before.state == UNATTENDED or (not before.running and _kept(run)):
        return _end_unattended(run)
    if not before.running:
        _say(_was_not_running(run, before))
        return contract.EXIT_DONE
    waiting = _Waiting(run, before)
    try:
        return waiting.wait()
    except KeyboardInterrupt:
        _say("muster: not waiting any more; " + waiting.what_goes_on())
        return contract.EXIT_FAILED


def _kept(run: Path) -> bool:
    found = ledger.read(run)
    return found is not None and bool(found.owned)


def _end_unattended(run: Path) -> int:
    """Look after a run that has lost its controller: have it saved, and give its machines back."""
    from launch.backends.tpu.run import end

    _say(f"muster: nobody looks after {run.name}; ending it and giving its machines back")
    end(run)
    now = standing(run)
    _say(_has_ended(run, now))
    return contract.EXIT_FAILED if _kept(run) else contract.EXIT_DONE


def _cancel(run: Path) -> int:
    """Cancel the run's SLURM job, and wait until it is over; returns the exit code."""
    try:
        found = jobs.settle(run)
        if found is None:
            _say(_has_ended(run, standing(run)))
            return contract.EXIT_DONE
        job_id = found[0].job_id
        assert job_id is not None
        stop.request(run, rundir.last_owner(run) or {})  # It says that its end was wanted.
        client.cancel(job_id)
        _say(f"muster: cancelled SLURM job {job_id}")
        limit = time.monotonic() + _CANCEL_SECONDS
        while time.monotonic() < limit:
            if jobs.settle(run) is None:
                _say(_has_ended(run, standing(run)))
                return contract.EXIT_DONE
            time.sleep(_POLL_SECONDS)
    except client.UnavailableError as error:
        _say(f"muster: error: SLURM gives no answer: {error}; try again later")
        return contract.EXIT_FAILED
    _say(f"muster: error: job {job_id} is still not over; `scontrol show job {job_id}` says why")
    return contract.EXIT_FAILED


class _Waiting:
    """One `muster stop`, from the request to the end of the run."""

    def __init__(self, run: Path, before: Standing):
        assert before.owner is not None
        self._run = run
        self._owner = before.owner
        self._who = f"process id {before.owner.get('pid')} on {before.owner.get('host')}"
        cluster = (rundir.read_record(run / contract.RUN_RECORD) or {}).get("cluster") or {}
        self._lease_seconds = float(cluster.get("lease_seconds", 15.0))
        self._grace_seconds = float(cluster.get("grace_seconds", 60.0))
        self._asked: stop.StopRequest | None = None
        self._told: set[str] = set()
        self._reacted = False
        # Nobody is there to hear it when the launcher is dead.
        if not before.orphaned:
            self._asked = stop.request(run, before.owner)

    def wait(self) -> int:
        """Wait for the run's end; returns the exit code."""
        self._tell_start()
        limit = self._lease_seconds + _MARGIN_SECONDS
        if self._asked is None or self._asked.count == 1:
            limit += self._grace_seconds
        give_up_at = time.monotonic() + limit
        while time.monotonic() < give_up_at:
            now = standing(self._run)
            if not now.running:
                _say(_has_ended(self._run, now))
                return contract.EXIT_DONE
            if now.owner and self._owner and now.owner != self._owner:
                _say("muster: it has ended; meanwhile somebody started it again")
                return contract.EXIT_DONE
            self._tell_change(now)
            time.sleep(_POLL_SECONDS)
        if jobs.open_job(self._run) is not None:
            _say(f"muster: it still runs after {duration(limit)}")
            return _cancel(self._run)
        _say(f"muster: error: it still runs after {duration(limit)}; {self._how_to_go_on()}")
        return contract.EXIT_FAILED

    def what_goes_on(self) -> str:
        """What happens when nobody waits."""
        if self._asked is None:
            return "the agents stop the gang by themselves"
        return "the request stands, and the run goes on stopping"

    def _tell_start(self) -> None:
        name = self._run.name
        if self._asked is None:
            self._told_orphaned()
        elif self._asked.count == 1:
            _say(
                f"muster: asked {name} ({self._who}) to stop, with up to "
                f"{duration(self._grace_seconds)} of grace; `muster stop` again kills it at once"
            )
        else:
            _say(f"muster: asked {name} ({self._who}) again to stop: it is killed at once")

    def _told_orphaned(self) -> None:
        self._tell(
            f"muster: the launcher ({self._who}) is dead; its agents stop the gang by themselves "
            f"within {duration(self._lease_seconds)} and the grace period"
        )

    def _tell_change(self, now: Standing) -> None:
        if now.orphaned:
            self._told_orphaned()
        elif now.live and now.live.state == live.STOPPING:
            self._reacted = True
            count = len(now.live.processes)
            self._tell(f"muster: stopping; {count} process{'es' * (count != 1)} still there")

    def _tell(self, text: str) -> None:
        if text not in self._told:
            self._told.add(text)
            _say(text)

    def _how_to_go_on(self) -> str:
        host, pid = self._owner.get("host"), self._owner.get("pid")
        if self._asked is None:
            return f"look for its agents on its hosts, and at the logs in {self._run}"
        if self._reacted:
            return "`muster stop` again kills it at once"
        return (
            f"its launcher does not react; on {host}, `kill -9 {pid}` ends it, and its agents then "
            f"stop the gang within the lease of {duration(self._lease_seconds)}"
        )


def _was_not_running(run: Path, now: Standing) -> str:
    if now.state == SILENT:
        holder = rundir.last_owner(run) or {}
        silence = time.time() - (now.heard_at or 0.0)
        return (
            f"muster: {run.name} was not heard of for {rough(silence)}; if it "
            f"still runs, it does so on host {holder.get('host')}: ask there"
        )
    if now.last is None:
        return f"muster: {run.name} was not running: it has no attempt yet"
    return f"muster: {run.name} was not running: ended {_how(now)}"


def _has_ended(run: Path, now: Standing) -> str:
    return f"muster: {run.name} has ended {_how(now)}"


def _how(now: Standing) -> str:
    """`3 min ago with cause stopped: MESSAGE`."""
    last = now.last or {}
    when = ago(now.ended_at, time.time())
    message = last.get("message") if last.get("cause") == now.state else ""
    words = [when] if when else []
    return " ".join([*words, f"with cause {now.state}"]) + (f": {message}" if message else "")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
