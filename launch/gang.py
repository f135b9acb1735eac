"""The agents of one attempt: what they say as events, and what they are told."""

from __future__ import annotations

import selectors
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from launch.agent_link import AgentLink
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

    def tell(self, command: str, **what: Any) -> None:
        """Give all agents a command, and what belongs to it."""
        for link in self._links:
            link.send({"command": command, **what})

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
