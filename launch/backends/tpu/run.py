"""`muster run` on TPUs: machines, attempts on them, other machines where those are taken away, and
in the end none."""

from __future__ import annotations

import dataclasses
import random
import shlex
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from launch import contract, live, rundir, stop
from launch.backends.tpu import commands, gcloud, plans
from launch.backends.tpu.code import pack
from launch.backends.tpu.fleet import Fleet
from launch.backends.tpu.gcloud import GcloudError
from launch.backends.tpu.ledger import Ledger
from launch.backends.tpu.machines import Lease, TpuMachines
from launch.backends.tpu.nodes import Node, list_nodes
from launch.backends.tpu.plans import CONFIG_PLACE, GangSpec, Prepared
from launch.backends.tpu.prepare import Hosts, LostError, UnreachedError, alive_attempts
from launch.backends.tpu.ssh import Host, hosts_of, summary
from launch.backends.tpu.states import is_lost, trouble
from launch.control import control, record_run
from launch.events import Verdict
from launch.ownership import RunDir
from launch.program import Program, without_secrets
from launch.request import Request
from launch.restart import Outcome, Restarts, outcome_of
from launch.signals import Signals
from launch.spec import Cluster, ConfigError, plain
from launch.submission import frozen_config, write_submission
from launch.times import duration, seconds_of

_LOOK_SECONDS = 0.2  # Between two looks for a request to stop, while machines are waited for.


class _Stopped(Exception):
    """The user wants the run to end."""


def run(
    request: Request, run_dir: RunDir, on_started: Callable[[], None], end: bool = False
) -> int:
    """Be the controller of a run on TPUs; returns the run's exit code.

    Args:
      request: what to run.
      run_dir: held by this process.
      on_started: called once, when the gang has started or machines are being waited for.
      end: the run is to be stopped, and what it has to be given back; nothing is asked for.
    """
    return _Run(request, run_dir, on_started, end).run()


