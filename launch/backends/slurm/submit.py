"""`muster run` on SLURM, on the login node: submit a job, or find the one that is there."""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from launch import attach, contract, rundir, submission
from launch.backends.host_plan import AttemptSpec
from launch.backends.slurm import client, jobs, script, step
from launch.backends.slurm.follow import follow
from launch.backends.slurm.jobs import AskedJob
from launch.backends.slurm.machines import needed_seconds, save_seconds
from launch.control import record_run
from launch.ownership import InUseError, RunDir
from launch.program import Program, is_secret, without_secrets
from launch.request import Request, run_record
from launch.spec import Cluster, ConfigError

_SCRIPT = "job.sh"  # In the run directory; SLURM keeps a copy.
_PATIENCE_SECONDS = 120.0  # How long a slurmctld that gives no answer is waited for.


def run(request: Request, detached: bool) -> int:
    """Submit the run, or find its job, and look on until its end; returns the exit code.

    Args:
      request: what to run.
      detached: give the terminal back once the job is in the queue.
    """
    client.check_installed()
    request = in_container(request)
    try:
        run_dir = RunDir(request.workdir)
    except InUseError as error:
        attach.check_same(request.workdir, run_record(request), error)
        job = jobs.open_job(request.workdir)
        if job is None or job.job_id is None:
            raise  # Another launcher is about to submit it.
        return follow(request.workdir, job.job_id, request.shown, request.prefixed, owns=False)
    with_job, ours = _find_or_submit(request, run_dir)
    run_dir.release()
    if detached:
        where = request.workdir
        print(f"run {run_dir.name} ({run_dir.run_id}) is SLURM job {with_job}")
        print(f"  muster status {where}\n  muster logs {where} --follow\n  muster stop {where}")
        return contract.EXIT_DONE
    return follow(request.workdir, with_job, request.shown, request.prefixed, owns=ours)


def in_container(request: Request) -> Request:
    """With the interpreter of the container, if there is one, for the one that runs this."""
    slurm, argv = request.cluster.slurm, request.program.argv
    if slurm.container is None or argv[0] != sys.executable:
        return request
    program = Program((slurm.container_python, *argv[1:]), request.program.env)
    return Request(**{**vars(request), "program": program})


def _find_or_submit(request: Request, run_dir: RunDir) -> tuple[str, bool]:
    """The id of the run's job, and whether it was submitted now. Holds the run directory."""
    there = _settled(run_dir.path)
    if there is not None:
        in_use = InUseError({"id": run_dir.run_id, "host": "SLURM", "pid": there}, run_dir.path)
        attach.check_same(request.workdir, run_record(request), in_use)
        _say(f"muster: run {run_dir.run_id} is SLURM job {there} already: looking on")
        return there, False
    version = record_run(request, run_dir)
    submission.write_submission(run_dir.path, request)
    asked = jobs.new_job(run_dir.run_id)
    path = run_dir.path / _SCRIPT
    spec = _job_spec(request.cluster, run_dir.path, asked.comment)
    contract.write_atomically(path, script.render(request.cluster, spec), mode=0o600)
    # Written before it is asked for: whatever happens to us now, the job can be found again.
    jobs.write_job(run_dir.path, asked)
    secrets = {name: value for name, value in request.cluster.env.items() if is_secret(name)}
    try:
        asked.job_id = _submit(path, asked, secrets)
    except ConfigError:
        asked.end = "refused"
        raise
    finally:
        jobs.write_job(run_dir.path, asked)
    version.join()
    where = request.cluster.slurm.partition
    _say(
        f"muster: run {run_dir.name} ({run_dir.run_id}) is SLURM job {asked.job_id}"
        + (f" in partition {where}" if where else "")
    )
    return asked.job_id, True


def _job_spec(cluster: Cluster, run: Path, comment: str) -> script.JobSpec:
    newest = rundir.attempt_path(run, max(rundir.next_attempt(run) - 1, 0))
    saved = save_seconds(rundir.progress_path(newest, 0))
    warning = needed_seconds(cluster.slurm.warning_seconds, saved, 0.0)
    return script.JobSpec(run, Path.cwd(), sys.executable, comment, warning)


def _submit(path: Path, asked: AskedJob, env: Mapping[str, str]) -> str:
    """Submit the script; an answer that does not come is waited for, and nothing is submitted
    twice. The job inherits `env`."""
    limit = time.monotonic() + _PATIENCE_SECONDS
    while True:
        try:
            return client.submit(str(path), env)
        except client.UnavailableError as error:
            _say(f"muster: SLURM gives no answer, trying again: {error}")
            while time.monotonic() < limit:
                time.sleep(2.0)
                try:
                    found = client.find_by_comment(asked.comment)
                except client.UnavailableError:
                    continue
                if found is not None:
                    return found
                break  # It answers, and has no such job.
            else:
                rule = f"SLURM gives no answer: {error}; `scontrol ping` says whether it is up"
                raise ConfigError("", rule) from None


def _settled(run: Path) -> str | None:
    """The run's job, if it may still run."""
    try:
        found = jobs.settle(run)
    except client.UnavailableError as error:
        rule = f"there may be a job of this run already, and SLURM gives no answer: {error}"
        raise ConfigError("workdir", f"{rule}; try again later", str(run)) from None
    return found[0].job_id if found else None


def dry_run(request: Request) -> None:
    """Print the batch script, and what one agent of each kind is told."""
    request = in_container(request)
    cluster = request.cluster
    spec = _job_spec(cluster, request.workdir, "muster:RUN:JOB")
    print(script.render(cluster, spec), end="")
    number = rundir.next_attempt(request.workdir)
    hosts = tuple(f"NODE{i}" for i in range(cluster.hosts))
    attempt = AttemptSpec(request.workdir, number, hosts, "NODE0:PORT")
    argv = step.command(cluster, hosts, attempt.path / "door.json", request.workdir)
    print(f"\n# In the job, for attempt {number}: an agent on each node")
    print(shlex.join(argv))
    for plan in step.render(cluster, request.program, attempt):
        for process in plan["processes"]:
            print(f"# process {process['process_id']}/{cluster.num_processes} on {plan['host']}")
            env = without_secrets({**process["env"], **cluster.env})
            words = ["env", *(f"{name}={value}" for name, value in env.items())]
            print(shlex.join([*words, *process["argv"]]))


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
