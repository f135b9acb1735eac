"""`muster run` on TPUs: machines, attempts on them, other machines where those are taken away, and
in the end none."""

from __future__ import annotations

import dataclasses
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from launch import contract, live, rundir, stop
from launch.backends.tpu import gcloud
from launch.backends.tpu.acquire import Acquisition
from launch.backends.tpu.gcloud import GcloudError
from launch.backends.tpu.ledger import Ledger
from launch.backends.tpu.machines import Lease, TpuMachines
from launch.backends.tpu.prepare import LostError, UnreachedError
from launch.backends.tpu.published import Publisher
from launch.backends.tpu.remote import remote_program, storage_of
from launch.contract import utc
from launch.control import control, record_run
from launch.ownership import RunDir
from launch.request import Request
from launch.restart import PREEMPTIONS, Outcome, outcome_of
from launch.signals import Signals
from launch.spec import Cluster, ConfigError
from launch.submission import read_submission, write_submission
from launch.times import duration

_LOOK_SECONDS = 0.2  # Between two looks for a request to stop, while machines are waited for.


class _StoppedError(Exception):
    """The user wants the run to end."""


class _GivenUpError(Exception):
    """The budget of restarts is spent."""


def run(request: Request, run_dir: RunDir, on_started: Callable[[], None]) -> int:
    """Be the controller of a run on TPUs; returns the run's exit code.

    Args:
      request: what to run.
      run_dir: held by this process.
      on_started: called once, when the gang has started or machines are being waited for.
    """
    version = record_run(request, run_dir)
    write_submission(run_dir.path, request)
    try:
        return _Run(request, run_dir, on_started, end=False).run()
    finally:
        version.join()


def end(path: Path) -> None:
    """Stop what a run without a controller has left running, and give its machines back.

    Args:
      path: the run directory.
    """
    gcloud.check_installed()
    run_dir = RunDir(path)
    try:
        # Its secrets are with its processes; nothing is started here.
        request = read_submission(path, os.environ)
        _Run(request, run_dir, lambda: None, end=True).run()
    finally:
        run_dir.release()


