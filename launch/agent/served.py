"""An owner that comes and goes: it connects to the agent's socket, and what it has missed is said
again.

The agent is then no child of its owner, and outlives a connection that breaks. The first line of
every connection is

    {"command": "attach", "owner": {"token": T, ...who}, "heard": N, "logs": {ID: BYTES}, "echo": X}

and its answer `attached`, or `refused` while another owner is there. All that the agent reports
gets a number, `seq`; those after N are said again. Commands have numbers too, `n`, and are carried
out once; `attached` says the last. With `plan` false in it, the plan comes next, as the command
`plan`. Logs and records are shown as `log` and `file`, without numbers, from where the owner says
that it has them. `bye` is the last command: the owner has seen the end.
"""

import json
import os
import select
import socket
import time

from launch.agent.mirror import Mirror

_SILENT_SECONDS = 15.0  # So long an owner that says nothing keeps out another one.
_MOST_UNSENT = 1 << 18  # No more of the logs is read while so much waits to be sent.
_UNNUMBERED = ("pulse",)


class _Line:
    """One connection, line by line."""

    def __init__(self, connection):
        connection.setblocking(False)
        self.connection = connection
        self.unsent = b""
        self._unread = b""

    def fileno(self):
        """For select."""
        return self.connection.fileno()

    def read(self):
        """The messages that have come; None at its end."""
        try:
            data = self.connection.recv(1 << 16)
        except BlockingIOError:
            return []
        except OSError:
            return None
        if not data:
            return None
        *lines, self._unread = (self._unread + data).split(b"\n")
        return [json.loads(line) for line in lines]

    def send(self, message):
        """Send one message, or as much of it as goes now."""
        self.unsent += json.dumps(message).encode() + b"\n"
        self.flush()

    def flush(self):
        """Send what is left."""
        try:
            while self.unsent:
                self.unsent = self.unsent[self.connection.send(self.unsent) :]
        except BlockingIOError:
            pass
        except OSError:
            self.unsent = b""  # Its end is seen by reading.


