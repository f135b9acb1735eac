"""A real SLURM on this machine: munged, slurmctld and several slurmd, all of them ours.

Every node is a slurmd with a name and a port of its own on the loopback interface. Times are short
(KillWait, the life of a credential), so that what takes minutes in a data centre takes seconds.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from launch import rundir
from launch.agent.processes import descendants
from tests.testing.gangs import MusterCommand, wait_until

# What each command needs of Debian's packages.
PACKAGES = {
    "slurmctld": "slurmctld",
    "slurmd": "slurmd",
    "sbatch": "slurm-client",
    "munged": "munge",
}
NODES = ("node1", "node2", "node3", "node4")
GPUS_PER_NODE = 2
CPUS_PER_NODE = 4  # Counted; the machine may have fewer.
_START_SECONDS = 30.0
_STOP_SECONDS = 10.0
_SBIN = ("/usr/sbin", "/sbin")

_CONF = """\
ClusterName=muster
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ctld_port}
SlurmUser=root
AuthType=auth/munge
CryptoType=crypto/munge
AuthInfo=socket={munge_socket},cred_expire=5
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool/%n
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd-%n.pid
SlurmctldLogFile={root}/slurmctld.log
SlurmdLogFile={root}/slurmd-%n.log
SlurmdParameters=config_overrides
SlurmctldParameters=enable_configless
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SwitchType=switch/none
JobAcctGatherType=jobacct_gather/none
JobCompType=jobcomp/filetxt
JobCompLoc={root}/jobcomp.txt
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=2,batch_sched_delay=0,sched_min_interval=200000
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
KillWait=15
SlurmdTimeout=15
SlurmctldTimeout=30
MessageTimeout=8
OverTimeLimit=0
ReturnToService=1
MinJobAge=300
InactiveLimit=0
GresTypes=gpu
TmpFS={root}
{node_lines}
PartitionName=low Nodes={nodes} Default=YES MaxTime=60 State=UP PriorityTier=1 GraceTime=30 \
OverSubscribe=NO
PartitionName=high Nodes={nodes} MaxTime=60 State=UP PriorityTier=10 PreemptMode=OFF \
OverSubscribe=NO
PartitionName=small Nodes=node1 MaxTime=10 MaxNodes=1 State=UP PriorityTier=1 OverSubscribe=NO
"""


def missing_packages() -> list[str]:
    """The packages that a real SLURM needs and that are not there."""
    return sorted({package for command, package in PACKAGES.items() if not _which(command)})


def _which(command: str) -> str | None:
    return shutil.which(command, path=os.pathsep.join([os.environ.get("PATH", ""), *_SBIN]))


class Slurm:
    """A running SLURM. Start it with `running`."""

    def __init__(self, root: Path):
        self.root = root
        self.conf = root / "slurm.conf"
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}

    @property
    def env(self) -> dict[str, str]:
        """What SLURM's commands need in their environment to find this one."""
        return {"SLURM_CONF": str(self.conf)}

    def command(self, *argv: str, check: bool = True) -> str:
        """Run one of SLURM's commands; its output."""
        done = subprocess.run(
            argv,
            env={**os.environ, **self.env},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert not check or done.returncode == 0, (argv, done.returncode, done.stderr)
        return done.stdout

    def job(self, job_id: str) -> dict[str, str]:
        """What `scontrol show job` says of a job."""
        words = self.command("scontrol", "show", "job", "-o", job_id).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def start_controller(self) -> None:
        """Start slurmctld."""
        self._start("slurmctld", "-D", "-i")

    def start_node(self, node: str) -> None:
        """Start a node's slurmd."""
        self._start(f"slurmd {node}", "-D", "-N", node)

    def kill(self, daemon: str) -> None:
        """Kill a daemon, as a crash would: `slurmctld` or `slurmd NODE`."""
        self._daemons[daemon].kill()
        self._daemons.pop(daemon).wait()

    def heal(self) -> None:
        """Cancel what is there, and bring back what a test has taken away."""
        for name, daemon in list(self._daemons.items()):
            daemon.send_signal(signal.SIGCONT)
            if daemon.poll() is not None:
                del self._daemons[name]
        if "slurmctld" not in self._daemons:
            self.start_controller()
        for node in NODES:
            if f"slurmd {node}" not in self._daemons:
                self.start_node(node)
        wait_until(lambda: "UP" in self.command("scontrol", "ping"), "slurmctld to be up", 60.0)
        self.command("scancel", "--user=root", check=False)
        for node in NODES:
            self.command("scontrol", "update", f"NodeName={node}", "State=RESUME", check=False)
        wait_until(lambda: not self.command("squeue", "-h").strip(), "the queue to be empty", 60.0)
        self.wait_for_nodes()

    def cut_power(self, node: str) -> None:
        """Kill a node's daemon and all that SLURM has started there, at once."""
        daemon = self._daemons.pop(f"slurmd {node}")
        daemon.kill()
        self._kill_steps(SLURMD_NODENAME=node)
        daemon.wait()

    def suspend(self, daemon: str, stopped: bool = True) -> None:
        """Stop a daemon where it is, or let it go on."""
        self._daemons[daemon].send_signal(signal.SIGSTOP if stopped else signal.SIGCONT)

    def wait_for_nodes(self, states: Sequence[str] = ("idle",)) -> None:
        """Wait until all nodes are in one of these states."""
        limit = time.monotonic() + _START_SECONDS
        while time.monotonic() < limit:
            seen = self.command("sinfo", "-h", "-N", "-p", "low", "-o", "%N %t", check=False)
            lines = [line.split() for line in seen.splitlines()]
            if len(lines) == len(NODES) and all(state in states for _, state in lines):
                return
            time.sleep(0.1)
        raise AssertionError(f"nodes are not {states}: {seen}; see {self.root}")

    def _start(self, name: str, *arguments: str, **env: str) -> None:
        command = name.split(maxsplit=1)[0]
        binary = _which(command)
        assert binary is not None, command
        log = open(self.root / f"{name.replace(' ', '-')}.out", "ab")  # noqa: SIM115
        with log:
            self._daemons[name] = subprocess.Popen(
                [binary, *arguments],
                env={**os.environ, **self.env, **env},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def set_up(self) -> None:
        """Write the configuration and start everything."""
        for name in ("state", "spool", "munge"):
            (self.root / name).mkdir(mode=0o755)
        self.root.chmod(0o755)
        key = self.root / "munge" / "key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o600)
        ports = _free_ports(1 + len(NODES))
        host = os.uname().nodename
        munge_socket = self.root / "munge" / "socket"
        node_lines = [
            f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} "
            f"CPUs={CPUS_PER_NODE} RealMemory=8192 Gres=gpu:{GPUS_PER_NODE} State=UNKNOWN"
            for node, port in zip(NODES, ports[1:], strict=True)
        ]
        text = _CONF.format(
            host=host,
            ctld_port=ports[0],
            munge_socket=munge_socket,
            root=self.root,
            nodes="node[1-4]",
            node_lines="\n".join(node_lines),
        )
        self.conf.write_text(text)
        devices = [self.root / f"gpu{i}" for i in range(GPUS_PER_NODE)]
        for device in devices:
            os.mknod(device, 0o666 | 0o020000, os.makedev(1, 3))  # Copies of /dev/null.
        files = f"{self.root}/gpu[0-{GPUS_PER_NODE - 1}]"
        (self.root / "gres.conf").write_text(f"NodeName=node[1-4] Name=gpu File={files}\n")
        self._start(
            "munged",
            "--foreground",
            "--force",
            f"--key-file={key}",
            f"--socket={munge_socket}",
            f"--pid-file={self.root}/munge/pid",
            f"--seed-file={self.root}/munge/seed",
            f"--log-file={self.root}/munge/log",
        )
        _wait_for(munge_socket.exists, "munged")
        self.start_controller()
        for node in NODES:
            self.start_node(node)
        self.wait_for_nodes()

    def tear_down(self) -> None:
        """End every job, then every daemon that we started."""
        with contextlib.suppress(AssertionError, subprocess.TimeoutExpired):
            self.command("scancel", "--user=root", check=False)
            limit = time.monotonic() + _STOP_SECONDS
            while self.command("squeue", "-h", check=False).strip() and time.monotonic() < limit:
                time.sleep(0.2)
        for name in reversed(list(self._daemons)):
            daemon = self._daemons[name]
            daemon.send_signal(signal.SIGCONT)
            daemon.terminate()
        for daemon in self._daemons.values():
            try:
                daemon.wait(_STOP_SECONDS)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        # Step daemons outlive a slurmd that was killed, and wait to tell it of their end.
        self._kill_steps()

    def _kill_steps(self, **wanted: str) -> None:
        """Kill the step daemons of this SLURM, and what is below them, by their environment."""
        ours = {"SLURM_CONF": str(self.conf), **wanted}.items()
        for pid in [pid for pid in _steps() if ours <= _environment(pid).items()]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


@contextlib.contextmanager
def running(root: Path) -> Iterator[Slurm]:
    """A SLURM with its files below `root`, started, and ended at the end."""
    slurm = Slurm(root)
    try:
        slurm.set_up()
        yield slurm
    finally:
        slurm.tear_down()


def _steps() -> list[int]:
    """Step daemons of any SLURM here, and what is below them."""
    roots = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                if b"slurmstepd:" in (entry / "cmdline").read_bytes():
                    roots.append(int(entry.name))
    return roots + [pid for root in roots for pid in descendants(root)]


def _environment(pid: int) -> dict[str, str]:
    """A process's environment; of a step daemon, that of its first task."""
    try:
        words = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return {}
    pairs = [word.decode(errors="replace").partition("=") for word in words]
    found = {name: value for name, _, value in pairs}
    if "SLURMD_NODENAME" not in found:
        below = descendants(pid)
        if below and below[0] != pid:
            return _environment(below[0])
    return found


def _wait_for(condition, what: str) -> None:
    limit = time.monotonic() + _START_SECONDS
    while not condition():
        assert time.monotonic() < limit, f"{what} did not start"
        time.sleep(0.02)


def _free_ports(count: int) -> list[int]:
    """Ports that nobody listens at now."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()


class SlurmMuster(MusterCommand):
    """`muster` on a SLURM."""

    def __init__(self, folder: Path, **cluster: Any):
        """Other keyword arguments are fields of the cluster config; `slurm` adds to its section."""
        section = {"partition": "low", "time": "10", "cpus_per_process": 1, "warning_seconds": 10.0}
        fields = {
            "backend": "slurm",
            "hosts": 2,
            "lease_seconds": 5.0,
            "restart": {"max_failures": 2, "max_preemptions": 5, "backoff_seconds": 0.2},
            **cluster,
            "slurm": {**section, **cluster.get("slurm", {})},
        }
        super().__init__(folder, **fields)

    def job_id(self) -> str:
        """The run's newest job, waited for."""

        def look() -> str | None:
            jobs = (rundir.read_record(self.workdir / "jobs.json") or {}).get("jobs") or [{}]
            return jobs[-1].get("job_id")

        wait_until(look, "a job")
        return str(look())

    def causes(self) -> list[str]:
        """How the attempts have ended, in order."""
        numbers = rundir.attempt_numbers(self.workdir)
        return [str(self.attempt(number)["cause"]) for number in numbers]

    def wait_for_step(self, step: int, number: int = 0) -> None:
        """Wait until every process of an attempt has reported a step."""

        def all_there() -> bool:
            path = rundir.attempt_path(self.workdir, number)
            records = [rundir.read_record(rundir.progress_path(path, i)) for i in range(4)]
            return all(record and record.get("step", -1) >= step for record in records)

        wait_until(all_there, f"step {step} of attempt {number}", 90.0)
