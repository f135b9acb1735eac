"""What the batch script of a job turns into: the controller of the run, on the first node."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

from launch import contract, live, rundir, submission
from launch.backends.slurm import client, jobs
from launch.backends.slurm.hostlist import expand
from launch.backends.slurm.machines import SlurmMachines
from launch.control import control
from launch.events import Requeue
from launch.ownership import InUseError, RunDir
from launch.request import Request, fits
from launch.restart import Outcome, outcome_of
from launch.spec import ConfigError

_TAKE_SECONDS = 120.0  # How long an earlier start of this job may still hold the run.
_ASK_SECONDS = 30.0  # How long SLURM is asked for its leave to go on.


def main(workdir: str) -> None:
    """Run the gang of this job, as it was submitted; exits with the run's exit code."""
    try:
        code = _run(Path(workdir))
    except ConfigError as error:
        _say(f"muster: error: {error}")
        code = contract.EXIT_CONFIG
    sys.stderr.flush()
    sys.exit(code)


def _run(workdir: Path) -> int:
    job_id = os.environ["SLURM_JOB_ID"]
    request = submission.read_submission(workdir, os.environ)
    run_dir = _take(workdir, request.cluster.lease_seconds)
    _close_abandoned(run_dir, job_id)
    hosts = _choose(request, expand(os.environ["SLURM_JOB_NODELIST"]))
    queued_since = _queued_since(workdir, job_id)
    machines = SlurmMachines(request.cluster, request.program, run_dir, job_id, queued_since)
    controller = control(
        request,
        run_dir,
        machines,
        hosts,
        history=history(workdir, job_id),
        queued=request.cluster.slurm.requeue,
    )
    code = controller.run()
    machines.close()
    displaced = machines.displaced
    run_dir.release()
    if displaced:
        return code  # Whoever took the run over is the one to go on.
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    if array and code != contract.EXIT_RESUMABLE:
        # The rest of the chain has nothing to go on with.
        _ask_until_answered(lambda: client.cancel_pending(array))
    if controller.requeue is not None:
        _requeue(request, job_id, controller.requeue, machines)
    elif machines.taken_away:
        # SLURM would start it again by itself, and there is nothing more to be started.
        _ask_until_answered(lambda: client.cancel(job_id))
    return code


def _take(workdir: Path, lease_seconds: float) -> RunDir:
    """Take the run directory from an earlier start of this job, which may not have ended yet."""
    limit = time.monotonic() + lease_seconds + _TAKE_SECONDS
    before = rundir.last_owner(workdir)
    while True:
        try:
            run_dir = RunDir(workdir)
            break
        except InUseError:
            if time.monotonic() > limit:
                raise
            time.sleep(0.1)
    # Where locks are not seen across machines: whoever writes this file is alive.
    said = live.read(workdir)
    while (
        before is not None
        and said is not None
        and before.get("host") != os.uname().nodename
        and time.time() - said.time < lease_seconds
    ):
        time.sleep(1.0)
        said = live.read(workdir)
    return run_dir


def _close_abandoned(run_dir: RunDir, job_id: str) -> None:
    """Say of an attempt of this job that nobody could bring to an end what became of it."""
    numbers = rundir.attempt_numbers(run_dir.path)
    record = rundir.attempt_record(run_dir.path, numbers[-1]) if numbers else {}
    if record.get("backend_ids", [])[:1] != [job_id]:
        return  # An earlier job's; said so when the next attempt starts.
    host = (record.get("hosts") or [None])[0]
    run_dir.close_abandoned(
        cause="host_lost",
        exit_code=contract.EXIT_FAILED,
        guilty_host=host,
        message=f"host {host}, where the controller ran, was lost, or SLURM ended the job there",
        retry={"again": True, "why": "SLURM has put the job back into the queue"},
    )


def _choose(request: Request, nodes: list[str]) -> tuple[str, ...]:
    """As many of the job's nodes as the config can use."""
    for number in range(min(len(nodes), request.cluster.hosts), 0, -1):
        if fits(request, number):
            return tuple(nodes[:number])
    raise ConfigError("cluster.hosts_min", f"the config cannot use {len(nodes)} hosts", len(nodes))


def _queued_since(workdir: Path, job_id: str) -> str | None:
    """When this start of the job began to wait for its nodes, UTC ISO 8601."""
    numbers = rundir.attempt_numbers(workdir)
    last = rundir.attempt_record(workdir, numbers[-1]) if numbers else {}
    if last.get("backend_ids", [])[:1] == [job_id]:
        return last.get("ended_at")
    asked = jobs.asked_jobs(workdir)
    return asked[-1].asked_at if asked else None


def history(workdir: Path, job_id: str) -> tuple[Outcome, ...]:
    """How the attempts of this job have ended, those of its earlier starts too."""
    records_of = [rundir.attempt_record(workdir, n) for n in rundir.attempt_numbers(workdir)]
    return tuple(
        outcome_of(record)
        for record in records_of
        if record.get("backend_ids", [])[:1] == [job_id] and record.get("cause")
    )


def _requeue(request: Request, job_id: str, action: Requeue, machines: SlurmMachines) -> None:
    """Put this job back into the queue, unless SLURM has done so, or the user has cancelled it."""

    def ask() -> bool:
        job = client.job(job_id)
        if job is None or not job.active:
            return False
        if not machines.taken_away:
            done = client.requeue(job_id)
            if done.exit_code is None or "contact" in done.err:
                raise client.UnavailableError(done.last_word)
            if not done.ok:
                _say(f"muster: job {job_id} cannot be put back into the queue: {done.last_word}")
                return False
            _say(f"muster: job {job_id} is back in the queue")
        least = request.cluster.hosts_min or request.cluster.hosts
        if action.without and client.keep_off(job, action.without, least):
            _say(f"muster: job {job_id} is kept off {', '.join(action.without)}")
        return True

    if _ask_until_answered(ask):
        time.sleep(_ASK_SECONDS)  # SLURM ends this; an end of its own would be taken for the job's.


def _ask_until_answered(ask: Callable[[], object]) -> object:
    """Ask SLURM until it answers, within reason; the answer, or None."""
    limit = time.monotonic() + _ASK_SECONDS
    while True:
        try:
            return ask()
        except client.UnavailableError as error:
            if time.monotonic() > limit:
                _say(f"muster: SLURM gives no answer: {error}")
                return None
            time.sleep(2.0)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
