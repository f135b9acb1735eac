"""The local backend: every 'host' is one agent process on this machine.

`render` is a pure function from a cluster and a program to the agents' plans; `start_agent` starts
what was rendered.
"""

from __future__ import annotations

import dataclasses
import json
import os
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from launch import agent, contract, rundir
from launch.program import Program
from launch.spec import Cluster

# How long a process may take to end once the launcher is gone; within its promise of 10 seconds.
OWNER_GONE_GRACE_SECONDS = 5.0
_LOOPBACK = "127.0.0.1"


def host_names(cluster: Cluster) -> list[str]:
    """Names of the hosts in messages and records."""
    return [f"local{index}" for index in range(cluster.hosts)]


def process_hosts(cluster: Cluster) -> list[str]:
    """The host of each process, by process id."""
    return [host for host in host_names(cluster) for _ in range(cluster.processes_per_host)]


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


def process_env(
    cluster: Cluster, run_dir: Path, attempt: int, process_id: int, port: int | str
) -> dict[str, str]:
    """The environment that one process gets over the launcher's own."""
    local_id = process_id % cluster.processes_per_host
    address = f"{_LOOPBACK}:{port}"
    attempt_dir = rundir.attempt_path(run_dir, attempt)
    return {
        contract.RUN_DIR: str(run_dir),
        contract.ATTEMPT: str(attempt),
        contract.COORDINATOR_ADDRESS: address,
        contract.NUM_PROCESSES: str(cluster.num_processes),
        contract.PROCESS_ID: str(process_id),
        contract.LOCAL_PROCESS_ID: str(local_id),
        contract.HOST: process_hosts(cluster)[process_id],
        contract.DEVICES_PER_PROCESS: str(cluster.devices_per_process),
        contract.PROGRESS_FILE: str(rundir.progress_path(attempt_dir, process_id)),
        # What jax.distributed.initialize() without arguments looks for: Open MPI comes first in
        # its search. On a GPU host it would take one device, its local rank's, without the ids.
        "OMPI_MCA_orte_hnp_uri": f"0.0;tcp://{address}",
        "OMPI_COMM_WORLD_SIZE": str(cluster.num_processes),
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


def render(
    cluster: Cluster, program: Program, run_dir: Path, attempt: int, port: int | str
) -> list[dict[str, Any]]:
    """The plan of each host's agent (see launch.agent), in order of hosts.

    Args:
      cluster: how many hosts and processes.
      program: what every process runs.
      run_dir: the run directory, absolute.
      attempt: its number.
      port: of process 0's service; a word in its place when nothing is to be started.
    """
    attempt_dir = rundir.attempt_path(run_dir, attempt)
    plans = []
    for index, host in enumerate(host_names(cluster)):
        first = index * cluster.processes_per_host
        processes = [
            {
                "process_id": process_id,
                "argv": list(program.argv),
                "env": {
                    **process_env(cluster, run_dir, attempt, process_id, port),
                    **program.env,
                },
                "log": str(rundir.log_path(attempt_dir, process_id)),
                "exit_record": str(rundir.exit_path(attempt_dir, process_id)),
                "progress": str(rundir.progress_path(attempt_dir, process_id)),
            }
            for process_id in range(first, first + cluster.processes_per_host)
        ]
        plans.append(
            {
                "schema": contract.SCHEMA,
                "host": host,
                "max_grace_seconds": min(cluster.grace_seconds, OWNER_GONE_GRACE_SECONDS),
                "processes": processes,
            }
        )
    return plans


@dataclasses.dataclass(frozen=True)
class AgentProcess:
    """An agent that was started: its host and its process with pipes for input and output."""

    host: str
    popen: subprocess.Popen[bytes]

    def send(self, message: Mapping[str, Any]) -> None:
        """Send one line; does nothing if the agent is gone, which its output will tell."""
        assert self.popen.stdin is not None
        try:
            self.popen.stdin.write(json.dumps(message).encode() + b"\n")
            self.popen.stdin.flush()
        except BrokenPipeError:
            pass


def start_agent(plan: Mapping[str, Any], attempt_dir: Path, lock_fd: int) -> AgentProcess:
    """Start an agent in a session of its own, so that a terminal's Ctrl-C does not reach it.

    Args:
      plan: what `render` made for this host.
      attempt_dir: where the agent's own complaints are kept.
      lock_fd: the run directory's lock, which the agent holds until its end.
    """
    complaints = os.open(
        attempt_dir / f"agent-{plan['host']}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600
    )
    try:
        popen = subprocess.Popen(
            # Isolated and without site packages: a bare interpreter starts twice as fast.
            [sys.executable, "-I", "-S", agent.__file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=complaints,
            start_new_session=True,
            pass_fds=(lock_fd,),
        )
    finally:
        os.close(complaints)
    started = AgentProcess(plan["host"], popen)
    started.send(plan)
    return started
