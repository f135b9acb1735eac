"""The TPU VMs of a run, as its controller sees them."""

from __future__ import annotations

import dataclasses
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from launch import rundir
from launch.backends.tpu import plans
from launch.backends.tpu.code import bundle
from launch.backends.tpu.link import Copies, HostLink, Start
from launch.backends.tpu.plans import GangSpec, Prepared
from launch.backends.tpu.prepare import Hosts
from launch.backends.tpu.reach import SshError
from launch.backends.tpu.ssh import HostFailedError
from launch.backends.tpu.states import NodeWatch, is_lost, trouble
from launch.channel import Channel
from launch.events import Event, Interrupted, StopRequested
from launch.gang import Gang
from launch.ownership import Attempt, RunDir
from launch.program import Program
from launch.spec import Cluster

_PREEMPTION_SECONDS = 25.0  # Google gives a VM half a minute from its signal to its end.
_SETTLE_SECONDS = 10.0  # How long the API may take to say that a machine is gone.
_TELL_SECONDS = 60.0  # Between two words on an API that gives no answer.
_FALLBACK_PORT = 21000


@dataclasses.dataclass
class Lease:
    """The machines that a run has for now.

    Attributes:
      hosts: all, in order, with everything in place.
      connections: what is open to them from the preparation.
      zone: theirs.
      project: theirs; None for gcloud's own.
      nodes: their nodes, in order of slices.
      names: what is to be given back in the end, full names.
      ids: for the attempt's record.
      deadline: until when the run may have machines, seconds since the epoch.
      adopts: the number of an attempt that is running on them.
    """

    hosts: tuple[Prepared, ...]
    connections: Hosts
    zone: str
    project: str | None
    nodes: tuple[str, ...]
    names: tuple[str, ...]
    ids: tuple[str, ...]
    deadline: float
    adopts: int | None = None


