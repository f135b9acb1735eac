"""Looking on at a SLURM job from the login node: its place in the queue, its lines, its end."""

from __future__ import annotations

import dataclasses
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from launch import attach, contract, rundir, stop
from launch.backends.slurm import jobs
from launch.backends.slurm.client import Job, UnavailableError
from launch.backends.slurm.job_watch import JobWatch
from launch.console import Console, last_lines
from launch.times import duration

_POLL_SECONDS = 0.1
_ASK_SECONDS = 3.0
_SILENT_SECONDS = 30.0  # So long SLURM may give no answer before it is said.
_SETTLE_SECONDS = 10.0  # How long files may take to be seen here.
_SHOWN_LINES = 10  # Of what the job itself has printed.


def follow(workdir: Path, job_id: str, shown: Sequence[int], prefixed: bool, *, owns: bool) -> int:
    """Show a job's run until its end; returns its exit code.

    Args:
      workdir: the run directory.
      job_id: SLURM's.
      shown: the processes whose lines are shown.
      prefixed: whether lines are marked with their process.
      owns: whether Ctrl-C stops the run, or only the looking on.
    """
    watch = JobWatch(job_id, _ASK_SECONDS)
    try:
        return _Follower(workdir, job_id, Console(shown, prefixed), watch, owns).run()
    finally:
        watch.close()


class _Left(Exception):
    """The terminal is gone, or the user has had enough."""


