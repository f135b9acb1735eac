"""`jax.distributed`: who this process is, how it joins its gang and how it leaves it."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping

import jax

from launch import contract
from launch.spec import ConfigError
from trainer import rollcall
from trainer.agreement import barrier, broadcast, fail_together, gather, is_lead, say

__all__ = ["Place", "barrier", "broadcast", "gather", "initialize", "is_lead", "say"]

# A dead host is noticed this late by its peers; the launcher usually sees the process end first.
HEARTBEAT_TIMEOUT_SECONDS = 60
# How long a process that has finished waits for the others to finish; JAX's own 300 s only makes
# a failed gang slower to end.
SHUTDOWN_TIMEOUT_SECONDS = 60

# Variables by which other launchers say how many processes there are.
_SIZE_VARIABLES = ("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")


@dataclasses.dataclass(frozen=True)
class Place:
    """Where this process stands.

    Attributes:
      process_id: in `[0, num_processes)`.
      num_processes: processes in the gang; 1 when alone.
      source: who said so: `flags`, `muster`, `jax` (its cluster detection) or `alone`.
    """

    process_id: int
    num_processes: int
    source: str

    def __str__(self) -> str:
        return f"process {self.process_id}/{self.num_processes} ({self.source})"


def initialize(
    *,
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    timeout_seconds: float = 300.0,
    heartbeat_timeout_seconds: int = HEARTBEAT_TIMEOUT_SECONDS,
    shutdown_timeout_seconds: int = SHUTDOWN_TIMEOUT_SECONDS,
) -> Place:
    """Join the gang. Collective: every process must call this, before any other use of JAX.

    Asked in this order: the arguments, Muster's contract, JAX's own cluster detection; if none of
    them knows anything, this process is alone.

    Args:
      coordinator_address: `host:port` at which process 0 serves; with the next two, or not at all.
      num_processes: processes in the gang; 1 by itself means alone, whatever the environment says.
      process_id: this process, in `[0, num_processes)`.
      timeout_seconds: how long to wait for all processes to come.
      heartbeat_timeout_seconds: a process not heard of for so long is dead, and ends all others.
      shutdown_timeout_seconds: how long a finished process waits for the others to finish.

    Raises:
      ConfigError: the place is half known, or a process has not the devices it was promised.
      TimeoutError: some processes never came; the text names them.
      RuntimeError: the environment is a gang's but nothing says which process this is.
    """
    liveness = {
        "heartbeat_timeout_seconds": heartbeat_timeout_seconds,
        "shutdown_timeout_seconds": shutdown_timeout_seconds,
    }
    member = _explicit(coordinator_address, num_processes, process_id)
    source = "flags"
    if member is None and num_processes is None:
        member, source = _muster(), "muster"
    if member is not None:
        _join(member, timeout_seconds, liveness)
    elif num_processes == 1:
        source = "alone"
    else:
        source = _detect(timeout_seconds, liveness)
    _check_platform()
    place = Place(jax.process_index(), jax.process_count(), source)
    if member is not None and member.devices_per_process is not None:
        _check_devices(member.devices_per_process)
    return place


def _explicit(
    coordinator_address: str | None, num_processes: int | None, process_id: int | None
) -> contract.Membership | None:
    """The place that the arguments name, or None."""
    given = {
        "coordinator_address": coordinator_address,
        "num_processes": num_processes,
        "process_id": process_id,
    }
    missing = [name for name, value in given.items() if value is None]
    if len(missing) == len(given) or (num_processes == 1 and len(missing) == 2):
        return None
    if coordinator_address is None or num_processes is None or process_id is None:
        raise ConfigError(
            f"--{missing[0]}",
            "a gang member must know its whole place; give --coordinator_address, "
            "--num_processes and --process_id, or none of them",
        )
    if not 0 <= process_id < num_processes:
        raise ConfigError(
            "--process_id", f"must be in [0, --num_processes={num_processes})", process_id
        )
    if not rollcall.is_address(coordinator_address):
        raise ConfigError("--coordinator_address", "must be host:port", coordinator_address)
    return contract.Membership(coordinator_address, num_processes, process_id, 0, None)


def _muster() -> contract.Membership | None:
    """The place that Muster's launcher gave, or None."""
    try:
        return contract.membership()
    except ValueError as error:
        raise ConfigError("", str(error)) from None