class TpuMachines:
    """See launch.controller.Backend."""

    signals: Sequence[signal.Signals] = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def __init__(
        self,
        cluster: Cluster,
        program: Program,
        *,
        files: Mapping[str, str],
        storage: str | None,
        run_dir: RunDir,
        lease: Lease,
        say: Callable[[str], None],
    ):
        """Takes what is to run, and where.

        Args:
          cluster: its shape as the machines really are.
          program: what every process runs.
          files: go along with it, see plans.GangSpec.
          storage: the run's directory for what lasts.
          run_dir: held by this process.
          lease: the machines.
          say: tells the user a line.
        """
        self.processes_per_host = cluster.processes_per_host
        self.lease_seconds = cluster.tpu.silent_seconds
        self.come_seconds = max(cluster.watch.start_seconds, cluster.tpu.silent_seconds)
        self.backend_ids = lease.ids
        self._cluster = cluster
        self._program = program
        self._files = files
        self._storage = storage
        self._run_dir = run_dir
        self._lease = lease
        self._say = say
        self._watch = NodeWatch(
            lease.project, lease.zone, lease.nodes, every_seconds=cluster.tpu.poll_seconds
        )
        self._links: list[HostLink] = []
        self._told: set[tuple[str, str]] = set()  # Interruptions that were said.
        self._explained: set[str] = set()
        self._tell_due = 0.0
        self._token = os.urandom(8).hex()

    @property
    def displaced(self) -> bool:
        """Whether another controller has taken the run over."""
        return any(link.displaced is not None for link in self._links)

    # ------------------------------------------------------------------ the agents

    def adopted(self) -> Attempt | None:
        """See launch.controller.Backend."""
        number, self._lease.adopts = self._lease.adopts, None
        return None if number is None else self._run_dir.reopen_attempt(number)

    @contextmanager
    def agents(
        self, hosts: Sequence[str], attempt: Attempt
    ) -> Iterator[list[tuple[Mapping[str, Any], Channel]]]:
        """See launch.controller.Backend: one agent a host, detached from its connection."""
        run_id = self._run_dir.run_id
        coordinator = attempt.recorded("coordinator") or self._coordinator()
        attempt.write(coordinator=coordinator)
        self._told, self._explained = set(), set()
        gang = GangSpec(
            run_id,
            attempt.number,
            coordinator,
            self._lease.hosts,
            self._storage,
            max(0.0, self._lease.deadline - time.time()),
            self._files,
            () if self._cluster.tpu.keep else self._lease.names,
            bundle()[0],
        )
        rendered = plans.render(self._cluster, self._program, gang)
        self._links = [
            self._link(prepared, plan, attempt)
            for prepared, plan in zip(self._lease.hosts, rendered, strict=True)
        ]
        for link in self._links:
            link.start()
        try:
            yield [(plan, link.channel) for plan, link in zip(rendered, self._links, strict=True)]
        finally:
            for link in self._links:
                link.stop()
            for link in self._links:
                link.join(_SETTLE_SECONDS)

    def _coordinator(self) -> str:
        first = self._lease.hosts[0].host
        try:
            port = self._lease.connections.port()
        except (SshError, HostFailedError):
            port = _FALLBACK_PORT + os.getpid() % 1000
        return f"{first.address}:{port}"

    def _link(self, prepared: Prepared, plan: Mapping[str, Any], attempt: Attempt) -> HostLink:
        spec, host = self._cluster.tpu, prepared.host
        run_id = self._run_dir.run_id
        container = plans.container_argv(self._cluster, run_id, attempt.number, prepared.home)
        python = spec.container_python if container else ""
        ids = [process["process_id"] for process in plan["processes"]]
        owner = {
            "token": self._token,
            "run": run_id,
            "host": os.uname().nodename,
            "pid": os.getpid(),
            "user": rundir.user_name(),
        }
        return HostLink(
            host,
            Start(run_id, attempt.number, python, container),
            owner=owner,
            copies=Copies(attempt.path, ids, self._cluster.max_log_bytes),
            session=self._lease.connections.take(host.name),
            say=self._say,
        )

    # ------------------------------------------------------------------ what becomes of them

    def attend(self, gang: Gang, now: float) -> list[Event]:
        """See launch.controller.Backend."""
        events: list[Event] = []
        if self.displaced:
            events += self._interrupt("host_lost", "another controller has taken this run over", 0)
        if gang.signalled - self._explained:
            self._explained |= gang.signalled
            hosts = ", ".join(sorted(gang.signalled))
            message = f"{hosts} got the signal to shut down: Google takes the machine back"
            events += self._interrupt("preempted", message, _PREEMPTION_SECONDS)
        for node in self._watch.nodes():
            found = trouble(node)
            if found is None:
                continue
            seconds = 0.0 if is_lost(node) else self._cluster.grace_seconds
            events += self._interrupt(*found, seconds)
            if is_lost(node):
                for prepared in self._lease.hosts:
                    if prepared.host.node == node.name:
                        events += gang.give_up(prepared.host.name, now)
        events += self._look_at_clock()
        self._tell_silence(now)
        return events

    def signalled(self, number: int) -> list[Event]:
        """See launch.controller.Backend."""
        del number
        return [StopRequested()]

    def before_next(self) -> list[Event]:
        """See launch.controller.Backend: what is known now of nodes whose hosts are gone."""
        lost = [link for link in self._links if link.trouble and link.displaced is None]
        limit = time.monotonic() + (_SETTLE_SECONDS if lost else 0.0)
        while True:
            if lost:
                self._watch.look()
            found = [trouble(node) for node in self._watch.nodes() if is_lost(node)]
            events = [event for one in found if one for event in self._interrupt(*one, 0.0)]
            if events or self._told or time.monotonic() > limit:
                return events
            time.sleep(1.0)

    def close(self) -> None:
        """Ask no more."""
        self._watch.close()
        self._lease.connections.close()

    def _look_at_clock(self) -> list[Event]:
        left = self._lease.deadline - time.time()
        if left > self._cluster.grace_seconds:
            return []
        message = (
            f"tpu.max_lifetime_seconds={self._cluster.tpu.max_lifetime_seconds:g} of the run's "
            f"machines is over in {max(0.0, left):.0f} s"
        )
        return self._interrupt("time_limit", message, max(1.0, left))

    def _interrupt(self, cause: str, message: str, seconds: float) -> list[Event]:
        if (cause, message.partition(" is over")[0]) in self._told:
            return []
        self._told.add((cause, message.partition(" is over")[0]))
        return [Interrupted(cause, message, seconds)]

    def _tell_silence(self, now: float) -> None:
        since = self._watch.silent_since
        silent = since is not None and now > since + self._cluster.tpu.silent_seconds
        if silent and now >= self._tell_due:
            self._tell_due = now + _TELL_SECONDS
            self._say(
                f"muster: Google Cloud gives no answer: {self._watch.error}; the run goes on "
                "all the same"
            )
