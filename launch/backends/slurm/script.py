"""The batch script of a job, rendered purely from a cluster config and what is to run."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path

from launch import contract
from launch.backends.host_plan import ROOT
from launch.spec import Cluster, ConfigError

_CONTROLLER = (
    "import sys; sys.path.insert(0, sys.argv[1]); "
    "from launch.backends.slurm.allocation import main; main(sys.argv[2])"
)
_MOST_AHEAD_SECONDS = 65535  # SLURM takes no more.
_TICK_SECONDS = 30  # SLURM looks at its clock that often before it warns.


@dataclasses.dataclass(frozen=True)
class JobSpec:
    """A job, as it is to be submitted.

    Attributes:
      run_dir: the run directory, absolute.
      cwd: where the program runs.
      python: the interpreter that becomes the controller, absolute.
      comment: by which the job is found again.
      warning_seconds: before the time limit.
    """

    run_dir: Path
    cwd: Path
    python: str
    comment: str
    warning_seconds: float


def render(
    cluster: Cluster, job: JobSpec, words: Sequence[str] = (), minutes: int | None = None
) -> str:
    """The batch script.

    Args:
      cluster: what to ask for.
      job: what it is for.
      words: a command; the controller's if empty.
      minutes: the time limit; the cluster's if None.

    Raises:
      ConfigError: a value has a form that cannot be told to sbatch.
    """
    lines = ["#!/bin/bash"]
    if minutes is not None:
        slurm = dataclasses.replace(cluster.slurm, time=str(minutes), array=None, dependency=None)
        cluster = dataclasses.replace(cluster, slurm=slurm)
    lines += [_directive(option, why) for option, why in _options(cluster, job)]
    lines += ["", "set -e  # What cannot be set up is not started."]
    lines += [f"module load {shlex.quote(module)}" for module in cluster.slurm.modules]
    lines += cluster.setup
    if words:
        return "\n".join([*lines, f"exec {shlex.join(words)}"]) + "\n"
    words = [job.python, "-c", _CONTROLLER, str(ROOT), str(job.run_dir)]
    lines += [
        "# This shell becomes the controller: SLURM's signals to the batch script reach it.",
        f"exec {shlex.join(words)}",
    ]
    return "\n".join(lines) + "\n"


def _options(cluster: Cluster, job: JobSpec) -> Iterable[tuple[str, str]]:
    """Options of sbatch, and what is to be said of them; "" for what explains itself."""
    slurm = cluster.slurm
    log = str(job.run_dir / contract.CONTROLLER_LOG)
    least = cluster.hosts if cluster.hosts_min is None else cluster.hosts_min
    yield f"--job-name={slurm.job_name or job.run_dir.name}", ""
    yield f"--comment={job.comment}", "by which Muster finds the job again"
    yield f"--chdir={job.cwd}", ""
    yield f"--output={_literal(log)}", ""
    yield "--open-mode=append", "a job that is put back into the queue writes on"
    yield f"--nodes={cluster.hosts if least == cluster.hosts else f'{least}-{cluster.hosts}'}", ""
    yield "--ntasks-per-node=1", "one agent, which starts the node's processes"
    if slurm.cpus_per_process is not None:
        yield f"--cpus-per-task={slurm.cpus_per_process * cluster.processes_per_host}", ""
    if slurm.gpus_per_node is not None:
        kind = f"{slurm.gpu_type}:" if slurm.gpu_type else ""
        why = "not --gpus-per-task, which would hide the peers' GPUs"
        yield f"--gpus-per-node={kind}{slurm.gpus_per_node}", why
    for name in ("gres", "mem", "partition", "account", "qos", "time", "constraint"):
        value = getattr(slurm, name)
        if value is not None:
            yield f"--{name}={value}", ""
    for name in ("reservation", "nodelist", "exclude", "array"):
        value = getattr(slurm, name)
        if value is not None:
            yield f"--{name}={value}", ""
    if slurm.dependency is not None:
        yield f"--dependency={slurm.dependency}", ""
        yield "--kill-on-invalid-dep=yes", "not pending for ever"
    if slurm.exclusive:
        yield "--exclusive", ""
    yield "--requeue" if slurm.requeue else "--no-requeue", ""
    ahead = min(max(1, round(job.warning_seconds)) + _TICK_SECONDS, _MOST_AHEAD_SECONDS)
    yield f"--signal=B:USR2@{ahead}", "SLURM's own warning; not USR1, which NCCL uses"
    for directive in slurm.directives:
        yield directive, ""


def _directive(option: str, why: str) -> str:
    name, equals, value = option.partition("=")
    if not value.isprintable():
        raise ConfigError(name, "must be one line of printable characters", value)
    text = f"{name}{equals}{_quoted(value)}" if equals else name
    line = f"#SBATCH {text}"
    return f"{line}  # {why}" if why else line


def _quoted(value: str) -> str:
    """A value as sbatch reads it in a script: a backslash takes the next character as it is."""
    plain = value and all(c.isalnum() or c in "-_./:=,@%+[]" for c in value)
    if plain:
        return value
    return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _literal(path: str) -> str:
    """A file name that SLURM is not to fill in: one with a backslash it leaves alone, but for the
    backslashes."""
    return path.replace("\\", "\\\\") if "\\" in path else path.replace("%", "%%")
