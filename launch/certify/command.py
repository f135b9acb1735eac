"""`muster certify`: is a run that was interrupted the same run? Tries it, and writes it down."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence

from launch import contract
from launch.certify import interruptions, topologies
from launch.certify.certification import Certification, NoReference, Options
from launch.certify.fleet import InterruptedByUser
from launch.ownership import RunDir
from launch.request import Request, make_request
from launch.spec import ConfigError

_STEPS = 12


def certify(arguments: Sequence[str], flags: Mapping[str, str], words: Sequence[str]) -> int:
    """Certify a config.

    Args:
      arguments: `--config`, `--cluster` and their overrides.
      flags: the other flags that were given.
      words: the whole command line, for the record.

    Returns:
      EXIT_DONE if it is certified, EXIT_FAILED if not, EXIT_RESUMABLE if it was stopped.

    Raises:
      ConfigError: something in it cannot be.
    """
    request = make_request(arguments, {"workdir": flags.get("workdir", "")}, words)
    if request.config is None:
        raise ConfigError("", "muster certify takes --config=FILE: it cannot look into a program")
    if request.cluster.backend == "tpu":
        rule = "certify reads what all processes write in --workdir, and TPU VMs share no file "
        rule += "system with this machine; certify the config on a cluster of 'local' or 'slurm'"
        raise ConfigError("cluster.backend", rule, "tpu")
    steps = _number(flags, "steps", _STEPS, least=8)
    names = interruptions.parse(flags.get("interruptions"))
    evaluates = bool(request.config.get("eval", {}).get("every_steps"))
    pace = interruptions.pace(steps, evaluates, len(names))
    others = topologies.others(
        topologies.parse(flags.get("topologies")), request.sources, request.config, request.cluster
    )
    if not names and not others:
        raise ConfigError("--interruptions", "with no topology there is nothing to certify", "none")
    options = Options(
        seed=_number(flags, "seed", 0, least=0),
        parallel=_number(flags, "parallel", _parallel(request), least=1),
        keep="keep" in flags,
        as_json="json" in flags,
        words=tuple(words),
    )
    request.workdir.mkdir(mode=0o700, parents=True, exist_ok=True)
    held = RunDir(request.workdir / "certify")
    try:
        one = Certification(request, pace=pace, names=names, others=others, options=options)
        one.clean()
        return one.run()
    except InterruptedByUser:
        print("muster certify: stopped; nothing is left running", file=sys.stderr)
        return contract.EXIT_RESUMABLE
    except NoReference as error:
        print(f"muster: error: {error}", file=sys.stderr)
        return contract.EXIT_FAILED
    finally:
        held.release()


def _number(flags: Mapping[str, str], name: str, default: int, least: int) -> int:
    text = flags.get(name)
    if text is None:
        return default
    if not text.isdigit() or int(text) < least:
        raise ConfigError(f"--{name}", f"must be a whole number of at least {least}", text)
    return int(text)


def _parallel(request: Request) -> int:
    """How many runs at a time this machine bears; elsewhere the machines are not ours to share."""
    if request.cluster.backend != "local":
        return 1
    cores = len(os.sched_getaffinity(0))
    return max(1, min(4, cores // (2 * request.cluster.num_processes)))