class _Run:
    def __init__(
        self, request: Request, run_dir: RunDir, on_started: Callable[[], None], end: bool
    ):
        self._request = request
        self._run_dir = run_dir
        self._on_started = on_started
        self._end = end
        self._ledger = Ledger(run_dir.path, run_dir.run_id)
        self._signals = Signals()
        self._requests = stop.StopRequests(run_dir.path)
        self._fleet = Fleet(request.cluster, self._ledger, _say, self._pause)
        self._history: list[Outcome] = []
        self._look_due = self._live_due = 0.0
        self._folder = Path()

    def run(self) -> int:
        """See the run through."""
        gcloud.check_installed()
        version = record_run(self._request, self._run_dir)
        if not self._end:
            write_submission(self._run_dir.path, self._request)
        try:
            with tempfile.TemporaryDirectory(dir=self._run_dir.path, prefix=".code-") as folder:
                self._folder = Path(folder)
                with self._signals.caught(TpuMachines.signals):
                    return self._attempts()
        finally:
            live.clear(self._run_dir.path)
            version.join()

    def _attempts(self) -> int:
        release = True
        try:
            while True:
                try:
                    lease, cluster = self._lease()
                except LostError as error:
                    code = self._count_loss(str(error))
                    if code is None and isinstance(error, UnreachedError):
                        # Whatever is wrong with them: others may be better.
                        self._fleet.delete(self._ledger.owned)
                    if code is not None:
                        return code
                    continue
                if lease is None:
                    _say("muster: stopped; start the same command again to go on")
                    return contract.EXIT_RESUMABLE
                machines = self._machines(cluster, lease)
                code, again = self._control(cluster, lease, machines)
                if machines.displaced:
                    release = False  # Whoever took the run over is the one to go on.
                    return code
                if again is None:
                    return code
                self._wait(again)
        except _Stopped:
            _say("muster: stopped; start the same command again to go on")
            return contract.EXIT_RESUMABLE
        except GcloudError as error:
            raise ConfigError("", f"Google Cloud refuses it: {error}") from None
        finally:
            if release:
                self._release()

    def _control(
        self, cluster: Cluster, lease: Lease, machines: TpuMachines
    ) -> tuple[int, float | None]:
        """Run attempts on these machines; the exit code, and the wait until there are to be others
        (None if not)."""
        names = tuple(prepared.host.name for prepared in lease.hosts)
        before = rundir.next_attempt(self._run_dir.path) - (lease.adopts is not None)
        controller = control(
            dataclasses.replace(self._request, cluster=cluster),
            self._run_dir,
            machines,
            names,
            on_started=self._on_started,
            history=tuple(self._history),
            requests=self._requests,
            stops_at_once=self._end,
            queued=True,
            mends_machines=True,
        )
        try:
            code = controller.run()
        finally:
            machines.close()
        self._on_started = lambda: None
        for number in range(before, rundir.next_attempt(self._run_dir.path)):
            record = rundir.attempt_record(self._run_dir.path, number)
            if record.get("cause"):
                self._history.append(outcome_of(record))
        if controller.requeue is None:
            return code, None
        return code, controller.requeue.delay_seconds

    def _count_loss(self, message: str) -> int | None:
        """Machines were lost before an attempt began on them; the exit code if that is the end."""
        _say(f"muster: {message}")
        restarts = Restarts(
            self._request.cluster.restart,
            reports=False,
            furthest_step=rundir.furthest_step(self._run_dir.path),
            rng=random.Random(),
        )
        verdict = Verdict("preempted", contract.EXIT_RESUMABLE, message)
        self._history.append(Outcome(verdict, None, None))
        for outcome in self._history:
            retry = restarts.after(outcome)
        _say(f"muster: {retry.why}")
        if not retry.again:
            return contract.EXIT_RESUMABLE
        self._wait(retry.delay_seconds)
        return None

    def _release(self) -> None:
        """Give the machines back, at the end."""
        self._write_live(live.RELEASING)
        ledger = self._ledger
        if self._request.cluster.tpu.keep and ledger.owned and not self._end:
            ledger.kept = True
            ledger.write()
            names = ", ".join(one.name for one in ledger.owned)
            _say(f"muster: kept, and to be paid for: {names}; `muster gc` deletes them no sooner "
                 f"than you say `muster stop {self._run_dir.path}`")  # fmt: skip
            return
        self._fleet.release()

    # ------------------------------------------------------------------ machines

    def _lease(self) -> tuple[Lease | None, Cluster]:
        """Have machines with everything on them. None for nothing to be ended.

        Raises:
          LostError: machines were there, and are lost.
          ConfigError: it cannot be.
        """
        cluster, spec = self._request.cluster, self._request.cluster.tpu
        code = pack(spec.send_code and not self._end, spec.max_file_bytes, self._run_dir.path,
                    self._folder)  # fmt: skip
        self._ledger.kept = False
        if self._end and not self._ledger.open:
            return None, cluster
        if self._end:
            nodes = self._still_there()
            if nodes is None:
                return None, cluster
        else:
            nodes = self._fleet.acquire()
        open_ = self._ledger.open
        zone = open_[-1].zone
        hosts = self._reach(zone, nodes)
        cluster = _shaped(cluster, len(hosts))
        connections = Hosts(
            hosts, self._run_dir.run_id, spec.silent_seconds, _say, self._watcher(zone, nodes)
        )
        try:
            adopts = self._adopts(connections)
            if self._end and adopts is None:
                return None, cluster
            prepared = connections.prepare(cluster, code, adopts, self._run_dir.path / "setup")
        except BaseException:
            connections.close()
            raise
        if adopts is None:
            # What nobody brought to an end is over now: its processes were ended.
            self._run_dir.close_abandoned()
        ids = tuple(one.name for one in open_)
        created = seconds_of(self._ledger.created_at) or time.time()
        lease = Lease(
            prepared,
            connections,
            zone,
            spec.project,
            tuple(node.name for node in nodes),
            plans.full_names(open_, nodes[0].project),
            ids,
            created + spec.max_lifetime_seconds,
            adopts,
        )
        return lease, cluster

    def _still_there(self) -> list[Node] | None:
        """The nodes that the run has, if all are in order."""
        found = []
        for asked in self._ledger.open:
            there = list_nodes(asked.project, asked.zone)
            found += [there.get(name, Node(name)) for name in asked.nodes]
        return None if not found or any(is_lost(node) for node in found) else found

    def _reach(self, zone: str, nodes: list[Node]) -> list[Host]:
        """How all workers are reached, from gcloud, node by node side by side."""
        limit = time.monotonic() + self._request.cluster.tpu.silent_seconds
        hosts: dict[int, list[Host]] = {}
        while True:
            problems: dict[str, str] = {}
            threads = []

            def reach(index: int, problems: dict[str, str] = problems) -> None:
                try:
                    node = nodes[index]
                    hosts[index] = hosts_of(self._request.cluster, zone, node, index)
                except GcloudError as error:
                    problems[nodes[index].name] = error.said

            for index in range(len(nodes)):
                if index not in hosts:
                    threads.append(threading.Thread(target=reach, args=(index,), daemon=True))
                    threads[-1].start()
            watch = self._watcher(zone, nodes)
            while any(thread.is_alive() for thread in threads):
                watch()
                time.sleep(0.05)
            if not problems:
                return [host for index in range(len(nodes)) for host in hosts[index]]
            _say(f"muster: gcloud does not reach {summary(problems)}")
            if time.monotonic() > limit:
                raise UnreachedError(f"gcloud does not reach {summary(problems)}")
            self._pause(2.0)

    def _watcher(self, zone: str, nodes: list[Node]) -> Callable[[], None]:
        """Something to be called often, that raises when a node is lost or the run is to stop."""
        project, every = self._request.cluster.tpu.project, self._request.cluster.tpu.poll_seconds
        due = time.monotonic() + every

        def watch() -> None:
            nonlocal due
            self._look_for_stop()
            if time.monotonic() < due:
                return
            try:
                there = list_nodes(project, zone)
            except GcloudError:
                return
            finally:
                due = time.monotonic() + every
            for node in nodes:
                now = there.get(node.name, Node(node.name))
                found = trouble(now)
                if is_lost(now) and found:
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
        _say(f"muster: attempt {newest} goes on on {len(names)} hosts: taken over")
        return newest

    def _machines(self, cluster: Cluster, lease: Lease) -> TpuMachines:
        storage = storage_of(self._request, self._run_dir)
        program, files = remote_program(self._request, storage)
        return TpuMachines(
            cluster,
            program,
            files=files,
            storage=storage,
            run_dir=self._run_dir,
            lease=lease,
            say=_say,
        )

    # ------------------------------------------------------------------ waiting

    def _wait(self, seconds: float) -> None:
        if seconds > 0:
            _say(f"muster: again in {duration(seconds)}")
            self._pause(seconds)

    def _pause(self, seconds: float) -> None:
        """Wait; whoever started this in the background need not.

        Raises:
          _Stopped: the run is to end.
        """
        self._on_started()
        self._on_started = lambda: None
        limit = time.monotonic() + seconds
        while True:
            self._look_for_stop()
            left = limit - time.monotonic()
            if left <= 0:
                return
            time.sleep(min(_LOOK_SECONDS, left))

    def _look_for_stop(self) -> None:
        now = time.monotonic()
        if now >= self._live_due:
            self._live_due = now + live.EVERY_SECONDS
            self._write_live(live.ACQUIRING)
        if self._signals.take():
            raise _Stopped
        if now >= self._look_due:
            self._look_due = now + _LOOK_SECONDS
            if self._requests.poll():
                raise _Stopped

    def _write_live(self, state: str) -> None:
        live.write(self._run_dir.path, max(0, rundir.next_attempt(self._run_dir.path) - 1), state)