def _join(member: contract.Membership, timeout_seconds: float, liveness: Mapping[str, int]) -> None:
    """Call the roll, then connect to process 0's service."""
    # JAX itself ends a process whose peers do not come with SIGABRT from C++, and says nothing
    # about who is missing: so the roll is called first, by ourselves.
    token = "/".join(os.environ.get(name, "") for name in (contract.RUN_DIR, contract.ATTEMPT))
    rollcall.call(
        member.coordinator_address,
        member.num_processes,
        member.process_id,
        timeout_seconds=timeout_seconds,
        token=token,
    )
    if member.process_id != 0:
        rollcall.wait_for_service(member.coordinator_address)
    jax.distributed.initialize(
        coordinator_address=member.coordinator_address,
        num_processes=member.num_processes,
        process_id=member.process_id,
        local_device_ids=local_device_ids(member, os.environ),
        # Detection would fill in a local_device_ids of None with the one local rank.
        cluster_detection_method="deactivate",
        coordinator_bind_address=rollcall.bind_address(member.coordinator_address),
        initialization_timeout=max(1, int(timeout_seconds)),
        **liveness,
    )


def local_device_ids(member: contract.Membership, env: Mapping[str, str]) -> tuple[int, ...] | None:
    """Which of the accelerators that it can see this process takes; None for all of them.

    Processes that share a host's accelerators take consecutive ones. When the environment already
    shows each process its own, it takes what it sees.
    """
    number = member.devices_per_process
    if number is None or env.get("JAX_LOCAL_DEVICE_IDS"):
        return None  # JAX reads that variable itself.
    visible = env.get("CUDA_VISIBLE_DEVICES") or env.get("ROCR_VISIBLE_DEVICES")
    own = visible is not None and len(visible.split(",")) == number
    first = 0 if own else member.local_process_id * number
    return tuple(range(first, first + number))


def _detect(timeout_seconds: float, liveness: Mapping[str, int]) -> str:
    """Let JAX find its place by itself; being alone is right only where nothing hints at more."""
    try:
        jax.distributed.initialize(initialization_timeout=max(1, int(timeout_seconds)), **liveness)
    except ValueError as error:
        if "coordinator_address should be defined" not in str(error):
            raise RuntimeError(f"JAX found only half of this process's place: {error}") from error
        hint = gang_hint(os.environ)
        if hint:
            raise RuntimeError(
                f"{hint} says that this is one of many processes, but nothing says which: start "
                "it through `muster run`, srun or mpirun, or give --coordinator_address, "
                "--num_processes and --process_id (--num_processes=1 to run alone)"
            ) from None
        return "alone"
    return "jax"


def gang_hint(env: Mapping[str, str]) -> str | None:
    """The `NAME=value` in the environment that speaks of more than one process, if any."""
    if env.get(contract.ATTEMPT):  # Muster started this, and its other variables were lost.
        return f"{contract.ATTEMPT}={env[contract.ATTEMPT]}"
    for name in _SIZE_VARIABLES:
        value = env.get(name, "")
        if value.isdigit() and int(value) > 1:
            return f"{name}={value}"
    return None


def _check_platform() -> None:
    """See that JAX can use the kind of devices that it was told to use, and no other."""
    wanted = os.environ.get("JAX_PLATFORMS")
    try:
        jax.default_backend()
    except (AssertionError, RuntimeError) as error:
        if not wanted:
            raise
        why = " ".join(str(error).split()) or "nothing for it is installed"
        host = os.environ.get(contract.HOST) or os.uname().nodename
        rule = f"JAX finds no such devices on {host}: {why}; `muster doctor` looks at every node"
        raise ConfigError("JAX_PLATFORMS", rule, wanted) from error


def _check_devices(promised: int) -> None:
    """Compare devices found with those promised, on every process. Collective."""
    found = gather("distributed/devices", jax.local_device_count())
    wrong = {process: number for process, number in enumerate(found) if number != promised}
    if wrong:
        listed = ", ".join(f"process {process} has {number}" for process, number in wrong.items())
        error = ConfigError(
            "cluster.devices_per_process",
            f"but {listed} {jax.default_backend()} device(s); correct it, or see what hides or "
            "adds devices (JAX_PLATFORMS, JAX_NUM_CPU_DEVICES, CUDA_VISIBLE_DEVICES)",
            promised,
        )
        fail_together(error, accuses=list(wrong))