@dataclasses.dataclass
class _Follower:
    run_dir: Path
    job_id: str
    console: Console
    watch: JobWatch
    owns: bool
    told: str = ""
    interrupts: int = 0
    first_attempt: int = 0

    def run(self) -> int:
        end = (
            "Ctrl-C stops the run, closing the terminal does not"
            if self.owns
            else "Ctrl-C leaves it running"
        )
        with self._signals():
            try:
                self.say(f"muster: following job {self.job_id}; {end}")
                self.first_attempt = self._first()
                return self._run()
            except _Left:
                self.say(
                    f"muster: job {self.job_id} goes on; `muster stop {self.run_dir}` stops it"
                )
                return contract.EXIT_RESUMABLE

    def _first(self) -> int:
        """The first attempt of this job that there is, or will be."""
        numbers = rundir.attempt_numbers(self.run_dir)
        ours = [n for n in numbers if self._is_ours(rundir.attempt_record(self.run_dir, n))]
        return max(ours, default=max(numbers, default=-1) + 1)

    def _is_ours(self, record: Mapping[str, Any]) -> bool:
        return self.job_id in record.get("backend_ids", ())

    def _run(self) -> int:
        number = self.first_attempt
        record: Mapping[str, Any] = {}
        while self._wait_for(number):
            record = self._show(number)
            path = rundir.attempt_path(self.run_dir, number)
            if record.get("cause"):
                attach.tell_end(record, path)
            if not self._goes_on_after(record):
                break
            number += 1
        self._wait_for_end()
        if record.get("cause") and not (record.get("retry") or {}).get("again"):
            # Of an array, what the last of its jobs has said.
            return int(record.get("exit_code", contract.EXIT_FAILED))
        return self._tell_job()

    def _goes_on_after(self, record: Mapping[str, Any]) -> bool:
        """Whether another attempt may follow, of this job or of the next one of its array."""
        if not record.get("cause"):
            return False
        resumable = record.get("exit_code") == contract.EXIT_RESUMABLE
        chained = resumable and record["cause"] != "stopped" and len(record["backend_ids"]) > 1
        return chained or bool((record.get("retry") or {}).get("again"))

    def _wait_for(self, number: int) -> bool:
        """Wait for an attempt; False when there will be none."""
        seen_over_at: float | None = None
        while number not in rundir.attempt_numbers(self.run_dir):
            self._pass()
            if self.watch.over:
                # Another machine's files are seen here a little later.
                seen_over_at = seen_over_at or time.monotonic()
                if time.monotonic() > seen_over_at + _SETTLE_SECONDS / 5:
                    return number in rundir.attempt_numbers(self.run_dir)
        return True

    def _show(self, number: int) -> dict[str, Any]:
        """Show an attempt to its end; its record."""
        path = rundir.attempt_path(self.run_dir, number)
        following = False
        over_at: float | None = None
        while True:
            if self.watch.over:
                over_at = over_at or time.monotonic()
            gone = over_at is not None and time.monotonic() > over_at + _SETTLE_SECONDS / 5
            record = rundir.read_record(path / rundir.ATTEMPT_RECORD) or {}
            if record and not following:
                following = True
                hosts = record.get("hosts", [])
                self.say(
                    f"muster: attempt {number}: {record.get('num_processes')} processes on "
                    f"{', '.join(hosts[:4])}{' ...' if len(hosts) > 4 else ''}; logs in {path}"
                )
                self.console.follow(path, record.get("num_processes", 0))
            ended = bool(record.get("cause")) or gone
            self.console.show_new(last=ended)
            if ended:
                return record
            self._pass()

    def _wait_for_end(self) -> None:
        """Until the job is over for SLURM too, within reason."""
        limit = time.monotonic() + _SETTLE_SECONDS
        while not self.watch.over and time.monotonic() < limit:
            self.watch.look_again()
            time.sleep(_POLL_SECONDS)

    def _pass(self) -> None:
        time.sleep(_POLL_SECONDS)
        while self.interrupts:
            self.interrupts -= 1
            self._stop()
        silent_since = self.watch.silent_since
        if silent_since is not None and time.monotonic() > silent_since + _SILENT_SECONDS:
            self._tell("muster: SLURM gives no answer; the job goes on all the same")
        elif self.watch.job is not None and self.watch.job.state == "PENDING":
            self._tell("muster: " + pending(self.watch.job, time.time()))

    def _stop(self) -> None:
        """Ctrl-C."""
        owner = rundir.owner(self.run_dir)
        if owner is None:
            self.say(f"muster: cancelling job {self.job_id}")
            with suppress(UnavailableError):
                jobs.cancel(self.run_dir, self.job_id)
        else:
            asked = stop.request(self.run_dir, owner)
            more = "; once more to kill it at once" if asked.count == 1 else " at once"
            self.say(f"muster: asked the run to stop{more}")

    def _tell_job(self) -> int:
        """What became of a job whose attempt says nothing of it; the exit code."""
        job = self.watch.job
        state = "unknown to SLURM" if job is None else job.state
        if state == "CANCELLED":
            self.say(f"muster: stopped: job {self.job_id} was cancelled")
            return contract.EXIT_RESUMABLE
        reason = f" ({job.reason})" if job and job.reason else ""
        self.say(f"muster: error: job {self.job_id} has ended: {state}{reason}")
        if job and job.reason == "JobLaunchFailure":
            self.say(
                f"muster: the nodes must see {self.run_dir} and the program; `muster doctor "
                f"--cluster=... --workdir={self.run_dir}` tries them"
            )
        log = self.run_dir / contract.CONTROLLER_LOG
        lines = last_lines(log, _SHOWN_LINES)
        if lines:
            self.say("\n".join(["muster: last lines of the job:", *(f"    {x}" for x in lines)]))
            self.say(f"muster: full log: {log}")
        code = job.exit_code if job else contract.EXIT_FAILED
        known = (contract.EXIT_CONFIG, contract.EXIT_RESUMABLE)
        return code if code in known else contract.EXIT_FAILED

    def _tell(self, text: str) -> None:
        if text != self.told:
            self.told = text
            self.say(text)

    def say(self, text: str) -> None:
        """Say something on standard error."""
        print(text, file=sys.stderr, flush=True)

    @contextmanager
    def _signals(self) -> Iterator[None]:
        def interrupt(*_: object) -> None:
            if not self.owns:
                raise _Left
            self.interrupts += 1

        def leave(*_: object) -> None:
            raise _Left

        before = {signal.SIGINT: signal.signal(signal.SIGINT, interrupt)}
        for number in (signal.SIGTERM, signal.SIGHUP):
            before[number] = signal.signal(number, leave)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def pending(job: Job, now: float) -> str:
    """A pending job in words."""
    text = f"job {job.id} is pending: {job.why_pending}"
    if job.start_at is not None and job.start_at > now:
        # SLURM's guess moves by seconds; told so it moves less.
        text += f"; expected to start in {duration(max(60.0, (job.start_at - now) // 60 * 60))}"
    return text
