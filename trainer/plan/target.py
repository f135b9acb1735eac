"""The devices that a plan is for: a topology as the compiler knows it, or CPU devices instead."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
from collections.abc import Mapping
from typing import Any

from launch.errors import ConfigError
from launch.spec import Cluster
from launch.topology import CHIPS, Chip
from trainer import xla_flags

# libtpu refuses more than one process that has loaded it, unless told; it logs to /tmp; and away
# from Google's network it says at length that it is not there.
_ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "JAX_ENABLE_COMPILATION_CACHE": "false",  # It keeps no dump of what it did not compile.
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_LOG_DIR": "disabled",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
}


def environment() -> dict[str, str]:
    """What a planning process has to have in its environment before it imports jax."""
    return dict(_ENVIRONMENT)


@dataclasses.dataclass(frozen=True)
class Target:
    """What a step is compiled for.

    Attributes:
      name: for people.
      platform: `tpu`, `gpu` or `cpu`: what the cluster has.
      devices: JAX devices in their order; of the topology, or CPU devices that stand for it.
      hosts: of each device, the number of its host.
      chip: figures of a device; None where they are not known.
      simulated: whether CPU devices stand for others.
    """

    name: str
    platform: str
    devices: list[Any]
    hosts: tuple[int, ...]
    chip: Chip | None
    simulated: bool

    @property
    def slices(self) -> tuple[int, ...]:
        """Of each device, its slice."""
        return tuple(getattr(device, "slice_index", 0) for device in self.devices)


def make_target(cluster: Cluster) -> Target:
    """The devices of a cluster.

    Raises:
      ConfigError: there is no libtpu, or it does not know the topology.
    """
    if cluster.backend == "tpu" and not cluster.on_cpu:
        return _tpu(cluster)
    return _simulated(cluster)


def _tpu(cluster: Cluster) -> Target:
    if importlib.util.find_spec("libtpu") is None:
        raise ConfigError(
            "",
            "to plan for TPUs the compiler is needed, and the package libtpu is not installed: "
            "pip install 'jax[tpu]' (no TPU is needed)",
        )
    from jax.experimental import topologies

    slice_ = cluster.slice
    # Devices as JAX shows them on the machines; libtpu's defaults differ.
    options: dict[str, Any] = {"v4": {"chip_config_name": "megacore"}}.get(slice_.generation, {})
    if slice_.chips == 1:
        options["chips_per_host_bounds"] = (1, 1, 1)
    if cluster.slices > 1:
        options["num_slices"] = cluster.slices
    try:
        topology = topologies.get_topology_desc(
            platform="tpu", topology_name=slice_.topology, **options
        )
    except Exception as error:  # Whatever libtpu makes of it; it has no class of its own.
        reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise ConfigError(
            "cluster.accelerator",
            f"the compiler here does not know the topology {slice_.topology}: {reason}",
            cluster.accelerator,
        ) from error
    devices = list(topology.devices)
    if len(devices) != cluster.num_devices:
        raise ConfigError(
            "cluster.accelerator",
            f"the compiler gives {slice_.topology} {len(devices)} devices, and the cluster has "
            f"{cluster.num_devices}; it cannot be planned for with this libtpu",
            cluster.accelerator,
        )
    name = f"{cluster.accelerator} ({slice_.topology})"
    name = f"{cluster.slices} slices of {name}" if cluster.slices > 1 else name
    per_host = slice_.chips_per_host
    hosts = tuple(number // per_host for number in range(len(devices)))
    return Target(name, "tpu", devices, hosts, slice_.chip, simulated=False)


def _simulated(cluster: Cluster) -> Target:
    """CPU devices, as many as the cluster has."""
    import jax

    count = cluster.num_devices
    devices = list(jax.devices("cpu"))
    if len(devices) < count:
        raise AssertionError(f"{len(devices)} CPU devices were made for {count}")
    gpus = cluster.backend == "slurm" and cluster.slurm.gpus is not None and not cluster.on_cpu
    platform = "gpu" if gpus else "cpu"
    per_host = cluster.processes_per_host * cluster.devices_per_process
    what = {"gpu": "GPUs", "cpu": "CPU devices"}[platform]
    name = f"{count} {what} on {cluster.hosts} host(s)"
    chip = _gpu(cluster.slurm.gpu_type or cluster.slurm.gres) if gpus else None
    hosts = tuple(number // per_host for number in range(count))
    return Target(name, platform, devices[:count], hosts, chip, simulated=True)


def _gpu(kind: str | None) -> Chip | None:
    """A GPU by the name that a site gave it, where it can only be one."""
    name = (kind or "").lower()
    found = [chip for key, chip in CHIPS.items() if key.split("-")[0] in name and key[0] in "abh"]
    exact = [chip for chip in found if chip.name in name]
    chosen = exact or found
    return chosen[0] if len(chosen) == 1 else None


def prepare_environment(num_cpu_devices: int, env: Mapping[str, str]) -> None:
    """Set this process up for planning. To be called before jax is imported.

    Args:
      num_cpu_devices: CPU devices to make.
      env: the cluster's environment: what the compiler reads of it counts here too.
    """
    os.environ.update(_ENVIRONMENT)
    os.environ["JAX_NUM_CPU_DEVICES"] = str(num_cpu_devices)
    for name in ("LIBTPU_INIT_ARGS", "XLA_FLAGS"):
        if name in env:
            os.environ[name] = env[name]
    xla_flags.put(os.environ, has_gpu=False)  # As the run itself will.
