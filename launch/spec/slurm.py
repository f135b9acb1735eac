"""The section `slurm` of a cluster config: what is asked of SLURM."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable

from launch.errors import ConfigError, closest
from launch.spec.fields import require

CONTAINERS = ("pyxis", "apptainer")

# `minutes`, `minutes:seconds`, `hours:minutes:seconds`, `days-hours[:minutes[:seconds]]`.
_TIME = re.compile(r"\d+|\d+:\d\d|\d+:\d\d:\d\d|\d+-\d+(:\d\d){0,2}")
_MEMORY = re.compile(r"\d+[KMGT]?")
_CHAIN = re.compile(r".+%1")
_GPUS = re.compile(r"gpu(?::[^:,]+)?:(\d+)(?:\([^)]*\))?")
_OPTION = re.compile(r"--[a-z][a-z-]*(=.*)?", re.DOTALL)
# What Muster itself says to sbatch, or what would take the job out of its hands.
_OURS = (
    *("array", "chdir", "comment", "dependency", "error", "export", "input", "job-name"),
    *("nodes", "ntasks", "ntasks-per-node", "open-mode", "output", "parsable", "requeue"),
    *("no-requeue", "signal", "test-only", "time", "wait", "wrap"),
)


@dataclasses.dataclass(frozen=True)
class SlurmSpec:
    """What is asked of SLURM. What is None is not said, so that the site's default holds.

    Attributes:
      partition, account, qos, constraint, reservation, nodelist, exclude: as sbatch takes them.
      time: the limit of one job, as sbatch takes it: minutes, `HH:MM:SS` or `D-HH:MM:SS`.
      gpus_per_node: how many; must be processes_per_host * devices_per_process.
      gpu_type: which, with gpus_per_node.
      gres: generic resources of each node, where the site wants GPUs asked for so (`gpu:a100:4`).
      cpus_per_process: CPUs of each process; a node gets processes_per_host times as many.
      mem: memory of each node, as sbatch takes it (`64G`; `0` for all).
      exclusive: no other job on the nodes.
      requeue: whether SLURM may, and Muster does, put the job back into the queue.
      warning_seconds: how long before the time limit the gang is asked to save and leave, at the
        least; more where the last save took long.
      job_name: the run's name if None.
      array: jobs one after the other, each going on where the one before stopped: `0-9%1`.
      dependency: as sbatch takes it (`singleton`).
      directives: further options of sbatch, verbatim: `--mail-type=END`.
      modules: environment modules that are loaded first.
      container: image in which the processes run; None for none.
      container_runtime: `pyxis` (srun --container-image) or `apptainer`.
      container_mounts: `SOURCE:TARGET`, beside what Muster needs.
      container_python: the interpreter in the image.
    """

    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    time: str | None = None
    gpus_per_node: int | None = None
    gpu_type: str | None = None
    gres: str | None = None
    cpus_per_process: int | None = None
    mem: str | None = None
    constraint: str | None = None
    reservation: str | None = None
    nodelist: str | None = None
    exclude: str | None = None
    exclusive: bool = False
    requeue: bool = True
    warning_seconds: float = 120.0
    job_name: str | None = None
    array: str | None = None
    dependency: str | None = None
    directives: tuple[str, ...] = ()
    modules: tuple[str, ...] = ()
    container: str | None = None
    container_runtime: str = "pyxis"
    container_mounts: tuple[str, ...] = ()
    container_python: str = "python3"

    def __post_init__(self) -> None:
        for name, value in self._texts():
            require(bool(value), name, value, "is empty; leave it out or set it to None")
            require(value.isprintable(), name, value, "must be one line of printable characters")
        if self.time is not None:
            rule = "must be minutes, HH:MM:SS or D-HH:MM:SS"
            require(bool(_TIME.fullmatch(self.time)), "time", self.time, rule)
        if self.mem is not None:
            rule = "must be a number with K, M, G or T behind it"
            require(bool(_MEMORY.fullmatch(self.mem)), "mem", self.mem, rule)
        for name in ("gpus_per_node", "cpus_per_process"):
            value = getattr(self, name)
            require(value is None or value >= 1, name, value, "must be at least 1, or None")
        require(
            self.warning_seconds > 0, "warning_seconds", self.warning_seconds, "must be above 0"
        )
        if self.array is not None:
            rule = "must end in %1: two jobs must not train one run at the same time"
            require(bool(_CHAIN.fullmatch(self.array)), "array", self.array, rule)
        require(
            self.gpu_type is None or self.gpus_per_node is not None,
            "gpu_type",
            self.gpu_type,
            "needs gpus_per_node",
        )
        require(
            self.gpus_per_node is None or self._gres_gpus is None,
            "gres",
            self.gres,
            f"asks for GPUs, and so does gpus_per_node={self.gpus_per_node}; use one of them",
        )
        if self.container_runtime not in CONTAINERS:
            rule = closest(self.container_runtime, CONTAINERS)
            raise ConfigError("container_runtime", rule, self.container_runtime)
        self._check_directives()

    def _texts(self) -> Iterable[tuple[str, str]]:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            for text in value if isinstance(value, tuple) else (value,):
                if isinstance(text, str):
                    yield field.name, text

    def _check_directives(self) -> None:
        for directive in self.directives:
            rule = "must be a long option of sbatch, with = before its value: --mail-type=END"
            require(bool(_OPTION.fullmatch(directive)), "directives", directive, rule)
            name = directive[2:].partition("=")[0]
            known = {field.name.replace("_", "-") for field in dataclasses.fields(self)}
            if name in known or name in _OURS:
                own = f"has a field of its own: slurm.{name.replace('-', '_')}"
                rule = own if name in known else "is Muster's own to say"
                raise ConfigError("directives", rule, directive)

    @property
    def _gres_gpus(self) -> int | None:
        found = [_GPUS.fullmatch(item) for item in (self.gres or "").split(",")]
        counts = [int(match.group(1)) for match in found if match]
        return sum(counts) if counts else None

    @property
    def gpus(self) -> int | None:
        """GPUs asked for on each node; None for a cluster of CPUs."""
        return self.gpus_per_node if self.gpus_per_node is not None else self._gres_gpus

    @property
    def time_limit_seconds(self) -> int | None:
        """The limit of one job; None where the site's default holds."""
        return None if self.time is None else seconds_of_limit(self.time)


def seconds_of_limit(text: str) -> int | None:
    """A time limit as SLURM writes and takes it, in seconds; None for no limit."""
    if not _TIME.fullmatch(text):
        return None
    days, dash, clock = text.rpartition("-")
    parts = [int(part) for part in clock.split(":")]
    if dash:  # days-hours[:minutes[:seconds]]
        parts += [0] * (3 - len(parts))
    elif len(parts) == 1:  # minutes
        parts = [0, *parts, 0]
    elif len(parts) == 2:  # minutes:seconds
        parts = [0, *parts]
    hours, minutes, seconds = parts
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds
