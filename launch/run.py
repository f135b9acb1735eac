"""`muster run`: check everything, then run the gang, or look on if it runs already."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from launch import attach, detach, registry, rundir
from launch.backends import local
from launch.console import Console
from launch.controller import Backend, Controller
from launch.ownership import InUseError, RunDir
from launch.program import Program, shown_command, trainer_program, without_secrets
from launch.spec import Cluster, ConfigError, cluster_spec, load_config, plain, train_spec
from launch.supervise import Policy, Supervisor

_AFTER_LEASE_SECONDS = 10.0  # How long a killed launcher's gang may take beyond its lease.


@dataclasses.dataclass(frozen=True)
class Request:
    """What the user asked for, checked.

    Attributes:
      cluster: where to run.
      program: what to run.
      workdir: the run directory, absolute.
      config: the trainer's ConfigDict; None for a program of the user's own.
      command: the whole command line, for the record.
      shown: the processes whose lines are shown.
      prefixed: whether lines are marked with their process.
    """

    cluster: Cluster
    program: Program
    workdir: Path
    config: Any
    command: tuple[str, ...]
    shown: tuple[int, ...]
    prefixed: bool


def make_request(argv: Sequence[str], flags: Mapping[str, str], command: Sequence[str]) -> Request:
    """Load the configs and check what can be checked before anything starts.

    Args:
      argv: `--config`, `--cluster` and their overrides, then maybe `--` and a program.
      flags: the other flags that were given: workdir, process.
      command: the whole command line, for the record.

    Raises:
      ConfigError: something in it cannot be.
    """
    from_cluster = load_config("cluster", argv)
    from_config = load_config("config", from_cluster.rest, required=False)
    rest = list(from_config.rest)
    foreign = rest[1:] if rest[:1] == ["--"] else []
    if rest and not foreign:
        what = "-- needs a program behind it" if rest == ["--"] else f"{rest[0]!r} is not expected"
        raise ConfigError("", f"{what}; a program of your own comes last: -- python my_program.py")
    if bool(foreign) == bool(from_config.source):
        both = "not both" if foreign else "one of them is missing"
        raise ConfigError("", f"give either --config=FILE or -- and a program; {both}")
    if not flags.get("workdir"):
        raise ConfigError("", "--workdir is missing; give --workdir=DIR, the run's directory")
    workdir = Path(flags["workdir"]).expanduser().absolute()
    cluster = cluster_spec(from_cluster.config)
    if foreign:
        program = Program(tuple(foreign))
    else:
        _check_config(from_config.config, cluster)
        program = trainer_program(from_config.source, from_config.overrides, workdir, cluster.env)
    shown, prefixed = _shown(flags.get("process"), cluster.num_processes)
    return Request(cluster, program, workdir, from_config.config, tuple(command), shown, prefixed)


def _check_config(config: Any, cluster: Cluster) -> None:
    """Check what the launcher can know of the trainer's config; the trainer checks it all."""
    spec = train_spec(config, cluster.num_devices)
    dcn = spec.mesh.dcn_data * spec.mesh.dcn_fsdp
    if cluster.num_processes % dcn:
        raise ConfigError(
            "config.mesh.dcn_data",
            f"dcn_data * dcn_fsdp = {dcn} parts must be whole processes, and the cluster has "
            f"{cluster.num_processes}; use sizes whose product divides that",
            spec.mesh.dcn_data,
        )


def _shown(process: str | None, num_processes: int) -> tuple[tuple[int, ...], bool]:
    """Which processes' lines to show, and whether they are marked."""
    if process is None:
        return (0,), False
    if process == "all":
        return tuple(range(num_processes)), True
    if not process.isdigit() or int(process) >= num_processes:
        rule = f"must be 'all' or a process from 0 to {num_processes - 1}"
        raise ConfigError("--process", rule, process)
    return (int(process),), False


def dry_run(request: Request) -> None:
    """Print what would be started."""
    if request.config is not None:
        rundir.check_config(request.workdir, request.config)
    number = rundir.next_attempt(request.workdir)
    print(f"# attempt {number} of {request.workdir}; PORT is chosen at the start")
    print(shlex.join(["cd", os.getcwd()]))
    hosts = local.host_names(request.cluster)
    attempt = local.AttemptSpec(request.workdir, number, hosts, "PORT")
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
    run_dir = take(request)
    if run_dir is None:
        return attach.view(request.workdir, request.shown, request.prefixed)
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
    cluster = request.cluster
    record = run_record(request)
    run_dir.write_run(**record, code=None)
    registry.register(run_dir)
    # Aside, because the gang need not wait for git.
    version = threading.Thread(
        target=lambda: run_dir.write_run(**record, code=code_version()), daemon=True
    )

    @contextmanager
    def plans(hosts: Sequence[str], number: int) -> Iterator[list[dict[str, Any]]]:
        with local.reserve_port() as reservation:
            port = reservation.getsockname()[1]
            attempt = local.AttemptSpec(run_dir.path, number, tuple(hosts), port)
            yield local.render(cluster, request.program, attempt)

    supervisor = Supervisor(
        Policy(
            hosts=local.host_names(cluster),
            processes_per_host=cluster.processes_per_host,
            grace_seconds=cluster.grace_seconds,
            restart=cluster.restart,
            watch=cluster.watch,
            hosts_min=cluster.hosts_min,
            fits=lambda hosts: fits(request, hosts),
            reports=request.config is not None,
            furthest_step=rundir.furthest_step(run_dir.path),
            rng=random.Random(),
        )
    )
    console = Console(
        request.shown,
        request.prefixed,
        # The trainer's word on a wrong config is the launcher's last one too.
        held_back=b"error: " if request.config is not None else b"",
    )
    backend = Backend(plans, local.start_agent, cluster.processes_per_host, cluster.lease_seconds)
    version.start()
    try:
        return Controller(run_dir, supervisor, backend, console, started).run()
    finally:
        version.join(timeout=5)
        run_dir.release()


def fits(request: Request, hosts: int) -> bool:
    """Whether the config can be trained by a gang on so many hosts."""
    if request.config is None:
        return True
    try:
        _check_config(request.config, dataclasses.replace(request.cluster, hosts=hosts))
    except ConfigError:
        return False
    return True


def run_record(request: Request) -> dict[str, Any]:
    """What run.json says of how the run was started, as plain JSON."""
    record = {
        "command": shown_command(request.command),
        "program": list(request.program.argv),
        "cwd": os.getcwd(),
        "cluster": _cluster_record(request.cluster),
    }
    return json.loads(json.dumps(record, default=str))


def _cluster_record(cluster: Cluster) -> dict[str, Any]:
    record = plain({f.name: getattr(cluster, f.name) for f in dataclasses.fields(cluster)})
    record["env"] = without_secrets(cluster.env)
    for section in ("restart", "watch"):
        record[section] = dataclasses.asdict(getattr(cluster, section))
    return record


def code_version() -> dict[str, Any] | None:
    """The current directory's git commit, and whether files differ from it; None outside of git."""
    command = ["git", "--no-optional-locks", "status", "--porcelain=v2", "--branch"]
    command += ["--untracked-files=no"]  # Looking for them can take long.
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=5, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    lines = done.stdout.splitlines()
    commits = [line.split()[2] for line in lines if line.startswith("# branch.oid ")]
    if not commits:
        return None
    return {"commit": commits[0], "dirty": any(not line.startswith("#") for line in lines)}
