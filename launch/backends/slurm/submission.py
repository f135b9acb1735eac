"""submission.json: what a job is to run, kept from its submission until it has its nodes."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from launch import contract, rundir
from launch.program import Program, is_secret
from launch.request import Request
from launch.spec import ConfigError, cluster_spec, plain

SUBMISSION = "submission.json"  # What the run's newest job runs.


def write_submission(run: Path, request: Request) -> None:
    """Keep what is to be run, and where, for the job.

    Secrets of the environment are not kept; they travel in the environment of the job.
    """
    cluster = request.cluster
    record = {
        "schema": contract.SCHEMA,
        "cluster": {
            **plain({f.name: getattr(cluster, f.name) for f in dataclasses.fields(cluster)}),
            **{name: dataclasses.asdict(getattr(cluster, name)) for name in _SECTIONS},
            "env": {k: None if is_secret(k) else v for k, v in cluster.env.items()},
        },
        "argv": list(request.program.argv),
        "program_env": dict(request.program.env),
        "config": None if request.config is None else plain(request.config),
        "command": list(request.command),
    }
    rundir.write_private(run / SUBMISSION, record)


_SECTIONS = ("restart", "watch", "slurm")


def read_submission(run: Path, env: Mapping[str, str]) -> Request:
    """What is to be run.

    Args:
      run: the run directory.
      env: of the job, with the secrets.

    Raises:
      ConfigError: there is nothing that could be.
    """
    try:
        record: dict[str, Any] = json.loads((run / SUBMISSION).read_bytes())
    except (OSError, ValueError) as error:
        rule = f"cannot be read ({error}); submit the run again"
        raise ConfigError(str(run / SUBMISSION), rule) from None
    fields = record["cluster"]
    fields["env"] = {
        name: env.get(name, "") if value is None else value for name, value in fields["env"].items()
    }
    return Request(
        cluster=cluster_spec(fields),
        program=Program(tuple(record["argv"]), record["program_env"]),
        workdir=run,
        config=record["config"],
        command=tuple(record["command"]),
        shown=(),
        prefixed=False,
    )
