"""submission.json: what a run is to do, kept for whoever does it when the command has long ended: a
job that waits for its nodes, or another controller."""

from __future__ import annotations

import dataclasses
import json
import pprint
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from launch import contract, rundir
from launch.program import Program, is_secret
from launch.request import Request
from launch.spec import ConfigError, cluster_spec, plain

CONFIG = "submitted_config.py"  # What it trains.
SUBMISSION = "submission.json"


def write_submission(run: Path, request: Request) -> None:
    """Keep what is to be run, and where: who waits in a queue for hours must not run what was
    edited meanwhile.

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
        "argv": _frozen_argv(run, request),
        "program_env": dict(request.program.env),
        "config": None if request.config is None else plain(request.config),
        "command": list(request.command),
        "url": request.url,
    }
    rundir.write_private(run / SUBMISSION, record)


def _frozen_argv(run: Path, request: Request) -> list[str]:
    """The program's command line, with the config as it is now in the place of its file."""
    argv = list(request.program.argv)
    if request.config is None:
        return argv
    source = next(word for word in argv if word.startswith("--config="))
    text = frozen_config(plain(request.config), source.partition("=")[2])
    if text is None:
        return argv
    contract.write_atomically(run / CONFIG, text, mode=0o600)
    kept = [word for word in argv if not word.startswith(("--config=", "--config."))]
    kept.insert(argv.index(source), f"--config={run / CONFIG}")
    return kept


def frozen_config(config: Mapping[str, Any], source: str) -> str | None:
    """A config file that gives these very values; None where they have no such form.

    Args:
      config: plain dicts, tuples, strings, numbers, booleans and None.
      source: the file that they come from, for its reader.
    """
    text = pprint.pformat(config, width=96, sort_dicts=False)
    names = {"inf": float("inf"), "nan": float("nan"), "__builtins__": {}}
    try:
        again = eval(text, names)  # What pprint wrote a line above, of values from this process.
    except Exception:
        return None
    if repr(again) != repr(config):  # Not ==, for nan differs from itself.
        return None
    return _FROZEN.format(source=source.replace("\\", "/").replace('"', "'"), text=text)


_FROZEN = '''"""{source}, with its overrides, as it was when the job was submitted."""

from ml_collections import config_dict

inf, nan = float("inf"), float("nan")


def get_config() -> config_dict.ConfigDict:
    return config_dict.ConfigDict(_VALUES)


_VALUES = {text}
'''

_SECTIONS = ("restart", "watch", "slurm", "tpu")


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
        url=record.get("url"),
    )
