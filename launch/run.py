"""`muster run`: check everything, then run the gang, or look on if it runs already."""

from __future__ import annotations

import os
import shlex
import sys
import time
from collections.abc import Callable

from launch import attach, detach, rundir
from launch.backends import local
from launch.backends.host_plan import AttemptSpec
from launch.control import control, record_run
from launch.ownership import InUseError, RunDir
from launch.program import without_secrets
from launch.request import Request, run_record

_AFTER_LEASE_SECONDS = 10.0  # How long a killed launcher's gang may take beyond its lease.


def dry_run(request: Request) -> None:
    """Print what would be started."""
    if request.config is not None:
        rundir.check_config(request.workdir, request.config)
    if request.cluster.backend == "slurm":
        from launch.backends.slurm import submit

        submit.dry_run(request)
        return
    if request.cluster.backend == "tpu":
        from launch.backends.tpu import remote
        from launch.plan import gate

        remote.check(request)
        if told := gate.foretell(request):
            print(f"# plan: {told}")
        remote.dry_run(request)
        return
    number = rundir.next_attempt(request.workdir)
    print(f"# attempt {number} of {request.workdir}; PORT is chosen at the start")
    print(shlex.join(["cd", os.getcwd()]))
    hosts = local.host_names(request.cluster)
    attempt = AttemptSpec(request.workdir, number, hosts, "127.0.0.1:PORT")
    for plan in local.render(request.cluster, request.program, attempt):
        for process in plan["processes"]:
            num_processes = request.cluster.num_processes
            print(f"# process {process['process_id']}/{num_processes} on {plan['host']}")
            print(f"# log: {process['log']}")
            env = without_secrets(process["env"])
            words = ["env", *(f"{name}={value}" for name, value in env.items())]
            print(shlex.join([*words, *process["argv"]]))


def run(request: Request, detached: bool = False) -> int:
    """Run the gang, attempt after attempt; returns the exit code of `muster run`.

    Args:
      request: what to run.
      detached: give the terminal back as soon as the gang has started.
    """
    if request.config is not None:
        rundir.check_config(request.workdir, request.config)
    if request.cluster.backend == "slurm":
        from launch.backends.slurm import submit

        return submit.run(request, detached)
    plan = None
    if request.cluster.backend == "tpu":
        from launch.backends.tpu import remote
        from launch.plan import gate

        remote.check(request)
        plan = gate.check(request)  # Before anything is asked of Google Cloud.
        request = remote.with_project(request)
        if request.url is not None:
            from launch.backends.tpu import published

            published.take(request.url)
    run_dir = take(request)
    if run_dir is None:
        return attach.view(request.workdir, request.shown, request.prefixed)
    if plan is not None:
        from launch.plan import planner

        planner.save(plan, run_dir.path)
    if detached:
        return detach.run(run_dir, lambda started: _control(request, run_dir, started))
    return _control(request, run_dir, lambda: None)


def take(request: Request) -> RunDir | None:
    """Take the run directory; None when a launcher of the same run has it.

    Raises:
      ConfigError: what has it is another run, or it cannot be used.
    """
    limit = time.monotonic() + request.cluster.lease_seconds + _AFTER_LEASE_SECONDS
    told = False
    while True:
        try:
            return RunDir(request.workdir)
        except InUseError as error:
            if not error.abandoned:
                attach.check_same(request.workdir, run_record(request), error)
                return None
            if time.monotonic() > limit:
                raise
            if not told:
                told = True
                print(
                    "muster: the launcher of this run was killed; waiting until its processes "
                    "are stopped",
                    file=sys.stderr,
                )
            time.sleep(0.1)


def _control(request: Request, run_dir: RunDir, started: Callable[[], None]) -> int:
    """Be the controller of a run."""
    if request.cluster.backend == "tpu":
        from launch.backends.tpu import run as tpu

        try:
            return tpu.run(request, run_dir, started)
        finally:
            run_dir.release()
    version = record_run(request, run_dir)
    backend = local.LocalBackend(request.cluster, request.program, run_dir)
    hosts = local.host_names(request.cluster)
    try:
        return control(request, run_dir, backend, hosts, on_started=started).run()
    finally:
        version.join()
        run_dir.release()
