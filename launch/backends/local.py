"""The local backend: every 'host' is one agent process on this machine.

`render` is a pure function from a cluster and a program to the agents' plans; `start_agent` starts
what was rendered.
"""

from __future__ import annotations

import dataclasses
import os
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from launch import contract, rundir
from launch.program import Program
from launch.spec import Cluster

# How long a process may take to end once the launcher is gone; within its promise of 10 seconds.
OWNER_GONE_GRACE_SECONDS = 5.0
HOOK_DIRECTORY = Path(contract.__file__).parent / "hook"
# Isolated and without site packages: a bare interpreter starts twice as fast.
AGENT = [
    *(sys.executable, "-I", "-S", "-c"),
    "import sys; sys.path.insert(0, sys.argv[1]); from launch.agent.agent import main; main()",
    str(HOOK_DIRECTORY.parents[1]),
]
_LOOPBACK = "127.0.0.1"


def host_names(cluster: Cluster) -> tuple[str, ...]:
    """Names of the hosts in messages and records."""
    return tuple(f"local{index}" for index in range(cluster.hosts))


def reserve_port() -> socket.socket:
    """Reserve a port of the loopback interface for process 0's service; close it to give it back.

    The socket is bound but does not listen, and shares its port with sockets that ask for that
    (SO_REUSEPORT, same user): the gRPC server of `jax.distributed` does. As long as it is bound
    the kernel hands the port to nobody who asks for any free one, so two gangs never meet.
    """
    reservation = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    reservation.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    reservation.bind((_LOOPBACK, 0))
    return reservation


@dataclasses.dataclass(frozen=True)
class AttemptSpec:
    """One attempt, as it is to be started.

    Attributes:
      run_dir: the run directory, absolute.
      number: the attempt's.
      hosts: those of this attempt, which may be fewer than the cluster's.
      port: of process 0's service; a word in its place when nothing is to be started.
    """

    run_dir: Path
    number: int
    hosts: tuple[str, ...]
    port: int | str

    @property
    def path(self) -> Path:
        """The attempt's directory."""
        return rundir.attempt_path(self.run_dir, self.number)


def process_env(cluster: Cluster, attempt: AttemptSpec, process_id: int) -> dict[str, str]:
    """The environment that one process gets over the launcher's own."""
    host_index, local_id = divmod(process_id, cluster.processes_per_host)
    num_processes = str(len(attempt.hosts) * cluster.processes_per_host)
    address = f"{_LOOPBACK}:{attempt.port}"
    return {
        contract.RUN_DIR: str(attempt.run_dir),
        contract.ATTEMPT: str(attempt.number),
        contract.COORDINATOR_ADDRESS: address,
        contract.NUM_PROCESSES: num_processes,
        contract.PROCESS_ID: str(process_id),
        contract.LOCAL_PROCESS_ID: str(local_id),
        contract.HOST: attempt.hosts[host_index],
        contract.DEVICES_PER_PROCESS: str(cluster.devices_per_process),
        contract.PROGRESS_FILE: str(rundir.progress_path(attempt.path, process_id)),
        contract.FAILURE_FILE: str(rundir.failure_path(attempt.path, process_id)),
        contract.STACKS_FILE: str(rundir.stacks_path(attempt.path, process_id)),
        # What jax.distributed.initialize() without arguments looks for: Open MPI comes first in
        # its search. On a GPU host it would take one device, its local rank's, without the ids.
        "OMPI_MCA_orte_hnp_uri": f"0.0;tcp://{address}",
        "OMPI_COMM_WORLD_SIZE": num_processes,
        "OMPI_COMM_WORLD_RANK": str(process_id),
        "OMPI_COMM_WORLD_LOCAL_RANK": str(local_id),
        "JAX_COORDINATOR_ADDRESS": address,
        "JAX_COORDINATOR_BIND_ADDRESS": address,
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
        "PYTHONUNBUFFERED": "1",  # A killed process's last lines must be in its log.
        **cluster.env,
    }


def render(cluster: Cluster, program: Program, attempt: AttemptSpec) -> list[dict[str, Any]]:
    """The plan of each host's agent (see launch.agent), in order of hosts.

    Args:
      cluster: how many processes on a host, and how they are kept.
      program: what every process runs.
      attempt: where.
    """
    plans = []
    for index, host in enumerate(attempt.hosts):
        first = index * cluster.processes_per_host
        processes = [
            {
                **files_of(attempt.path, process_id),
                "process_id": process_id,
                "argv": list(program.argv),
                "env": {**process_env(cluster, attempt, process_id), **program.env},
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
    }


@dataclasses.dataclass(frozen=True)
class AgentProcess:
    """An agent that was started: its host and its process with pipes for input and output."""

    host: str
    popen: subprocess.Popen[bytes]


def start_agent(plan: Mapping[str, Any], attempt_dir: Path, lock_fd: int) -> AgentProcess:
    """Start an agent in a session of its own, so that a terminal's Ctrl-C does not reach it.

    Its input does not block, and waits for a plan.

    Args:
      plan: what `render` made for this host.
      attempt_dir: where the agent's own complaints are kept.
      lock_fd: the run directory's lock, which the agent holds until its end.
    """
    path = rundir.agent_log_path(attempt_dir, plan["host"])
    complaints = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    try:
        popen = subprocess.Popen(
            AGENT,
            bufsize=0,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=complaints,
            start_new_session=True,
            pass_fds=(lock_fd,),
        )
    finally:
        os.close(complaints)
    assert popen.stdin is not None
    os.set_blocking(popen.stdin.fileno(), False)
    return AgentProcess(plan["host"], popen)
