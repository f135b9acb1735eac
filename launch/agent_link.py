"""One agent of an attempt: its lease, its clock, what it is sent and what it says."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

from launch.channel import Channel

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
