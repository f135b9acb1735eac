"""The agents of one attempt: what they say as events, what they are told, how long they live."""

from __future__ import annotations

import contextlib
import json
import selectors
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from launch.channel import Channel
from launch.events import (
    Event,
    Exited,
    Failure,
    HostLost,
    NotStarted,
    Progress,
    Raised,
    Stacks,
    Started,
)

# An agent counts its lease from before the controller sent it; this is for the ways in between.
_LEASE_SLACK_SECONDS = 1.0


class AgentClock:
    """Converts an agent's steady clock to the controller's.

    An answer that was asked for at `sent` and came at `received` was given in between: the shorter
    the way, the better the estimate, so the best one is kept.
    """

    def __init__(self) -> None:
        self._offset: float | None = None
        self._error = float("inf")

    def learn(self, sent: float, theirs: float, received: float) -> None:
        """Take in one exchange."""
        error = (received - sent) / 2
        if error <= self._error:
            self._offset, self._error = theirs - (sent + received) / 2, error

    def ours(self, theirs: float, received: float) -> float:
        """The controller's time of something that was reported at `received`; never after it."""
        return received if self._offset is None else min(received, theirs - self._offset)


class AgentLink:
    """One agent: what it is sent and what it says.

    The next lease is sent only after the last one was answered. So the agent, which counts a lease
    from its last answer, never lives longer on it than this side expects.
    """

    def __init__(self, channel: Channel, lease_seconds: float, now: float, come_by: float = 0.0):
        """Takes the way to an agent.

        Args:
          channel: the way.
          lease_seconds: how long the agent's processes outlive its owner.
          now: on the controller's clock.
          come_by: until when an agent that has still to come is waited for.
        """
        self.host = channel.host
        self.channel = channel
        self.clock = AgentClock()
        self.done = False
        self._lease_seconds = lease_seconds
        self._interval = min(1.0, lease_seconds / 5)
        self._come_by = come_by
        self._unsent = b""
        self._unread = b""
        self._asked_at: float | None = None  # When the lease that is not answered yet was sent.
        self._lease_due = now  # The first at once: it also tells what the agent's clock says.
        self.heard_at = now

    @property
    def has_come(self) -> bool:
        """Whether the agent is there."""
        return self.channel.fd is not None

    def send(self, message: Mapping[str, Any]) -> None:
        """Send one line. An agent that does not read must not hold up the others: what its pipe
        does not take waits here, and an agent that is gone says so by its output."""
        self._unsent += json.dumps(message).encode() + b"\n"
        self.flush()

    def flush(self) -> None:
        """Send what is waiting, as far as it goes."""
        with contextlib.suppress(OSError):  # It takes no more now, or is gone.
            while self._unsent:
                self._unsent = self._unsent[self.channel.write(self._unsent) :]

    def renew(self, now: float) -> bool:
        """Renew the lease when it is time; False when the agent has let it run out, or has not
        come in time."""
        if not self.has_come:
            return now < self._come_by
        if self._asked_at is not None:
            return now < self._asked_at + self._lease_seconds + _LEASE_SLACK_SECONDS
        if now >= self._lease_due:
            self._asked_at = now
            self.send({"command": "lease", "echo": now})
        return True

    def read(self, now: float) -> list[dict[str, Any]] | None:
        """What the agent has said since the last call; None at its end."""
        data = self.channel.read()
        if not data:
            return None
        self.heard_at = now
        *lines, self._unread = (self._unread + data).split(b"\n")
        messages = [json.loads(line) for line in lines]
        for message in messages:
            if message["event"] == "pulse" and self._asked_at is not None:
                self.clock.learn(message["echo"], message["time"], now)
                self._lease_due = self._asked_at + self._interval
                self._asked_at = None
        return messages

    def close_input(self) -> None:
        """Let the agent see the end of its input: it then stops by itself."""
        self.channel.close_input()

    def end(self, others: Iterable[int]) -> None:
        """Clear up behind an agent of which no more is heard.

        Args:
          others: process ids of the agents on this machine that live on.
        """
        self.channel.end(self.done, others)