class Served:
    """Owners, one at a time, at a socket of this host; see Owner for what it does for an agent.

    Attributes:
      plan: None until an owner has said it.
      dismissed: whether an owner has seen the end.
      heard_at: when an owner was heard last.
    """

    gone = False  # It may always come back; the lease says how long that is waited for.

    def __init__(self, path):
        self.plan = None
        self.dismissed = False
        self.is_new = False
        self.heard_at = time.monotonic()
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        before = os.umask(0o177)
        try:
            self._listener.bind(path + ".new")
        finally:
            os.umask(before)
        self._listener.listen(8)
        # Whoever finds it may connect at once: it must not be found before it listens.
        os.rename(path + ".new", path)
        self._pending = []  # Commands that nobody has carried out yet.
        self._visitors = []  # Have not said yet who they are.
        self._line = None  # To the owner.
        self._owner = {}
        self._journal = []
        self._obeyed = 0  # The number of the last command.
        self._mirror: Mirror  # With the plan.
        self._positions = {}

    # ------------------------------------------------------------------ what an agent asks of it

    def descriptors(self):
        """See Owner."""
        lines = [self._line] if self._line else []
        return [self._listener, *self._visitors, *lines], [one for one in lines if one.unsent]

    def hear(self, readable, writable):
        """See Owner."""
        commands, self._pending = self._pending, []
        if self._line and self._line in readable:
            messages = self._line.read()
            if messages is None:
                self._hang_up()
            else:
                self.heard_at = time.monotonic()
                commands += [one for message in messages for one in self._take(message)]
        for visitor in [one for one in self._visitors if one in readable]:
            commands += self._greet(visitor)
        if self._listener in readable:
            self._visitors.append(_Line(self._listener.accept()[0]))
        if self._line and self._line in writable:
            self._line.flush()
        return commands

    def tell(self, **event):
        """Tell of an event that happens now, and again to every owner that has not heard it."""
        event = dict({"time": time.monotonic()}, **event)
        if event["event"] not in _UNNUMBERED:
            event["seq"] = len(self._journal) + 1
            self._journal.append(event)
        if self._line:
            self._line.send(event)

    def look(self):
        """Show what is new in the files."""
        line = self._line
        if line and self.plan:
            while len(line.unsent) < _MOST_UNSENT:
                new = self._mirror.new()
                for message in new:
                    line.send(message)
                if not any(message["event"] == "log" for message in new):
                    return

    def part(self, leftover, seconds):
        """Say that all is done to an owner that has all files, and wait until it says goodbye, or
        nobody was heard of for a long time."""
        del seconds
        assert self.plan
        idle = self.plan.get("idle_seconds", 0)
        told: _Line | None = None
        while not self.dismissed and time.monotonic() < self.heard_at + idle:
            line = self._line
            if line and line is not told:
                told = line
                self._show_the_rest(line)
                line.send({"event": "done", "time": time.monotonic(), "leftover": leftover})
            self.wait(1.0)

    # ------------------------------------------------------------------ who owns it

    def wait(self, seconds):
        """Hear whoever says something within a time; commands but leases are kept for later."""
        readable, writable = self.descriptors()
        ready = select.select(readable, writable, [], seconds)
        for message in self.hear(ready[0], ready[1]):
            if message["command"] == "lease":
                echo = message["echo"]
                self.tell(event="pulse", echo=echo, progress=[])
            else:
                self._pending.append(message)

    def _show_the_rest(self, line: _Line) -> None:
        new = self._mirror.new(whole=True)
        while new and self._line is line:
            for message in new:
                line.send(message)
            while line.unsent and self._line is line:
                self.wait(1.0)
            new = self._mirror.new()

    def _greet(self, visitor):
        messages = visitor.read()
        if messages == []:
            return []
        self._visitors.remove(visitor)
        if messages is None or messages[0].get("command") != "attach":
            visitor.connection.close()
            return []
        attach = messages[0]
        silence = time.monotonic() - self.heard_at
        same = attach["owner"].get("token") == self._owner.get("token")
        if self._line and not same and silence < _SILENT_SECONDS:
            visitor.send({"event": "refused", "owner": self._owner, "silent_seconds": silence})
            visitor.connection.close()
            return []
        self._hang_up()
        if not same:
            self._obeyed = 0
        line = self._line = visitor
        self._owner = attach["owner"]
        self.heard_at = time.monotonic()
        self.is_new = True
        has_plan = self.plan is not None
        now = time.monotonic()
        line.send(
            {
                "event": "attached",
                "time": now,
                "echo": attach["echo"],
                "plan": has_plan,
                "obeyed": self._obeyed,
            }
        )
        for event in self._journal[attach["heard"] :]:
            line.send(event)
        self._positions = attach["logs"]
        if has_plan:
            self._mirror.start(self._positions)
        return [one for message in messages[1:] for one in self._take(message)]

    def _take(self, message):
        """What of a message is for the agent."""
        number = message.pop("n", None)
        if number is not None:
            if number <= self._obeyed:
                return []
            self._obeyed = number
        if message["command"] == "plan":
            self.plan = message["plan"]
            self._mirror = Mirror(self.plan)
            self._mirror.start(self._positions)
            return []
        if message["command"] == "bye":
            self.dismissed = True
            return []
        return [message]

    def _hang_up(self):
        if self._line:
            self._line.connection.close()
            self._line = None


def main(arguments):
    """Wait for an owner at a socket, and run the plan that it brings.

    Args:
      arguments: the socket's path, and how many seconds an owner may take to bring a plan.
    """
    from launch.agent.agent import Agent

    path, patience = arguments
    owner = Served(path)
    limit = time.monotonic() + float(patience)
    while owner.plan is None and time.monotonic() < limit:
        owner.wait(1.0)
    plan = owner.plan
    if plan is not None:
        os.makedirs(os.path.join(plan["folder"], "stacks"), mode=0o700, exist_ok=True)
        for file, text in plan.get("files", {}).items():
            with open(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as out:
                out.write(text)
        os.chdir(plan["cwd"])
        Agent(plan, owner).run()
        if plan.get("release") and not owner.dismissed:
            from launch.agent.release import release

            release(plan["release"])
    os.unlink(path)
