"""`muster run`: check everything, then start one attempt and see it through."""

from __future__ import annotations

import dataclasses
import os
import shlex
import subprocess
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from launch import contract, rundir
from launch.backends import local
from launch.console import Console, explain_failure
from launch.gang import Gang, guilty_log
from launch.program import Program, trainer_program, without_secrets
from launch.spec import Cluster, ConfigError, cluster_spec, load_config, plain, train_spec
from launch.supervise import Supervisor, Verdict


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
    for plan in local.render(request.cluster, request.program, request.workdir, number, "PORT"):
        for process in plan["processes"]:
            num_processes = request.cluster.num_processes
            print(f"# process {process['process_id']}/{num_processes} on {plan['host']}")
            print(f"# log: {process['log']}")
            env = without_secrets(process["env"])
            words = ["env", *(f"{name}={value}" for name, value in env.items())]
            print(shlex.join([*words, *process["argv"]]))


def run(request: Request) -> int:
    """Run the gang; returns the exit code of `muster run`."""
    run_dir = rundir.RunDir(request.workdir)
    if request.config is not None:
        rundir.check_config(request.workdir, request.config)
    record = {
        "command": list(request.command),
        "program": list(request.program.argv),
        "cwd": os.getcwd(),
        "cluster": _cluster_record(request.cluster),
        "code": None,
    }
    run_dir.write_run(**record)
    attempt = run_dir.new_attempt(local.host_names(request.cluster))
    console = Console(
        attempt.path,
        request.cluster.num_processes,
        request.shown,
        request.prefixed,
        # The trainer's word on a wrong config is the launcher's last one too.
        held_back=b"error: " if request.config is not None else b"",
    )
    hosts = local.process_hosts(request.cluster)
    supervisor = Supervisor(hosts, request.cluster.grace_seconds)
    console.say(
        f"muster: run {run_dir.name} ({run_dir.run_id}), attempt {attempt.number}: {len(hosts)} "
        f"process{'es' * (len(hosts) > 1)}, {request.cluster.num_devices} devices; logs in "
        f"{attempt.path}"
    )
    # Aside, because the gang need not wait for git.
    version = threading.Thread(
        target=lambda: run_dir.write_run(**{**record, "code": code_version()}), daemon=True
    )
    with local.reserve_port() as reservation:
        port = reservation.getsockname()[1]
        plans = local.render(request.cluster, request.program, run_dir.path, attempt.number, port)
        version.start()
        verdict = Gang(supervisor, console).run(plans, attempt.path, run_dir.lock_fd)
    attempt.close(verdict.cause, verdict.message, verdict.guilty_process, verdict.guilty_host)
    version.join(timeout=5)
    run_dir.release()
    if verdict.exit_code != contract.EXIT_CONFIG:
        console.show_held()
    console.say(_last_words(verdict, attempt.path))
    return verdict.exit_code


def _last_words(verdict: Verdict, attempt: Path) -> str:
    """What the user is told at the end."""
    log = guilty_log(attempt, verdict)
    if log is not None:
        config_error = verdict.exit_code == contract.EXIT_CONFIG
        return explain_failure(verdict.message, log, config_error)
    return f"muster: {verdict.cause}" + (f": {verdict.message}" if verdict.message else "")


def _cluster_record(cluster: Cluster) -> dict[str, Any]:
    record = plain({f.name: getattr(cluster, f.name) for f in dataclasses.fields(cluster)})
    record["env"] = without_secrets(cluster.env)
    record["restart"] = dataclasses.asdict(cluster.restart)
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