class Gang:
    """All agents of one attempt.

    Attributes:
      pids: process id in the gang -> process id on its host.
      progress: process id -> its newest report.
      ended: the processes that have ended, or could not be started.
      leftover: what could not be killed.
      signalled: the hosts whose agents were told to stop by somebody else.
    """

    def __init__(self, selector: selectors.BaseSelector, lease_seconds: float):
        self._selector = selector
        self._lease_seconds = lease_seconds
        self._links: list[AgentLink] = []
        self._by_fd: dict[int, AgentLink] = {}
        self.pids: dict[int, int] = {}
        self.progress: dict[int, Progress] = {}
        self.ended: set[int] = set()
        self.leftover: list[int] = []
        self.signalled: set[str] = set()

    def start(
        self,
        agents: Iterable[tuple[Mapping[str, Any], Channel]],
        now: float,
        come_seconds: float = 0.0,
    ) -> None:
        """Give each agent its plan.

        Args:
          agents: plans, and the ways to the agents that are to follow them.
          now: on the controller's clock.
          come_seconds: how long agents that have still to come are waited for.
        """
        for plan, channel in agents:
            link = AgentLink(channel, self._lease_seconds, now, now + come_seconds)
            self._links.append(link)
            self._listen_to(link, now)
            link.send(plan)

    def _listen_to(self, link: AgentLink, now: float) -> None:
        """Hear an agent, if it is there."""
        fd = link.channel.fd
        if fd is not None and fd not in self._by_fd:
            self._by_fd[fd] = link
            self._selector.register(fd, selectors.EVENT_READ)
            link.heard_at = now

    @property
    def absent(self) -> list[str]:
        """The hosts whose agents have not come yet."""
        return [link.host for link in self._links if not link.has_come]

    @property
    def gone(self) -> bool:
        """Whether no agent is left."""
        return not self._links

    def read(self, fd: int, now: float) -> list[Event]:
        """What an agent has to say; the end of its output is its own end."""
        link = self._by_fd.get(fd)
        if link is None:
            return []
        messages = link.read(now)
        if messages is None:
            return self._ended(link, at=now)
        return [event for message in messages for event in self._events(link, message, now)]

    def beat(self, now: float) -> list[Event]:
        """Renew the leases; agents that let theirs run out are lost."""
        events = []
        for link in list(self._links):
            self._listen_to(link, now)
            link.flush()
            if not link.renew(now):
                events += self._ended(link, at=link.heard_at)
        return events

    def give_up(self, host: str, now: float) -> list[Event]:
        """Expect nothing more of a host's agent."""
        links = [link for link in self._links if link.host == host]
        return [event for link in links for event in self._ended(link, at=now)]

    def tell(self, command: str) -> None:
        """Give all agents a command."""
        for link in self._links:
            link.send({"command": command})

    def let_go(self) -> None:
        """After an error of our own: the agents see the end of input and stop by themselves."""
        for link in self._links:
            link.close_input()

    def _ended(self, link: AgentLink, at: float) -> list[Event]:
        fd = link.channel.fd
        if fd is not None and self._by_fd.pop(fd, None) is not None:
            self._selector.unregister(fd)
        self._links.remove(link)
        pids = (other.channel.pid for other in self._links)
        link.end(others=[pid for pid in pids if pid is not None])
        return [] if link.done else [HostLost(link.host, at)]

    def _events(self, link: AgentLink, message: Mapping[str, Any], now: float) -> list[Event]:
        def at(theirs: float) -> float:
            return link.clock.ours(theirs, now)

        kind = message["event"]
        if kind == "pulse":
            reports = [
                Progress(process_id, step, phase, at(since))
                for process_id, step, phase, since in message["progress"]
            ]
            self.progress.update({report.process_id: report for report in reports})
            return list(reports)
        if kind == "done":
            link.done = True
            self.leftover += message["leftover"]
            return []
        if kind == "signalled":
            self.signalled.add(link.host)
            return []
        process_id = message["process_id"]
        if kind == "started":
            self.pids[process_id] = message["pid"]
            return [Started(process_id)]
        if kind in ("not_started", "exited"):
            self.ended.add(process_id)
        if kind == "not_started":
            return [NotStarted(process_id, message["message"], at(message["time"]))]
        if kind == "raised":
            return [Raised(process_id, _failure(message["failure"], at))]
        if kind == "stacks":
            return [Stacks(process_id, message["text"], message["state"])]
        assert kind == "exited", kind
        exited = _exited(message, at)
        # What it reported since the last answer to a lease.
        last = self._last_report(message["record"], exited)
        return [last, exited] if last else [exited]

    def _last_report(self, record: Mapping[str, Any], exited: Exited) -> Progress | None:
        step, phase = record["step"], record["phase"]
        known = self.progress.get(exited.process_id)
        if step is None or (known and (known.step, known.phase) == (step, phase)):
            return None
        report = Progress(exited.process_id, step, phase, exited.ended_at)
        self.progress[exited.process_id] = report
        return report


def _exited(message: Mapping[str, Any], at: Callable[[float], float]) -> Exited:
    record = message["record"]
    told_at = message["told_at"]
    exception = record.get("exception")
    return Exited(
        message["process_id"],
        record["exit_code"],
        record["signal"],
        ended_at=at(message["time"]),
        told_at=None if told_at is None else at(told_at),
        failure=_failure(exception, at) if exception else None,
        oom_killed=record["oom_killed"],
        last_lines=tuple(record["last_lines"]),
    )


def _failure(record: Mapping[str, Any], at: Callable[[float], float]) -> Failure:
    return Failure(
        record["type"],
        record["message"],
        record["traceback"],
        at(record["monotonic"]),
        tuple(record.get("accuses", ())),
    )