def _shaped(cluster: Cluster, hosts: int) -> Cluster:
    """A cluster with as many hosts as there really are."""
    if hosts == cluster.hosts:
        return cluster
    devices = cluster.num_devices
    if devices % (hosts * cluster.processes_per_host):
        rule = f"the API reports {hosts} hosts, and the config has {cluster.hosts}"
        raise ConfigError("cluster.hosts", f"{rule}; leave it out", cluster.hosts)
    each = devices // (hosts * cluster.processes_per_host)
    _say(f"muster: the slices have {hosts} hosts of {each} chips, not {cluster.hosts}")
    return dataclasses.replace(cluster, hosts=hosts, devices_per_process=each)


def storage_of(request: Request, run_dir: RunDir) -> str | None:
    """The run's own directory for what lasts."""
    base = request.cluster.tpu.storage
    return None if base is None else f"{base.rstrip('/')}/{run_dir.name}-{run_dir.run_id}"


def remote_program(request: Request, storage: str | None) -> tuple[Program, dict[str, str]]:
    """The program as it runs on the hosts, and the files that go along.

    Raises:
      ConfigError: the trainer has nowhere to keep its checkpoints.
    """
    if request.config is None:
        return request.program, {}
    if storage is None:
        rule = (
            "is missing: checkpoints go there, for machines come and go; give gs://BUCKET/DIRECTORY"
        )
        raise ConfigError("cluster.tpu.storage", rule)
    argv = list(request.program.argv)
    source = next(word for word in argv if word.startswith("--config="))
    text = frozen_config(plain(request.config), source.partition("=")[2])
    if text is None:
        rule = "holds values that have no form as text, and must be in the current directory's tree"
        raise ConfigError("--config", rule, source.partition("=")[2])
    return (
        Program(
            ("python", "-m", "trainer.main", f"--config={CONFIG_PLACE}", f"--workdir={storage}")
        ),
        {plans.CONFIG: text},
    )


