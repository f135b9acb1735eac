"""What each host's agent is told to do: rendered purely, and alike on every backend."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from launch import contract, rundir
from launch.program import Program
from launch.spec import Cluster

# How long a process may take to end once the launcher is gone; within its promise of 10 seconds.
OWNER_GONE_GRACE_SECONDS = 5.0
HOOK_DIRECTORY = Path(contract.__file__).parent / "hook"
ROOT = HOOK_DIRECTORY.parents[1]  # Where the package `launch` is.


def agent_command(python: str, *arguments: str) -> list[str]:
    """The command that starts an agent.

    Args:
      python: the interpreter; isolated and without site packages it starts twice as fast.
      *arguments: see launch.agent.
    """
    code = "import sys; sys.path.insert(0, sys.argv[1]); from launch.agent.agent import main; "
    return [python, "-I", "-S", "-c", code + "main(sys.argv[2:])", str(ROOT), *arguments]


AGENT = agent_command(sys.executable)


@dataclasses.dataclass(frozen=True)
class AttemptSpec:
    """One attempt, as it is to be started.

    Attributes:
      run_dir: the run directory, absolute.
      number: the attempt's.
      hosts: those of this attempt, which may be fewer than the cluster's.
      coordinator: `host:port` of process 0's service.
    """

    run_dir: Path
    number: int
    hosts: tuple[str, ...]
    coordinator: str

    @property
    def path(self) -> Path:
        """The attempt's directory."""
        return rundir.attempt_path(self.run_dir, self.number)


def gang_env(cluster: Cluster, attempt: AttemptSpec, process_id: int) -> dict[str, str]:
    """What a process's environment says of its place in the gang, on every backend."""
    host_index, local_id = divmod(process_id, cluster.processes_per_host)
    num_processes = str(len(attempt.hosts) * cluster.processes_per_host)
    return {
        contract.RUN_DIR: str(attempt.run_dir),
        contract.ATTEMPT: str(attempt.number),
        contract.COORDINATOR_ADDRESS: attempt.coordinator,
        contract.NUM_PROCESSES: num_processes,
        contract.PROCESS_ID: str(process_id),
        contract.LOCAL_PROCESS_ID: str(local_id),
        contract.HOST: attempt.hosts[host_index],
        contract.DEVICES_PER_PROCESS: str(cluster.devices_per_process),
        contract.PROGRESS_FILE: str(rundir.progress_path(attempt.path, process_id)),
        contract.FAILURE_FILE: str(rundir.failure_path(attempt.path, process_id)),
        contract.STACKS_FILE: str(rundir.stacks_path(attempt.path, process_id)),
        contract.DEADLINE_FILE: str(rundir.deadline_path(attempt.path, process_id)),
        # What jax.distributed.initialize() without arguments looks for: Open MPI comes first in
        # its search. On a GPU host it would take one device, its local rank's, without the ids.
        "OMPI_MCA_orte_hnp_uri": f"0.0;tcp://{attempt.coordinator}",
        "OMPI_COMM_WORLD_SIZE": num_processes,
        "OMPI_COMM_WORLD_RANK": str(process_id),
        "OMPI_COMM_WORLD_LOCAL_RANK": str(local_id),
        "JAX_COORDINATOR_ADDRESS": attempt.coordinator,
        "JAX_COORDINATOR_BIND_ADDRESS": attempt.coordinator,
        "PYTHONUNBUFFERED": "1",  # A killed process's last lines must be in its log.
    }


def cpu_env(cluster: Cluster) -> dict[str, str]:
    """What makes a process's devices CPU devices."""
    return {
        "JAX_LOCAL_DEVICE_IDS": ",".join(str(i) for i in range(cluster.devices_per_process)),
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(cluster.devices_per_process),
        # XLA sizes its thread pool by it. With two or more CPU devices in a process, gloo
        # collectives of steps that nobody waits for fill a pool as small as the machine's cores,
        # and the gang deadlocks (seen with jax 0.10.2 on 2 cores).
        "NPROC": "16",
        # XLA asks the system for a step's memory and gives it back, every step; huge pages make
        # that cheaper (the quickstart's step: 1.15 times as quick). Other C libraries ignore it.
        "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
    }


def render(
    cluster: Cluster,
    program: Program,
    attempt: AttemptSpec,
    process_env: Callable[[int], Mapping[str, str]],
) -> list[dict[str, Any]]:
    """The plan of each host's agent (see launch.agent), in order of hosts.

    Args:
      cluster: how many processes on a host, and how they are kept.
      program: what every process runs.
      attempt: where.
      process_env: process id -> its environment over its agent's own.
    """
    plans = []
    for index, host in enumerate(attempt.hosts):
        first = index * cluster.processes_per_host
        processes = [
            {
                **files_of(attempt.path, process_id),
                "process_id": process_id,
                "argv": list(program.argv),
                "env": {**process_env(process_id), **program.env},
            }
            for process_id in range(first, first + cluster.processes_per_host)
        ]
        plans.append(
            {
                "schema": contract.SCHEMA,
                "host": host,
                "lease_seconds": cluster.lease_seconds,
                "max_grace_seconds": min(cluster.grace_seconds, OWNER_GONE_GRACE_SECONDS),
                "max_log_bytes": cluster.max_log_bytes,
                "hook": str(HOOK_DIRECTORY),
                "processes": processes,
            }
        )
    return plans


def files_of(attempt: Path, process_id: int) -> dict[str, str]:
    """Where one process's traces are kept."""
    return {
        "log": str(rundir.log_path(attempt, process_id)),
        "exit_record": str(rundir.exit_path(attempt, process_id)),
        "progress": str(rundir.progress_path(attempt, process_id)),
        "failure": str(rundir.failure_path(attempt, process_id)),
        "stacks": str(rundir.stacks_path(attempt, process_id)),
        "deadline": str(rundir.deadline_path(attempt, process_id)),
    }
