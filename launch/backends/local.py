"""The local backend: every 'host' is one agent process on this machine.

`render` is a pure function from a cluster and a program to the agents' plans; `LocalBackend` starts
what was rendered.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from launch import rundir
from launch.backends import host_plan
from launch.backends.host_plan import AttemptSpec
from launch.channel import Channel, LocalChannel
from launch.events import Event, StopRequested
from launch.gang import Gang
from launch.ownership import Attempt, RunDir
from launch.program import Program
from launch.spec import Cluster

_LOOPBACK = "127.0.0.1"


def host_names(cluster: Cluster) -> tuple[str, ...]:
    """Names of the hosts in messages and records."""
    return tuple(f"local{index}" for index in range(cluster.hosts))


def reserve_port(address: str = _LOOPBACK) -> socket.socket:
    """Reserve a port for process 0's service; close it to give it back.

    The socket is bound but does not listen, and shares its port with sockets that ask for that
    (SO_REUSEPORT, same user): the gRPC server of `jax.distributed` does. As long as it is bound
    the kernel hands the port to nobody who asks for any free one, so two gangs never meet.

    Args:
      address: of the interface.
    """
    reservation = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    reservation.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    reservation.bind((address, 0))
    return reservation


def render(cluster: Cluster, program: Program, attempt: AttemptSpec) -> list[dict[str, Any]]:
    """The plan of each host's agent (see launch.agent), in order of hosts.

    Args:
      cluster: how many processes on a host, and how they are kept.
      program: what every process runs.
      attempt: where.
    """

    def process_env(process_id: int) -> dict[str, str]:
        return {
            **host_plan.gang_env(cluster, attempt, process_id),
            **host_plan.cpu_env(cluster),
            **cluster.env,
        }

    return host_plan.render(cluster, program, attempt, process_env)


class LocalBackend:
    """Starts agents on this machine; see launch.controller.Backend."""

    signals: Sequence[signal.Signals] = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def __init__(self, cluster: Cluster, program: Program, run_dir: RunDir):
        self.processes_per_host = cluster.processes_per_host
        self.lease_seconds = cluster.lease_seconds
        self.come_seconds = 0.0  # They are there at once.
        self.backend_ids: tuple[str, ...] = ()
        self._cluster = cluster
        self._program = program
        self._run_dir = run_dir

    def adopted(self) -> Attempt | None:
        """See launch.controller.Backend: what a controller has left is ended, not followed."""
        return None

    @contextmanager
    def agents(
        self, hosts: Sequence[str], attempt: Attempt
    ) -> Iterator[list[tuple[Mapping[str, Any], Channel]]]:
        """See launch.controller.Backend."""
        with reserve_port() as reservation:
            coordinator = f"{_LOOPBACK}:{reservation.getsockname()[1]}"
            spec = AttemptSpec(self._run_dir.path, attempt.number, tuple(hosts), coordinator)
            plans = render(self._cluster, self._program, spec)
            yield [(one, start_agent(one, attempt.path, self._run_dir.lock_fd)) for one in plans]

    def attend(self, gang: Gang, now: float) -> list[Event]:
        """See launch.controller.Backend."""
        del gang, now
        return []

    def signalled(self, number: int) -> list[Event]:
        """See launch.controller.Backend."""
        del number
        return [StopRequested()]

    def before_next(self) -> list[Event]:
        """See launch.controller.Backend."""
        return []


def start_agent(agent_plan: Mapping[str, Any], attempt_dir: Path, lock_fd: int) -> LocalChannel:
    """Start an agent in a session of its own, so that a terminal's Ctrl-C does not reach it.

    Its input does not block, and waits for a plan.

    Args:
      agent_plan: what `render` made for this host.
      attempt_dir: where the agent's own complaints are kept.
      lock_fd: the run directory's lock, which the agent holds until its end.
    """
    path = rundir.agent_log_path(attempt_dir, agent_plan["host"])
    complaints = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    try:
        popen = subprocess.Popen(
            host_plan.AGENT,
            bufsize=0,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=complaints,
            start_new_session=True,
            pass_fds=(lock_fd,),
        )
    finally:
        os.close(complaints)
    return LocalChannel(agent_plan["host"], popen)
