"""What the user asks of `muster run`, checked before anything starts."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from launch import command as commands
from launch.program import Program, shown_command, trainer_program, without_secrets
from launch.spec import (
    Cluster,
    ConfigError,
    LoadedConfig,
    add_override,
    cluster_spec,
    load_config,
    plain,
    train_spec,
)


@dataclasses.dataclass(frozen=True)
class Request:
    """What the user asked for, checked.

    Attributes:
      cluster: where to run.
      program: what to run.
      workdir: the run directory, absolute; of one on gs://, where its records are here.
      config: the trainer's ConfigDict; None for a program of the user's own.
      command: the whole command line, for the record.
      shown: the processes whose lines are shown.
      prefixed: whether lines are marked with their process.
      url: the run directory as it was given, if it is on gs://.
      sources: the words that name the configs and override their fields.
      skip_plan: whether it is to be started without a plan.
    """

    cluster: Cluster
    program: Program
    workdir: Path
    config: Any
    command: tuple[str, ...]
    shown: tuple[int, ...]
    prefixed: bool
    url: str | None = None
    sources: tuple[str, ...] = ()
    skip_plan: bool = False


def make_request(argv: Sequence[str], flags: Mapping[str, str], command: Sequence[str]) -> Request:
    """Load the configs and check what can be checked before anything starts.

    Args:
      argv: `--config`, `--cluster` and their overrides, then maybe `--` and a program.
      flags: the other flags that were given: workdir, process, skip_plan.
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
    cluster = cluster_spec(from_cluster.config)
    url = flags["workdir"].rstrip("/") if flags["workdir"].startswith("gs:") else None
    if url is None:
        workdir = Path(flags["workdir"]).expanduser().absolute()
    else:
        workdir = _check_url(url, cluster)
    if foreign:
        program = Program(tuple(foreign))
    else:
        from_config = _with_init_from(from_config)
        check_config(from_config.config, cluster)
        program = trainer_program(from_config.source, from_config.overrides, workdir, cluster.env)
    shown, prefixed = _shown(flags.get("process"), cluster.num_processes)
    return Request(
        cluster=cluster,
        program=program,
        workdir=workdir,
        config=from_config.config,
        command=tuple(command),
        shown=shown,
        prefixed=prefixed,
        url=url,
        sources=(*from_config.words("config"), *from_cluster.words("cluster")),
        skip_plan="skip_plan" in flags,
    )


def _with_init_from(loaded: LoadedConfig) -> LoadedConfig:
    """A run's name in `config.init_from` as its directory: the processes know no names.

    Raises:
      ConfigError: there is no such run.
    """
    source = loaded.config.get("init_from", "")
    if not isinstance(source, str) or not source or source.startswith("gs://"):
        return loaded
    from launch import registry

    run, at, step = source.rpartition("@")
    if not at or not step.isdigit():
        run, at, step = source, "", ""
    path = Path(run).expanduser().absolute()
    if not path.exists():
        try:
            path = registry.find(run)
        except ConfigError as error:
            raise ConfigError("config.init_from", error.rule, source) from None
    return add_override(loaded, f"--config.init_from={path}{at}{step}")


def _check_url(url: str, cluster: Cluster) -> Path:
    """Where the records of a run on gs:// are here."""
    if cluster.backend != "tpu":
        rule = f"is for backend 'tpu', and the cluster's is {cluster.backend!r}; give a directory"
        raise ConfigError("--workdir", rule, url)
    if cluster.tpu.storage is not None:
        rule = f"is where the run keeps all, and so would --workdir={url}; set it to None"
        raise ConfigError("cluster.tpu.storage", rule, cluster.tpu.storage)
    if not re.fullmatch(r"gs://[a-z0-9][\w.-]+/.+", url):
        raise ConfigError("--workdir", "must be gs://BUCKET/PATH or a directory", url)
    from launch.backends.tpu.published import place

    return place(url)


def check_config(config: Any, cluster: Cluster) -> None:
    """Check what the launcher can know of the trainer's config; the trainer checks it all."""
    spec = train_spec(config, cluster.num_devices)
    dcn = spec.mesh.dcn_data * spec.mesh.dcn_fsdp
    if cluster.slices > 1 and dcn != cluster.slices and not cluster.on_cpu:
        raise ConfigError(
            "config.mesh.dcn_data",
            f"dcn_data * dcn_fsdp = {dcn} must be cluster.slices={cluster.slices}, so that only "
            "these axes go over the slower network between slices",
            spec.mesh.dcn_data,
        )
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


def fits(request: Request, hosts: int) -> bool:
    """Whether the config can be trained by a gang on so many hosts."""
    if request.config is None:
        return True
    try:
        check_config(request.config, dataclasses.replace(request.cluster, hosts=hosts))
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
    for section in ("restart", "watch", "slurm", "tpu"):
        record[section] = dataclasses.asdict(getattr(cluster, section))
    return record


def code_version() -> dict[str, Any] | None:
    """The current directory's git commit, and whether files differ from it; None outside of git."""
    argv = ["git", "--no-optional-locks", "status", "--porcelain=v2", "--branch"]
    argv += ["--untracked-files=no"]  # Looking for them can take long.
    lines = commands.run(argv, timeout_seconds=5).out.splitlines()
    commits = [line.split()[2] for line in lines if line.startswith("# branch.oid ")]
    if not commits:
        return None
    return {"commit": commits[0], "dirty": any(not line.startswith("#") for line in lines)}
