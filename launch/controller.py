"""Runs a gang, attempt after attempt: carries what happens to the supervisor, and out what it says.

Whoever has the run directory is the controller: `muster run` itself, or what it left behind with
`--detach`.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from launch import live, rundir, stop
from launch.agent.processes import become_subreaper
from launch.channel import Channel
from launch.console import Console
from launch.events import (
    Action,
    Close,
    Event,
    Finish,
    GangGone,
    Interrupted,
    Kill,
    Requeue,
    Retry,
    Start,
    Stop,
    StopRequested,
    TakeStacks,
    Tick,
    Verdict,
)
from launch.gang import Gang
from launch.ownership import Attempt, RunDir
from launch.signals import Signals
from launch.supervise import Supervisor
from launch.words import last_words

_POLL_SECONDS = 0.02  # Between two looks at the logs that are shown.
_TICK_SECONDS = 1.0  # Between two looks at how far the gang is.
_REQUESTS_SECONDS = 0.2  # Between two looks for a request to stop.
_BEFORE = ("init", "restore")  # In these phases the step is not yet known.


class Backend(Protocol):
    """How the controller starts things, and what it hears of the machines.

    Attributes:
      processes_per_host: members of the gang on each.
      lease_seconds: how long an agent's processes outlive the controller.
      come_seconds: how long an agent may take to come.
      backend_ids: what the machines are known by, for the attempt's record.
      signals: those that `signalled` can explain.
    """

    processes_per_host: int
    lease_seconds: float
    come_seconds: float
    backend_ids: tuple[str, ...]
    signals: Sequence[signal.Signals]

    def adopted(self) -> Attempt | None:
        """An attempt that runs on the machines already, to be followed in the place of a new one;
        None if there is none. Once."""

    def agents(
        self, hosts: Sequence[str], attempt: Attempt
    ) -> contextlib.AbstractContextManager[Sequence[tuple[Mapping[str, Any], Channel]]]:
        """The plan of each host's agent and the way to it, in order of hosts; what the context
        holds (a port) is given back at the end of the attempt."""

    def attend(self, gang: Gang, now: float) -> list[Event]:
        """What has become known of the machines; called many times a second."""

    def signalled(self, number: int) -> list[Event]:
        """What a signal to this process means."""

    def before_next(self) -> list[Event]:
        """What is to be known of the machines before an attempt's end is judged, whose gang is
        gone. May take seconds."""


class Controller:
    """Follows one run to its end."""

    def __init__(
        self,
        run_dir: RunDir,
        supervisor: Supervisor,
        backend: Backend,
        console: Console,
        *,
        on_started: Callable[[], None] = lambda: None,
        requests: stop.StopRequests | None = None,
        stops_at_once: bool = False,
    ):
        """Takes a run directory that this process holds.

        Args:
          run_dir: where everything is recorded.
          supervisor: decides.
          backend: starts agents.
          console: shows the processes' lines and ours.
          on_started: called once, when the first attempt's processes are all there or some
            cannot be.
          requests: the user's wishes for an end, if somebody has listened to them before.
          stops_at_once: the user has wished for it already.
        """
        self._run_dir = run_dir
        self._supervisor = supervisor
        self._backend = backend
        self._console = console
        self._on_started: Callable[[], None] | None = on_started
        self._selector = selectors.DefaultSelector()
        self._requests = requests or stop.StopRequests(run_dir.path)
        self._stops_at_once = stops_at_once
        self._signals = Signals()
        self._gang = Gang(self._selector, backend.lease_seconds)
        self._attempt: Attempt | None = None
        self._number = 0  # The newest attempt's.
        self._exit_code: int | None = None
        self._resources = contextlib.ExitStack()  # What the attempt holds.
        self._told: set[str] = set()  # What the gang was told, to say so once.
        self._tick_due = self._live_due = self._requests_due = 0.0
        self._again_at: float | None = None
        self._resumed_at: int | None = None
        self.requeue: Requeue | None = None

    def run(self) -> int:
        """See the run through; returns the exit code of `muster run`.

        `requeue` then says whether, and without which hosts, the run is to wait for machines again.
        """
        # What a killed agent leaves behind comes to this process, which kills it.
        become_subreaper()
        with self._signals.caught(self._backend.signals) as wakeup, self._resources:
            self._selector.register(wakeup, selectors.EVENT_READ)
            try:
                self._handle(Tick())
                if self._stops_at_once:
                    self._handle(StopRequested())
                while self._exit_code is None:
                    self._turn(wakeup)
            finally:
                self._gang.let_go()
                self._selector.close()
                live.clear(self._run_dir.path)
        return self._exit_code

    def _turn(self, wakeup: int) -> None:
        """Wait a little for news, and deal with it."""
        ready = [key.fd for key, _ in self._selector.select(_POLL_SECONDS)]
        if wakeup in ready:
            os.read(wakeup, 4096)
        now = time.monotonic()
        events: list[Event] = []
        for fd in ready:
            events += self._gang.read(fd, now)
        events += self._gang.beat(now)
        events += self._backend.attend(self._gang, now)
        events += self._stop_requests(now)
        if self._attempt is not None and self._gang.gone:
            events += [*self._backend.before_next(), GangGone()]
        deadline = self._supervisor.deadline
        if now >= self._tick_due or (deadline is not None and now >= deadline):
            self._tick_due = now + _TICK_SECONDS
            events.append(Tick())
        for event in events:
            self._handle(event)
        self._console.show_new()
        self._look_around(now)

    def _stop_requests(self, now: float) -> list[Event]:
        events: list[Event] = []
        for number in self._signals.take():
            events += self._backend.signalled(number)
        if now >= self._requests_due:
            self._requests_due = now + _REQUESTS_SECONDS
            events += [StopRequested()] * self._requests.poll()
        return events

    def _look_around(self, now: float) -> None:
        """What is told beside the events."""
        if self._signals.suspensions:
            self._signals.suspensions = 0
            self._console.say(
                "muster: not suspended: the gang would be stopped when it hears no more of this "
                "process; use --detach to have the terminal free"
            )
        self._tell_start()
        if now >= self._live_due:
            self._live_due = now + _TICK_SECONDS
            self._write_live(now)

    def _tell_start(self) -> None:
        started = len(self._gang.pids) == self._num_processes or bool(self._told)
        if self._on_started and self._attempt is not None and started:
            self._on_started()
            self._on_started = None
        if self._attempt and self._attempt.number and self._resumed_at is None:
            if any(report.phase not in _BEFORE for report in self._gang.progress.values()):
                self._resumed_at = rundir.steps_reached(self._attempt.path)["first_step"]
            if self._resumed_at is not None:
                self._console.say(
                    f"muster: attempt {self._attempt.number} goes on from step {self._resumed_at}"
                )

    @property
    def _num_processes(self) -> int:
        return self._attempt.num_processes if self._attempt else 0

    def _write_live(self, now: float) -> None:
        state = live.RUNNING
        if self._attempt is None:
            state = live.WAITING
        elif self._told:
            state = live.STOPPING
        elif len(self._gang.pids) < self._num_processes:
            state = live.STARTING
        wait = None if self._again_at is None else time.time() + max(0.0, self._again_at - now)
        live.write(self._run_dir.path, self._number, state, self._live_processes(now), wait)

    def _live_processes(self, now: float) -> list[live.LiveProcess]:
        if self._attempt is None:
            return []
        found = []
        for process_id, host in enumerate(self._attempt.process_hosts):
            if process_id in self._gang.ended:
                continue
            report = self._gang.progress.get(process_id)
            pid = self._gang.pids.get(process_id)
            shown = live.LiveProcess(process_id, host, pid)
            if report is not None:
                since = max(0.0, now - report.since)
                shown = live.LiveProcess(process_id, host, pid, report.step, report.phase, since)
            found.append(shown)
        return found

    # ------------------------------------------------------------------ what the supervisor wants

    def _handle(self, event: Event) -> None:
        if isinstance(event, Interrupted) and self._attempt is not None:
            self._attempt.note(event)
        for action in self._supervisor.handle(event, time.monotonic()):
            self._act(action, event)

    def _act(self, action: Action, event: Event) -> None:
        if isinstance(action, Start):
            self._start(action.hosts)
        elif isinstance(action, TakeStacks):
            self._gang.tell("stacks")
        elif isinstance(action, (Stop, Kill)):
            self._stop(action, asked=isinstance(event, StopRequested))
        elif isinstance(action, Close):
            self._close(action.verdict, action.retry)
        elif isinstance(action, Requeue):
            self.requeue = action
        elif isinstance(action, Finish):
            self._exit_code = action.exit_code
            if self._again_at is not None and self.requeue is None:
                self._console.say("muster: stopped; start the same command again to go on")

    def _start(self, hosts: tuple[str, ...]) -> None:
        """Start an attempt."""
        self._told = set()
        self._again_at = None
        self._resumed_at = None
        attempt = self._backend.adopted() or self._run_dir.new_attempt(
            list(hosts), self._backend.processes_per_host, self._backend.backend_ids
        )
        self._attempt, self._number = attempt, attempt.number
        agents = self._resources.enter_context(self._backend.agents(hosts, attempt))
        self._console.follow(attempt.path, attempt.num_processes)
        self._console.say(
            f"muster: run {self._run_dir.name} ({self._run_dir.run_id}), attempt {attempt.number}: "
            f"{attempt.num_processes} process{'es' * (attempt.num_processes > 1)} on "
            f"{len(hosts)} host{'s' * (len(hosts) > 1)}; logs in {attempt.path}"
        )
        self._gang = Gang(self._selector, self._backend.lease_seconds)
        self._gang.start(agents, time.monotonic(), self._backend.come_seconds)
        self._live_due = 0.0

    def _stop(self, action: Stop | Kill, asked: bool) -> None:
        command = "stop" if isinstance(action, Stop) else "kill"
        self._gang.tell(
            command, **({"seconds": action.seconds} if isinstance(action, Stop) else {})
        )
        if asked and command == "stop":
            self._console.say("muster: stopping; once more to kill at once")
        elif command == "kill" and "asked" in self._told:
            self._console.say(f"muster: killing what still runs: {action.reason}")
        self._told |= {command, "asked"} if asked else {command}

    def _close(self, verdict: Verdict, retry: Retry) -> None:
        """Record an attempt's end, and tell it."""
        attempt = self._attempt
        assert attempt is not None
        self._console.show_new(last=True)
        guilty = verdict.guilty_process
        report = self._gang.progress.get(-1 if guilty is None else guilty)
        lead = self._gang.progress.get(0)
        attempt.close(
            verdict,
            retry,
            report.step if report else None,
            lead.step if lead else None,
        )
        self._resources.close()
        self._attempt = None
        self._again_at = time.monotonic() + retry.delay_seconds if retry.again else None
        if self._gang.leftover:
            left = ", ".join(map(str, self._gang.leftover))
            self._console.say(f"muster: these processes could not be killed: {left}")
        if verdict.cause != "config":
            self._console.show_held()
        for line in last_words(verdict, retry, attempt.path):
            self._console.say(line)
        self._write_live(time.monotonic())
