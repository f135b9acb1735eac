"""What to train: the trainer's config as frozen dataclasses. Pure, and free of jax.

The launcher checks it before anything starts, and the trainer works from the same object.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from launch.errors import ConfigError, closest
from launch.spec.fields import build, require
from launch.spec.restore import RestoreSpec

BATCH_AXES = ("data", "fsdp")  # The mesh axes over which a batch's examples are split.
AXES = ("data", "fsdp", "tensor")


@dataclasses.dataclass(frozen=True)
class MeshSpec:
    """Degrees of parallelism. One of `data`, `fsdp`, `tensor` may be -1: what is left over.

    `data`, `fsdp` and `tensor` count devices within a slice (ICI); `dcn_data` and `dcn_fsdp`
    count slices (DCN). The mesh's `data` axis has `dcn_data * data` devices, and so for `fsdp`.
    """

    data: int = -1
    fsdp: int = 1
    tensor: int = 1
    dcn_data: int = 1
    dcn_fsdp: int = 1

    def __post_init__(self) -> None:
        for name in AXES:
            value = getattr(self, name)
            require(
                value == -1 or value >= 1, name, value, "must be at least 1, or -1 for the rest"
            )
        for name in ("dcn_data", "dcn_fsdp"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "must be at least 1")
        free = [name for name in AXES if getattr(self, name) == -1]
        if len(free) > 1:
            raise ConfigError(free[1], f"only one size may be -1, and {free[0]} is already", -1)

    def resolve(self, num_devices: int) -> MeshSpec:
        """Replace -1 by what `num_devices` leaves.

        Raises:
          ConfigError: the sizes do not multiply out to `num_devices`; the text has the numbers.
        """
        sizes = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        fixed = math.prod(size for size in sizes.values() if size != -1)
        free = [name for name in AXES if sizes[name] == -1]
        shown = " * ".join(f"{name}={size}" for name, size in sizes.items() if size not in (1, -1))
        if free:
            if num_devices % fixed:
                raise ConfigError(
                    f"mesh.{free[0]}",
                    f"nothing fits: {shown} = {fixed} does not divide the {num_devices} devices "
                    f"(hosts * processes_per_host * devices_per_process); choose sizes whose "
                    f"product divides {num_devices}",
                    -1,
                )
            return dataclasses.replace(self, **{free[0]: num_devices // fixed})
        if fixed != num_devices:
            raise ConfigError(
                "mesh",
                f"{shown or '1'} = {fixed} devices, but the cluster has {num_devices}; change a "
                "size, or set one of data, fsdp, tensor to -1",
            )
        return self

    @property
    def batch_shards(self) -> int:
        """Into how many parts a resolved mesh splits the examples of a batch."""
        return self.dcn_data * self.data * self.dcn_fsdp * self.fsdp


@dataclasses.dataclass(frozen=True)
class ShardingSpec:
    """How arrays are laid over the mesh.

    Attributes:
      rules: pairs (logical axis name, mesh axis name or None) that come before the built-in
        table of `trainer.sharding`.
      optimizer_axes: mesh axes that split the optimizer's state besides those of its params; with
        `data` it is what ZeRO-1 does.
      max_replicated_bytes: bytes per device of state that may be replicated or under-sharded
        before the run is refused; None for no limit.
    """

    rules: tuple[Any, ...] = ()
    optimizer_axes: tuple[str, ...] = ()
    max_replicated_bytes: int | None = None

    def __post_init__(self) -> None:
        for axis in self.optimizer_axes:
            require(axis in AXES, "optimizer_axes", self.optimizer_axes, closest(axis, AXES))


@dataclasses.dataclass(frozen=True)
class CheckpointSpec:
    """When to save and what to keep. 0 turns a rule off; the final step is always saved.

    `every_seconds` is decided by the lead process at logging steps. The newest `keep_last` steps
    stay, and every step that `keep_every_steps` divides.

    `local_dir` is a directory on every host's own storage, `/dev/shm/muster` say; `{host}` in it
    is the host's name. Steps are saved there every `local_every_steps`, and, also where that is 0,
    when a stop leaves too little time for a shared checkpoint. "" turns it off.
    """

    every_steps: int = 0
    every_seconds: float = 0.0
    keep_last: int = 2
    keep_every_steps: int = 0
    local_dir: str = ""
    local_every_steps: int = 0

    def __post_init__(self) -> None:
        for name in ("every_steps", "every_seconds", "keep_every_steps", "local_every_steps"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "must be 0 (off) or more")
        require(self.keep_last >= 1, "keep_last", self.keep_last, "must be at least 1")
        rest = self.local_dir.replace("{host}", "")
        require(
            not self.local_dir or (self.local_dir.startswith("/") and not set("{}") & set(rest)),
            "local_dir",
            self.local_dir,
            'must be an absolute path on the hosts\' own storage, in which only "{host}" is filled '
            'in; "" turns it off',
        )
        require(
            bool(self.local_dir) or not self.local_every_steps,
            "local_every_steps",
            self.local_every_steps,
            "needs checkpoint.local_dir, a directory on every host's own storage; set it, or this "
            "to 0",
        )


@dataclasses.dataclass(frozen=True)
class EvalSpec:
    """Evaluate `num_batches` held-out global batches every `every_steps`; 0 turns it off.

    `params` says with whose params: `params` (the trained ones), `ema`, `schedule_free` or
    `lookahead`, where the optimizer keeps these.
    """

    every_steps: int = 0
    num_batches: int = 8
    params: str = "params"

    def __post_init__(self) -> None:
        require(self.every_steps >= 0, "every_steps", self.every_steps, "must be 0 (off) or more")
        require(self.num_batches >= 1, "num_batches", self.num_batches, "must be at least 1")
        known = ("params", "ema", "schedule_free", "lookahead")
        require(self.params in known, "params", self.params, closest(self.params, known))


@dataclasses.dataclass(frozen=True)
class TrainSpec:
    """A whole training config.

    Attributes:
      task: `package.module:Class`, a `trainer.task.Task`.
      num_steps: optimizer updates in all.
      global_batch_size: examples per update over all processes.
      num_microbatches: parts of a batch whose gradients are accumulated in one update.
      seed: of initialization, dropout and the order of the data.
      log_every_steps: between lines of progress and metrics.
      check_replicas_every_steps: between comparisons of what several devices hold copies of; 0
        for never.
      model, data: the task's own sections, checked by the task.
      optimizer: `chain` of Optax names and one section of arguments per name.
      compilation_cache: directory of JAX's persistent compile cache; "" for none.
      init_from: `RUN[@STEP]`, another run's directory or one of checkpoints: a new run starts at
        step 0 with its params, and everything else fresh; "" for a fresh start.
      restore: what a resume takes from a checkpoint, and which changes it accepts.
    """

    task: str
    num_steps: int
    global_batch_size: int
    num_microbatches: int = 1
    seed: int = 0
    log_every_steps: int = 10
    check_replicas_every_steps: int = 500
    model: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    data: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    optimizer: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    mesh: MeshSpec = MeshSpec()
    sharding: ShardingSpec = ShardingSpec()
    checkpoint: CheckpointSpec = CheckpointSpec()
    eval: EvalSpec = EvalSpec()
    compilation_cache: str = "~/.cache/muster/xla"
    init_from: str = ""
    restore: RestoreSpec = dataclasses.field(default_factory=RestoreSpec)

    def __post_init__(self) -> None:
        for name in ("num_steps", "global_batch_size", "num_microbatches", "log_every_steps"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "must be at least 1")
        every = self.check_replicas_every_steps
        require(every >= 0, "check_replicas_every_steps", every, "must be 0 (never) or more")
        require(
            self.task.count(":") == 1, "task", self.task, "must be written package.module:Class"
        )

    def resolve(self, num_devices: int) -> TrainSpec:
        """Fix what depends on the number of devices, and check that it all multiplies out."""
        mesh = self.mesh.resolve(num_devices)
        parts = mesh.batch_shards * self.num_microbatches
        if self.global_batch_size % parts:
            below = self.global_batch_size // parts * parts
            raise ConfigError(
                "global_batch_size",
                f"must be a multiple of {parts} (data {mesh.dcn_data * mesh.data} * fsdp "
                f"{mesh.dcn_fsdp * mesh.fsdp} * num_microbatches {self.num_microbatches}); use "
                + (f"{below} or {below + parts}" if below else f"{parts}"),
                self.global_batch_size,
            )
        return dataclasses.replace(self, mesh=mesh)


def train_spec(config: Any, num_devices: int | None = None) -> TrainSpec:
    """A ConfigDict as a TrainSpec, resolved for `num_devices` where that is known.

    Raises:
      ConfigError: with fields named as on the command line, `config.mesh.fsdp`.
    """
    spec = build(TrainSpec, config, "config")
    if num_devices is None:
        return spec
    try:
        return spec.resolve(num_devices)
    except ConfigError as error:
        raise error.below("config") from None