class _Run:
    def __init__(
        self, request: Request, run_dir: RunDir, on_started: Callable[[], None], end: bool
    ):
        self._request = request
        self._run_dir = run_dir
        self._on_started = on_started
        self._end = end
        self._ledger = Ledger(run_dir.path, run_dir.run_id)
        self._ledger.url = request.url
        self._signals = Signals()
        self._requests = stop.StopRequests(run_dir.path)
        if not self._ledger.open:
            self._ledger.created_at = utc(time.time())  # Its lifetime begins.
        self._acquisition = Acquisition(
            request.cluster, run_dir, ledger=self._ledger, say=_say, pause=self._pause
        )
        self._history: list[Outcome] = []
        self._losses = 0  # Of machines, before an attempt began on them.
        self._look_due = self._live_due = 0.0
        self._folder = Path()

    def run(self) -> int:
        """See the run through."""
        publisher = self._publisher()
        try:
            with tempfile.TemporaryDirectory(dir=self._run_dir.path, prefix=".code-") as folder:
                self._folder = Path(folder)
                with self._signals.caught(TpuMachines.signals):
                    return self._attempts()
        finally:
            live.clear(self._run_dir.path)
            if publisher:
                publisher.close()

    def _publisher(self) -> Publisher | None:
        """What keeps the records on gs://, if the run is there."""
        if self._request.url is None:
            return None
        publisher = Publisher(self._request.url, self._run_dir.path, _say)
        self._ledger.on_intent = publisher.publish
        return publisher

    def _attempts(self) -> int:
        displaced = False
        self._ledger.cause = None
        try:
            while True:
                try:
                    found = self._find_machines()
                except LostError as error:
                    self._count_loss(error)
                    continue
                lease, cluster = found
                machines = self._machines(cluster, lease)
                code, again = self._control(cluster, lease, machines)
                displaced = machines.displaced
                if displaced or again is None:
                    return code
                if time.time() > lease.deadline - cluster.grace_seconds:
                    self._ledger.cause = "time_limit"
                    _say("muster: not tried again: the lifetime of the run's machines is over; "
                         "start the same command again for another one")  # fmt: skip
                    return contract.EXIT_RESUMABLE
                self._wait(again)
        except _StoppedError:
            self._ledger.cause = "stopped"
            _say("muster: stopped; start the same command again to go on")
            return contract.EXIT_RESUMABLE
        except _GivenUpError as error:
            self._ledger.cause = "preempted"
            _say(f"muster: {error}")
            return contract.EXIT_RESUMABLE
        except ConfigError:
            self._ledger.cause = "config"
            raise
        except GcloudError as error:
            self._ledger.cause = "config"
            raise ConfigError("", f"Google Cloud refuses it: {error}") from None
        finally:
            if not displaced:  # Else whoever took the run over is the one to go on.
                self._release()

    def _find_machines(self) -> tuple[Lease, Cluster]:
        if not self._end:
            try:
                return self._acquisition.lease(self._folder)
            except ConfigError as error:
                if not self._history:
                    raise
                # It was right once: a spent quota, say. The run is as good as it was.
                raise _GivenUpError(str(error)) from None
        try:
            found = self._acquisition.left_running(self._folder)
        except LostError:
            found = None
        if found is None:
            raise _StoppedError
        return found

    def _control(
        self, cluster: Cluster, lease: Lease, machines: TpuMachines
    ) -> tuple[int, float | None]:
        """Run attempts on these machines; the exit code, and the wait until there are to be others
        (None if not)."""
        names = tuple(prepared.host.name for prepared in lease.hosts)
        before = rundir.next_attempt(self._run_dir.path) - (lease.adopts is not None)
        controller = control(
            dataclasses.replace(self._request, cluster=cluster),
            self._run_dir,
            machines,
            names,
            on_started=self._on_started,
            history=tuple(self._history),
            requests=self._requests,
            stops_at_once=self._end,
            queued=True,
            mends_machines=True,
        )
        try:
            code = controller.run()
        finally:
            machines.close()
        self._on_started = lambda: None
        for number in range(before, rundir.next_attempt(self._run_dir.path)):
            record = rundir.attempt_record(self._run_dir.path, number)
            if record.get("cause"):
                self._history.append(outcome_of(record))
        if controller.requeue is None:
            return code, None
        return code, controller.requeue.delay_seconds

    def _count_loss(self, error: LostError) -> None:
        """Machines were lost before an attempt began on them: wait, or give up."""
        _say(f"muster: {error}")
        restart = self._request.cluster.restart
        preempted = sum(outcome.verdict.cause in PREEMPTIONS for outcome in self._history)
        spent, budget = preempted + self._losses, restart.max_preemptions
        self._losses += 1
        if spent >= budget:
            raise _GivenUpError(
                f"given up: interruption {spent + 1}, and restart.max_preemptions is {budget}"
            )
        if isinstance(error, UnreachedError):
            # Whatever is wrong with them: others may be better.
            self._acquisition.fleet.delete(self._ledger.owned)
        doubled = restart.backoff_seconds * 2.0 ** min(self._losses - 1, 30)
        self._wait(min(restart.max_backoff_seconds, doubled))

    def _release(self) -> None:
        """Give the machines back, at the end."""
        self._write_live(live.RELEASING)
        ledger = self._ledger
        if self._request.cluster.tpu.keep and ledger.owned and not self._end:
            ledger.kept = True
            ledger.write()
            names = ", ".join(one.name for one in ledger.owned)
            _say(f"muster: kept, and to be paid for: {names}; `muster gc` deletes them no sooner "
                 f"than you say `muster stop {self._run_dir.path}`")  # fmt: skip
            return
        self._acquisition.fleet.release()

    def _machines(self, cluster: Cluster, lease: Lease) -> TpuMachines:
        storage = storage_of(self._request, self._run_dir.run_id)
        program, files = remote_program(self._request, storage)
        return TpuMachines(
            cluster,
            program,
            files=files,
            storage=storage,
            run_dir=self._run_dir,
            lease=lease,
            say=_say,
        )

    # ------------------------------------------------------------------ waiting

    def _wait(self, seconds: float) -> None:
        if seconds > 0:
            _say(f"muster: again in {duration(seconds)}")
            self._pause(seconds)

    def _pause(self, seconds: float) -> None:
        """Wait, or just look; whoever started this in the background need not.

        Raises:
          _StoppedError: the run is to end.
        """
        self._on_started()
        self._on_started = lambda: None
        limit = time.monotonic() + seconds
        while True:
            self._look_for_stop()
            left = limit - time.monotonic()
            if left <= 0:
                return
            time.sleep(min(_LOOK_SECONDS, left))

    def _look_for_stop(self) -> None:
        now = time.monotonic()
        if now >= self._live_due:
            self._live_due = now + live.EVERY_SECONDS
            self._write_live(live.ACQUIRING)
        if self._signals.take():
            raise _StoppedError
        if now >= self._look_due:
            self._look_due = now + _LOOK_SECONDS
            if self._requests.poll():
                raise _StoppedError

    def _write_live(self, state: str) -> None:
        live.write(self._run_dir.path, max(0, rundir.next_attempt(self._run_dir.path) - 1), state)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
