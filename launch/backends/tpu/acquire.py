"""From nothing to machines on which a gang can start: bought, reached, and with everything on
them."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable
from pathlib import Path

from launch import rundir
from launch.backends.tpu import plans
from launch.backends.tpu.code import pack
from launch.backends.tpu.fleet import Fleet
from launch.backends.tpu.gcloud import GcloudError
from launch.backends.tpu.ledger import Ledger
from launch.backends.tpu.machines import Lease
from launch.backends.tpu.nodes import Node, find_node, list_nodes
from launch.backends.tpu.prepare import Hosts, LostError, UnreachedError, alive_attempts
from launch.backends.tpu.reach import Host, hosts_of, summary
from launch.backends.tpu.states import is_lost, trouble
from launch.ownership import RunDir
from launch.spec import Cluster, ConfigError
from launch.times import seconds_of


class Acquisition:
    """Gets machines for one run, as often as it needs some."""

    def __init__(
        self,
        cluster: Cluster,
        run_dir: RunDir,
        *,
        ledger: Ledger,
        say: Callable[[str], None],
        pause: Callable[[float], None],
    ):
        """Takes what is wanted.

        Args:
          cluster: a TPU cluster.
          run_dir: held by this process.
          ledger: of the run.
          say: tells the user a line.
          pause: waits so many seconds, or looks with 0 of them; raises when the run is to stop.
        """
        self.fleet = Fleet(cluster, ledger, say, pause)
        self._cluster = cluster
        self._run_dir = run_dir
        self._ledger = ledger
        self._say = say
        self._pause = pause

    def lease(self, folder: Path) -> tuple[Lease, Cluster]:
        """Have machines with everything on them; waits as long as that takes.

        Args:
          folder: where code is packed.

        Returns:
          The machines, and the cluster in the shape that they really have.

        Raises:
          LostError: machines were there, and are lost.
          ConfigError: it cannot be.
        """
        self._ledger.kept = False
        return self._lease(self.fleet.acquire(), folder, self._cluster.tpu.send_code)

    def left_running(self, folder: Path) -> tuple[Lease, Cluster] | None:
        """The machines on which an attempt goes on without a controller; None without one."""
        nodes = []
        for asked in self._ledger.open:
            there = list_nodes(asked.project, asked.zone)
            nodes += [there.get(name, Node(name)) for name in asked.nodes]
        if not nodes or any(is_lost(node) for node in nodes):
            return None
        lease, cluster = self._lease(nodes, folder, send_code=False)
        return None if lease.adopts is None else (lease, cluster)

    def _lease(self, nodes: list[Node], folder: Path, send_code: bool) -> tuple[Lease, Cluster]:
        cluster, spec = self._cluster, self._cluster.tpu
        code = pack(send_code, spec.max_file_bytes, self._run_dir.path, folder)
        open_ = self._ledger.open
        zone = open_[-1].zone
        watch = self._watcher(zone, nodes)
        hosts = self._reach(zone, nodes, watch)
        cluster = self._shaped(len(hosts))
        connections = Hosts(hosts, self._run_dir.run_id, spec.silent_seconds, self._say, watch)
        try:
            adopts = self._adopts(connections)
            prepared = connections.prepare(cluster, code, adopts, self._run_dir.path / "setup")
        except BaseException:
            connections.close()
            raise
        if adopts is None:
            # What nobody brought to an end is over now: its processes were ended.
            self._run_dir.close_abandoned()
        created = seconds_of(self._ledger.created_at) or time.time()
        lease = Lease(
            hosts=prepared,
            connections=connections,
            zone=zone,
            project=spec.project,
            nodes=tuple(node.name for node in nodes),
            names=plans.full_names(open_, nodes[0].project),
            ids=tuple(one.name for one in open_),
            deadline=created + spec.max_lifetime_seconds,
            adopts=adopts,
        )
        return lease, cluster

    def _reach(self, zone: str, nodes: list[Node], watch: Callable[[], None]) -> list[Host]:
        """How all workers are reached, from gcloud, node by node side by side."""
        limit = time.monotonic() + self._cluster.tpu.silent_seconds
        hosts: dict[int, list[Host]] = {}
        while True:
            problems: dict[str, str] = {}

            def reach(index: int, problems: dict[str, str] = problems) -> None:
                try:
                    hosts[index] = hosts_of(self._cluster, zone, nodes[index], index)
                except GcloudError as error:
                    problems[nodes[index].name] = error.said

            missing = [index for index in range(len(nodes)) if index not in hosts]
            threads = [threading.Thread(target=reach, args=(i,), daemon=True) for i in missing]
            for thread in threads:
                thread.start()
            while any(thread.is_alive() for thread in threads):
                watch()
                time.sleep(0.05)
            if not problems:
                return [host for index in range(len(nodes)) for host in hosts[index]]
            self._say(f"muster: gcloud does not reach {summary(problems)}")
            if time.monotonic() > limit:
                raise UnreachedError(f"gcloud does not reach {summary(problems)}")
            self._pause(2.0)

    def _watcher(self, zone: str, nodes: list[Node]) -> Callable[[], None]:
        """Something to be called often, that raises when a node is lost or the run is to stop."""
        project, every = self._cluster.tpu.project, self._cluster.tpu.poll_seconds
        due = time.monotonic() + every

        def watch() -> None:
            nonlocal due
            self._pause(0)
            if time.monotonic() < due:
                return
            try:
                there = list_nodes(project, zone)
                seen = [there.get(node.name) or find_node(project, zone, node.name)
                        for node in nodes]  # fmt: skip
            except GcloudError:
                return
            finally:
                due = time.monotonic() + every
            for node in seen:
                found = trouble(node)
                if is_lost(node) and found:
                    raise LostError(found[1])

        return watch

    def _adopts(self, connections: Hosts) -> int | None:
        """The attempt that goes on on these machines by itself, if there is one."""
        newest = rundir.next_attempt(self._run_dir.path) - 1
        if newest < 0 or rundir.attempt_record(self._run_dir.path, newest).get("cause"):
            return None
        hello = connections.hello()
        names = [host.name for host in connections.hosts]
        record = rundir.attempt_record(self._run_dir.path, newest)
        if newest not in alive_attempts(hello) or record.get("hosts") != names:
            return None
        self._say(f"muster: attempt {newest} goes on on {len(names)} hosts: taken over")
        return newest

    def _shaped(self, hosts: int) -> Cluster:
        """The cluster with as many hosts as there really are."""
        cluster = self._cluster
        if hosts == cluster.hosts:
            return cluster
        devices = cluster.num_devices
        if devices % (hosts * cluster.processes_per_host):
            rule = f"the API reports {hosts} hosts, and the config has {cluster.hosts}"
            raise ConfigError("cluster.hosts", f"{rule}; leave it out", cluster.hosts)
        each = devices // (hosts * cluster.processes_per_host)
        self._say(f"muster: the slices have {hosts} hosts of {each} chips, not {cluster.hosts}")
        return dataclasses.replace(cluster, hosts=hosts, devices_per_process=each)