def dry_run(request: Request) -> None:
    """Print every gcloud command in order, what goes over ssh, and a plan of an agent."""
    cluster = request.cluster
    record = rundir.read_record(request.workdir / contract.RUN_RECORD) or {}
    run_id = str(record.get("id") or "RUN")
    fleet = Fleet(cluster, Ledger(request.workdir, run_id), _say, time.sleep)
    print("# gcloud, in this order; what is waited for is asked for again and again")
    for argv in commands.shown_in_dry_run(cluster, fleet.labels, run_id):
        print(shlex.join(argv))
    storage = None
    if cluster.tpu.storage is not None:
        storage = f"{cluster.tpu.storage.rstrip('/')}/{request.workdir.name}-{run_id}"
    program, files = remote_program(request, storage)
    for plan in rendered(cluster, program, files, storage, run_id):
        for process in plan["processes"]:
            print(f"\n# process {process['process_id']}/{cluster.num_processes} on {plan['host']}")
            print(shlex.join(["cd", plan["cwd"]]))
            env = without_secrets(process["env"])
            words = ["env", *(f"{name}={value}" for name, value in env.items())]
            print(shlex.join([*words, *process["argv"]]))


def rendered(
    cluster: Cluster, program: Program, files: dict[str, str], storage: str | None, run_id: str
) -> list[dict[str, Any]]:
    """The agents' plans of a first attempt, on hosts that are not there yet."""
    spec = cluster.tpu
    name = commands.resource_name(run_id, 0)
    if spec.nodes:
        nodes = spec.nodes
    elif spec.way == "queued":
        nodes = commands.node_names(cluster, name)
    else:
        nodes = tuple(commands.resource_name(run_id, i) for i in range(cluster.slices))
    each = cluster.hosts // cluster.slices
    home = "~/.muster"
    code = f"{home}/code/DIGEST"
    bins = (f"{home}/env/KEY/venv/bin",) if spec.packages else ()
    python = f"{bins[0]}/python" if bins else spec.python
    hosts = tuple(
        Prepared(
            Host(f"{node}-w{worker}", node, index, worker, f"{node}-w{worker}", ()),
            home,
            code,
            spec.container_python if spec.container else python,
            bins,
            (code,),
        )
        for index, node in enumerate(nodes)
        for worker in range(each)
    )
    coordinator = f"{hosts[0].host.address}:PORT"
    gang = GangSpec(run_id, 0, coordinator, hosts, storage, spec.max_lifetime_seconds, files, (),
                    "DIGEST")  # fmt: skip
    return plans.render(cluster, program, gang)


def check(request: Request) -> None:
    """Refuse before anything is asked for what could not be sent, or has nowhere to go.

    Raises:
      ConfigError: says what.
    """
    gcloud.check_installed()
    remote_program(request, request.cluster.tpu.storage)
    spec = request.cluster.tpu
    with tempfile.TemporaryDirectory() as folder:
        pack(spec.send_code, spec.max_file_bytes, request.workdir, Path(folder))


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
