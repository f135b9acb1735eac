"""Inside of a job: the controller's way to the nodes and to SLURM."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from launch import contract, rundir
from launch.agent.processes import die_with_parent
from launch.backends.host_plan import AttemptSpec
from launch.backends.local import reserve_port
from launch.backends.slurm import client, step
from launch.backends.slurm.client import Job
from launch.backends.slurm.door import Door
from launch.backends.slurm.job_watch import JobWatch
from launch.channel import Channel, RemoteChannel
from launch.console import last_lines
from launch.events import Event, HostLeaving, Interrupted, StopRequested
from launch.gang import Gang
from launch.ownership import Attempt, RunDir
from launch.program import Program
from launch.spec import Cluster, ConfigError

_ASK_SECONDS = 5.0  # Between two looks at the job.
_STEP_END_SECONDS = 10.0  # How long srun may take to see that its agents have ended.
_MARGIN_SECONDS = 2.0  # To write the records before SLURM kills.
_NOTICE_LINES = 5  # In which SLURM's word on the job's end is looked for.
_SAVES = 2.0  # So many times the last save's duration is kept free before the time limit.
_DOWN = ("DOWN", "FAIL", "NOT_RESPONDING", "POWERING_DOWN", "POWERED_DOWN")
_LEAVING = (*_DOWN, "DRAIN", "MAINT")


class SlurmMachines:
    """The nodes of this job; see launch.controller.Backend."""

    signals: Sequence[signal.Signals] = (
        *(signal.SIGTERM, signal.SIGUSR2, signal.SIGINT),
        signal.SIGHUP,
    )

    def __init__(
        self,
        cluster: Cluster,
        program: Program,
        run_dir: RunDir,
        job_id: str,
        queued_since: str | None,
    ):
        """Asks SLURM what it has given.

        Args:
          cluster: what was asked for.
          program: what every process runs.
          run_dir: held by this process.
          job_id: this job's.
          queued_since: when it began to wait for its nodes, UTC ISO 8601.
        """
        self.processes_per_host = cluster.processes_per_host
        self.lease_seconds = cluster.lease_seconds
        self.come_seconds = cluster.watch.start_seconds
        array = os.environ.get("SLURM_ARRAY_JOB_ID")
        self.backend_ids: tuple[str, ...] = (job_id, array) if array else (job_id,)
        self._cluster = cluster
        self._program = program
        self._run_dir = run_dir
        self._owner = rundir.last_owner(run_dir.path)
        self._job_id = job_id
        self._queued_since = queued_since
        self._nodes = os.environ["SLURM_JOB_NODELIST"]
        self._restarts = int(os.environ.get("SLURM_RESTART_COUNT") or 0)
        self._kill_wait_seconds = client.kill_wait_seconds()
        self._address = self._find_address()
        self._watch = JobWatch(job_id, _ASK_SECONDS)
        self._srun: subprocess.Popen[bytes] | None = None
        self._explained: set[str] = set()  # Hosts whose agents were told to stop, and it is known.
        self._interrupted = ""  # Why, once it was said.
        self._look_due = 0.0
        self._progress: Path | None = None

    @property
    def taken_away(self) -> bool:
        """Whether SLURM itself has ended this start of the job."""
        job = self._watch.job
        return self._watch.gone or (job is not None and self._lost(job))

    @property
    def displaced(self) -> bool:
        """Whether somebody else holds the run by now."""
        return self._owner != rundir.last_owner(self._run_dir.path)

    def _lost(self, job: Job) -> bool:
        return job.restarts > self._restarts or job.state not in ("RUNNING", "CONFIGURING")

    def _find_address(self) -> str:
        """This node's address: the one that SLURM itself uses, if it is the node's own."""
        node = os.environ.get("SLURMD_NODENAME", os.uname().nodename)
        names = [node, os.uname().nodename]
        with suppress(client.UnavailableError, KeyError):
            names.insert(0, client.nodes(node)[node]["NodeAddr"])
        for name in names:
            with suppress(OSError):
                address = socket.gethostbyname(name)
                reserve_port(address).close()
                return address
        rule = f"none of {', '.join(names)} is an address of this node; SLURM's NodeAddr should be"
        raise ConfigError("", rule)

    # ------------------------------------------------------------------ the agents

    def adopted(self) -> Attempt | None:
        """See launch.controller.Backend: what a controller has left is ended, not followed."""
        return None

    @contextmanager
    def agents(
        self, hosts: Sequence[str], attempt: Attempt
    ) -> Iterator[list[tuple[Mapping[str, Any], Channel]]]:
        """See launch.controller.Backend: one srun step brings an agent to each node."""
        with reserve_port(self._address) as reservation:
            coordinator = f"{self._address}:{reservation.getsockname()[1]}"
            spec = AttemptSpec(self._run_dir.path, attempt.number, tuple(hosts), coordinator)
            channels = {host: RemoteChannel(host) for host in hosts}
            door = Door(self._address, attempt.path / "door.json", channels)
            self._progress = rundir.progress_path(attempt.path, 0)
            self._explained = set()
            if self._queued_since is not None:
                attempt.write(queued_since=self._queued_since)
                self._queued_since = None  # The next one waits for nothing.
            try:
                self._srun = self._start_step(hosts, attempt, attempt.path / "door.json")
                plans = step.render(self._cluster, self._program, spec)
                yield [(plan, channels[plan["host"]]) for plan in plans]
            finally:
                door.close()
                self._end_step()

    def _start_step(
        self, hosts: Sequence[str], attempt: Attempt, door: Path
    ) -> subprocess.Popen[bytes]:
        argv = step.command(self._cluster, hosts, door, self._run_dir.path)
        log = os.open(attempt.path / "srun.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        try:
            return subprocess.Popen(
                argv,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                preexec_fn=die_with_parent(os.getpid()),  # noqa: PLW1509 (it only calls prctl)
            )
        finally:
            os.close(log)

    def _end_step(self) -> None:
        if self._srun is None:
            return
        for end in (lambda: None, self._srun.terminate, self._srun.kill):
            end()
            try:
                self._srun.wait(_STEP_END_SECONDS)
                break
            except subprocess.TimeoutExpired:
                continue
        self._srun = None

    # ------------------------------------------------------------------ what SLURM wants

    def attend(self, gang: Gang, now: float) -> list[Event]:
        """See launch.controller.Backend."""
        events: list[Event] = []
        if self._srun is not None and self._srun.poll() is not None:
            for host in gang.absent:  # They will not come any more.
                events += gang.give_up(host, now)
        if gang.signalled - self._explained:
            self._explained |= gang.signalled
            events += self._explain(batch=False)
        if now >= self._look_due:
            self._look_due = now + 1.0
            events += self._look()
        return events

    def signalled(self, number: int) -> list[Event]:
        """See launch.controller.Backend."""
        if number == signal.SIGUSR2:
            # The time limit is near, or the job is to be preempted; what SLURM says is exact.
            self._watch.look_again()
            return []
        if number != signal.SIGTERM:
            return [StopRequested()]
        return self._explain(batch=True)

    def before_next(self) -> list[Event]:
        """See launch.controller.Backend."""
        try:
            found = client.nodes(self._nodes)
        except client.UnavailableError:
            return []
        return [HostLeaving(node) for node, words in found.items() if _is(words, _LEAVING)]

    def _look(self) -> list[Event]:
        """What the last answer of SLURM's asks for."""
        if self.displaced:
            return self._interrupt("host_lost", "another job has taken this run over", 0.0)
        job = self._watch.job
        if job is None:
            return []
        if self._watch.gone or self._lost(job):
            return self._explain(batch=True)
        left = float("inf") if job.end_at is None else job.end_at - time.time()
        if job.preempted_at is not None:
            return self._preempted(left - _MARGIN_SECONDS)
        if left > self._needed_seconds():
            return []
        message = f"the time limit of job {self._job_id} is {max(0.0, left):.0f} s away"
        return self._interrupt("time_limit", message, left - _MARGIN_SECONDS)

    def _needed_seconds(self) -> float:
        """How long before the time limit the gang is asked to leave."""
        saved = save_seconds(self._progress) if self._progress else 0.0
        least = self._cluster.slurm.warning_seconds
        return needed_seconds(least, saved, self._kill_wait_seconds)

    def _explain(self, batch: bool) -> list[Event]:
        """Find out who wants the gang to end.

        Args:
          batch: the batch script was told, and not only the step of the agents.
        """
        left = self._kill_wait_seconds - _MARGIN_SECONDS
        try:
            job = self._ask()
        except client.UnavailableError:
            message = "SLURM wants the job to end, and gives no answer why"
            return self._interrupt("preempted", message, left)
        if job is not None and job.restarts > self._restarts:
            down = self._down_nodes()
            if down or "NODE FAILURE" in self._notice():
                node = f"node {down[0]}" if down else "a node, which has come back since,"
                message = f"SLURM has lost {node} and put the job back into the queue"
                return self._interrupt("host_lost", message, left, down[0] if down else None)
            return self._interrupt("preempted", "SLURM has put the job back into the queue", left)
        if job is not None and job.preempted_at is not None:
            running = job.state == "RUNNING" and job.end_at is not None
            seconds = job.end_at - time.time() if running and job.end_at else left
            return self._preempted(seconds - _MARGIN_SECONDS if running else left)
        batch = batch or job is None or job.state != "RUNNING"
        if batch and job is not None and job.end_at is not None:
            limit = self._watch.limit_at
            if limit is not None and time.time() >= limit - _MARGIN_SECONDS:
                message = f"the time limit of job {self._job_id} is over"
                return self._interrupt("time_limit", message, left)
        if batch:
            return self._interrupt("stopped", f"job {self._job_id} was cancelled", left)
        message = "somebody has sent a signal to the job's processes"
        return self._interrupt("stopped", message, self._cluster.grace_seconds)

    def _ask(self) -> Job | None:
        """What SLURM says of the job now. The signal goes to every process of the job, and so it
        may end the very command that asks: it is asked again."""
        patience = min(self._kill_wait_seconds / 2, self.lease_seconds / 3)  # Leases wait for it.
        limit = time.monotonic() + patience
        while True:
            try:
                return client.job(self._job_id, timeout_seconds=patience)
            except client.UnavailableError:
                if time.monotonic() > limit:
                    raise
                time.sleep(0.1)

    def _down_nodes(self) -> list[str]:
        try:
            found = client.nodes(self._nodes)
        except client.UnavailableError:
            return []
        return [node for node, words in found.items() if _is(words, _DOWN)]

    def _notice(self) -> str:
        """Why SLURM ends the job, as its step daemon has written it into the job's output."""
        lines = last_lines(self._run_dir.path / contract.CONTROLLER_LOG, _NOTICE_LINES)
        told = [line for line in lines if f"*** JOB {self._job_id} ON " in line]
        return told[-1] if told else ""

    def _preempted(self, seconds: float) -> list[Event]:
        return self._interrupt("preempted", f"job {self._job_id} is preempted", seconds)

    def _interrupt(
        self, cause: str, message: str, seconds: float, host: str | None = None
    ) -> list[Event]:
        if self._interrupted == cause and not host:
            return []
        self._interrupted = cause
        self._watch.look_again()
        return [Interrupted(cause, message, max(0.0, seconds), host)]

    def close(self) -> None:
        """Ask SLURM no more."""
        self._watch.close()


def save_seconds(progress: Path) -> float:
    """How long the last save took, by a process's progress file; 0 where it does not say."""
    saved = (rundir.read_record(progress) or {}).get("save_seconds")
    return float(saved) if isinstance(saved, int | float) else 0.0


def needed_seconds(least: float, saved: float, kill_wait: float) -> float:
    """How long before the time limit a gang is asked to save and leave.

    Args:
      least: what the config asks for, seconds.
      saved: how long the last save took; 0 where none is known.
      kill_wait: kept free for the records and for what is slow to leave.
    """
    return max(least, _SAVES * saved + kill_wait if saved else 0.0)


def _is(words: Mapping[str, str], states: Sequence[str]) -> bool:
    """Whether a node is in one of these states: `IDLE+DRAIN`, `DOWN*`."""
    now = words.get("State", "").replace("*", "+NOT_RESPONDING").split("+")
    return any(state.startswith(wanted) for state in now for wanted in states)
