"""Drives one attempt: agents' events to the supervisor, its actions to the agents."""

from __future__ import annotations

import dataclasses
import json
import os
import select
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from launch import agent, rundir
from launch.backends import local
from launch.console import Console
from launch.supervise import (
    Event,
    Exited,
    HostLost,
    NotStarted,
    Stop,
    StopRequested,
    Supervisor,
    Tick,
    Verdict,
)

_POLL_SECONDS = 0.02  # Between two looks at the logs that are shown.
_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@dataclasses.dataclass
class _Connection:
    """An agent and what was read from it."""

    agent: local.AgentProcess
    buffer: bytes = b""
    done: bool = False


class Gang:
    """All agents of one attempt."""

    def __init__(self, supervisor: Supervisor, console: Console):
        self._supervisor = supervisor
        self._console = console
        self._connections: dict[int, _Connection] = {}
        self._stop_signals = 0
        self._told_to_stop = False

    def run(self, plans: Sequence[Mapping[str, Any]], attempt: Path, lock_fd: int) -> Verdict:
        """Start the agents and see the attempt through to its end."""
        with self._catching_signals() as wakeup:
            try:
                for plan in plans:
                    started = local.start_agent(plan, attempt, lock_fd)
                    assert started.popen.stdout is not None
                    self._connections[started.popen.stdout.fileno()] = _Connection(started)
                # What a killed agent leaves behind comes to this process, which kills it.
                agent.become_subreaper()
                while self._connections:
                    self._turn(wakeup)
            finally:
                self._let_go()
        self._console.show_new(last=True)
        return self._supervisor.verdict()

    def _turn(self, wakeup: int) -> None:
        """Wait a little for news, and deal with it."""
        ready = select.select([wakeup, *self._connections], [], [], _POLL_SECONDS)[0]
        events: list[Event] = []
        if wakeup in ready:
            os.read(wakeup, 4096)
        for fd in ready:
            if fd in self._connections:
                events += self._read(fd)
        while self._stop_signals:
            self._stop_signals -= 1
            events.append(StopRequested())
        for event in [*events, Tick()]:
            self._handle(event)
        self._console.show_new()

    def _handle(self, event: Event) -> None:
        for action in self._supervisor.handle(event, time.monotonic()):
            command = "stop" if isinstance(action, Stop) else "kill"
            for connection in self._connections.values():
                connection.agent.send({"command": command})
            if isinstance(event, StopRequested) and command == "stop":
                self._console.say("muster: stopping; once more to kill at once")
            elif command == "kill" and self._told_to_stop:
                self._console.say(f"muster: killing what still runs: {action.reason}")
            self._told_to_stop = self._told_to_stop or isinstance(event, StopRequested)

    def _read(self, fd: int) -> list[Event]:
        """Take in what an agent says; the end of its output is its own end."""
        connection = self._connections[fd]
        data = os.read(fd, 65536)
        *lines, connection.buffer = (connection.buffer + data).split(b"\n")
        events = []
        for line in lines:
            event = self._event(connection, json.loads(line))
            events += [event] if event else []
        if not data:
            del self._connections[fd]
            self._end(connection)
            if not connection.done:
                events.append(HostLost(connection.agent.host))
        return events

    def _event(self, connection: _Connection, message: Mapping[str, Any]) -> Event | None:
        kind = message["event"]
        if kind == "exited":
            how = message["exit_code"], message["signal"]
            return Exited(message["process_id"], *how, ended_at=message["time"])
        if kind == "not_started":
            return NotStarted(message["process_id"], message["message"], message["time"])
        if kind == "done":
            connection.done = True
            if message["leftover"]:
                left = ", ".join(map(str, message["leftover"]))
                self._console.say(f"muster: these processes could not be killed: {left}")
        return None

    def _end(self, connection: _Connection) -> None:
        """Wait for an agent that closed its output, and clear up behind one that was killed."""
        popen = connection.agent.popen
        if not connection.done:
            popen.kill()
        for pipe in (popen.stdin, popen.stdout):
            if pipe:
                pipe.close()
        popen.wait()
        if not connection.done:
            others = [other.agent.popen.pid for other in self._connections.values()]
            agent.kill_descendants(spare=others)

    def _let_go(self) -> None:
        """After an error of our own: the agents see the end of input and stop by themselves."""
        for connection in self._connections.values():
            if connection.agent.popen.stdin:
                connection.agent.popen.stdin.close()

    @contextmanager
    def _catching_signals(self) -> Iterator[int]:
        """Count stop signals instead of dying of them; gives a descriptor that they make ready."""
        read_end, write_end = os.pipe()
        os.set_blocking(write_end, False)
        before = {}

        def count(*_: object) -> None:
            self._stop_signals += 1

        for number in _STOP_SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:  # nohup, or `&` in a script
                before[number] = signal.signal(number, count)
        signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
        try:
            yield read_end
        finally:
            signal.set_wakeup_fd(-1)
            for number, handler in before.items():
                signal.signal(number, handler)
            os.close(read_end)
            os.close(write_end)


def agent_log(attempt: Path, host: str) -> Path:
    """Where a host's agent complains."""
    return attempt / f"agent-{host}.log"


def guilty_log(attempt: Path, verdict: Verdict) -> Path | None:
    """The log that explains a verdict."""
    if verdict.guilty_process is not None:
        return rundir.log_path(attempt, verdict.guilty_process)
    if verdict.guilty_host is not None:
        return agent_log(attempt, verdict.guilty_host)
    return None
