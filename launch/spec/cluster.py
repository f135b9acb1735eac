"""Where to train: a cluster config as frozen dataclasses. Pure, and free of jax."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from launch.errors import ConfigError, closest
from launch.spec.fields import build, plain, require
from launch.spec.policies import RestartPolicy, WatchPolicy
from launch.spec.slurm import SlurmSpec
from launch.spec.tpu import TpuSpec
from launch.topology import Accelerator, accelerator

BACKENDS = ("local", "slurm", "tpu")
MIN_LEASE_SECONDS = 3.0  # Leases are renewed about once a second, on a machine that may be busy.
MIN_LOG_BYTES = 1 << 16

# The launcher fills these in for every process; a config that set them would tear the gang apart.
RESERVED_ENV_PREFIXES = (
    *("MUSTER_", "OMPI_", "JAX_COORDINATOR_", "JAX_LOCAL_DEVICE_IDS", "MEGASCALE_"),
)


@dataclasses.dataclass(frozen=True)
class Cluster:
    """A whole cluster config.

    Attributes:
      backend: who starts the hosts' agents; `local` starts them on this machine.
      hosts: machines; for `local`, agent processes on this one.
      processes_per_host: members of the gang on each host.
      devices_per_process: JAX devices of each; for `local`, CPU devices.
      accelerator: TPU accelerator type, which implies the three above where they are not said.
      slices: groups of TPU chips joined by DCN.
      env: environment variables of every process, over the launcher's own; values are strings.
      setup: shell commands to run on each host before the program.
      grace_seconds: between asking the processes to stop (SIGTERM) and killing them, when a user
        stops the run; long enough for a checkpoint.
      restart: see RestartPolicy.
      watch: see WatchPolicy.
      hosts_min: the fewest hosts that a further attempt may have after hosts were lost; None for
        all of them.
      lease_seconds: how long a host's processes outlive a launcher that is not heard of.
      max_log_bytes: the most that is kept of one process's output: its beginning and its end.
      slurm, tpu: settings of those backends.
    """

    backend: str
    hosts: int = 1
    processes_per_host: int = 1
    devices_per_process: int = 1
    accelerator: str | None = None
    slices: int = 1
    env: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    setup: tuple[str, ...] = ()
    grace_seconds: float = 60.0
    restart: RestartPolicy = dataclasses.field(default_factory=RestartPolicy)
    watch: WatchPolicy = dataclasses.field(default_factory=WatchPolicy)
    hosts_min: int | None = None
    lease_seconds: float = 15.0
    max_log_bytes: int = 64 << 20
    slurm: SlurmSpec = dataclasses.field(default_factory=SlurmSpec)
    tpu: TpuSpec = dataclasses.field(default_factory=TpuSpec)

    def __post_init__(self) -> None:
        if self.backend not in BACKENDS:
            raise ConfigError("backend", closest(self.backend, BACKENDS), self.backend)
        for name in ("hosts", "processes_per_host", "devices_per_process", "slices"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "must be at least 1")
        require(self.grace_seconds >= 0, "grace_seconds", self.grace_seconds, "must be 0 or more")
        at_least = f"must be at least {MIN_LEASE_SECONDS:g}"
        require(
            self.lease_seconds >= MIN_LEASE_SECONDS, "lease_seconds", self.lease_seconds, at_least
        )
        at_least = f"must be at least {MIN_LOG_BYTES}"
        require(self.max_log_bytes >= MIN_LOG_BYTES, "max_log_bytes", self.max_log_bytes, at_least)
        require(
            self.hosts_min is None or 1 <= self.hosts_min <= self.hosts,
            "hosts_min",
            self.hosts_min,
            f"must be from 1 to hosts={self.hosts}, or None for all of them",
        )
        self._check_env()
        self._check_unused()
        if self.backend == "slurm":
            self._check_gpus()
            most = self.restart.max_preemptions
            require(
                self.slurm.requeue or most == 0,
                "slurm.requeue",
                self.slurm.requeue,
                f"restart.max_preemptions={most} needs it; set that to 0, or this to True",
            )
        if self.backend == "tpu":
            self._check_tpu()

    def _check_env(self) -> None:
        for name, value in self.env.items():
            if not isinstance(value, str):
                raise ConfigError(
                    f"env.{name}", f"must be a string; write {str(value)!r} with quotes", value
                )
            require(
                bool(name) and not set("=\0") & set(name) and "\0" not in value,
                f"env.{name}",
                value,
                "is not something an environment can hold",
            )
            require(
                not name.startswith(RESERVED_ENV_PREFIXES),
                f"env.{name}",
                value,
                "is filled in for each process by the launcher; take it out",
            )

    def _check_unused(self) -> None:
        """Refuse what the backend would have to ignore."""
        here = f"means nothing on backend '{self.backend}'; "
        if self.backend != "tpu":
            value = self.accelerator
            require(value is None, "accelerator", value, here + "set it to None")
            require(self.slices == 1, "slices", self.slices, here + "set it to 1")
        for name, defaults in (("slurm", _SLURM_DEFAULTS), ("tpu", _TPU_DEFAULTS)):
            section = vars(getattr(self, name))
            said = {k: v for k, v in section.items() if v != getattr(defaults, k)}
            unused = not said or name == self.backend
            require(unused, name, said, here + "take the section out")
        if self.backend != "local":
            return
        require(
            not self.setup,
            "setup",
            self.setup,
            "not there yet on backend 'local'; run the commands before `muster run`",
        )

    def _check_tpu(self) -> None:
        slice_ = self.slice
        chips, devices = slice_.chips * self.slices, self.num_devices
        require(
            devices == chips or self.on_cpu,
            "hosts" if chips % self.hosts else "devices_per_process",
            self.hosts if chips % self.hosts else self.devices_per_process,
            f"hosts * processes_per_host * devices_per_process = {self.hosts} * "
            f"{self.processes_per_host} * {self.devices_per_process} = {devices} must be the "
            f"{chips} chips of {self.slices} × {self.accelerator}; leave these fields out",
        )
        rule = "must be 1: a process of JAX's has all chips of its TPU VM"
        one = self.processes_per_host == 1 or self.on_cpu
        require(one, "processes_per_host", self.processes_per_host, rule)
        rule = f"must be as many on each of slices={self.slices}"
        require(self.hosts % self.slices == 0, "hosts", self.hosts, rule)
        rule = "must be None: a TPU slice cannot do without some of its hosts"
        require(self.hosts_min is None, "hosts_min", self.hosts_min, rule)
        nodes = self.tpu.nodes
        rule = f"must be as many as slices={self.slices}"
        require(not nodes or len(nodes) == self.slices, "tpu.nodes", nodes, rule)
        rule = "names no zone; give those to be tried: ('us-west4-a',)"
        require(bool(self.tpu.zones), "tpu.zones", self.tpu.zones, rule)
        rule = f"must be one: where tpu.nodes={nodes} are"
        require(not nodes or len(self.tpu.zones) == 1, "tpu.zones", self.tpu.zones, rule)

    @property
    def slice(self) -> Accelerator:
        """What one slice of a TPU cluster is."""
        if self.accelerator is None:
            rule = "is missing; give the accelerator type of a slice: v5litepod-16"
            raise ConfigError("accelerator", rule)
        return accelerator(self.accelerator, "accelerator")

    @property
    def on_cpu(self) -> bool:
        """Whether the processes are told to use the machines' CPUs."""
        return self.env.get("JAX_PLATFORMS") == "cpu"

    def _check_gpus(self) -> None:
        gpus, per_host = self.slurm.gpus, self.processes_per_host * self.devices_per_process
        require(
            gpus is None or gpus == per_host,
            "slurm.gpus_per_node" if self.slurm.gpus_per_node else "slurm.gres",
            gpus,
            f"must be processes_per_host * devices_per_process = {self.processes_per_host} * "
            f"{self.devices_per_process} = {per_host}, so that no GPU is left out",
        )

    @property
    def num_processes(self) -> int:
        """Members of the gang."""
        return self.hosts * self.processes_per_host

    @property
    def num_devices(self) -> int:
        """JAX devices over all processes."""
        return self.num_processes * self.devices_per_process


_SLURM_DEFAULTS = SlurmSpec()
_TPU_DEFAULTS = TpuSpec()


def cluster_spec(config: Any) -> Cluster:
    """A ConfigDict as a Cluster.

    Raises:
      ConfigError: with fields named as on the command line, `cluster.hosts`.
    """
    return build(Cluster, _with_shape(plain(config)), "cluster")


def _with_shape(values: Any) -> Any:
    """With what the accelerator type implies, where it is not said."""
    if not isinstance(values, dict) or values.get("backend") != "tpu":
        return values
    name, slices = values.get("accelerator"), values.get("slices", 1)
    if not isinstance(name, str) or not isinstance(slices, int):
        return values
    slice_ = accelerator(name)
    hosts = values.get("hosts", slice_.hosts * slices)
    implied: dict[str, Any] = {"hosts": hosts}
    each = hosts * values.get("processes_per_host", 1) if isinstance(hosts, int) else 0
    if each and slice_.chips * slices % each == 0:
        implied["devices_per_process"] = slice_.chips * slices // each
    return {**implied, **values}
