"""The way to one host's agent: an ssh connection that is made anew when it breaks, behind a channel
that stays the same."""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import json
import os
import select
import socket
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from launch import contract, rundir
from launch.agent.log import Log
from launch.backends.tpu.prepare import HOST_PYTHON
from launch.backends.tpu.reach import Host, SshError
from launch.backends.tpu.ssh import HostFailedError, Session
from launch.channel import RemoteChannel

_READ_BYTES = 1 << 18
_MOST_WAIT_SECONDS = 5.0  # Between two tries to connect anew.
_GOODBYE_SECONDS = 10.0  # For an agent that is done to be told that this was heard.
# How long an agent waits for its plan: the connection may break before it has come.
_PLAN_SECONDS = 600.0


class Copies:
    """Here, what the processes of one host have written there."""

    def __init__(self, attempt: Path, process_ids: list[int], max_log_bytes: int):
        self._attempt = attempt
        self._logs = {
            process_id: Log(str(rundir.log_path(attempt, process_id)), max_log_bytes)
            for process_id in process_ids
        }

    def positions(self) -> dict[str, int]:
        """How much of each log is here, in bytes."""
        return {str(process_id): log.end for process_id, log in self._logs.items()}

    def take(self, message: Mapping[str, Any]) -> None:
        """Take in a `log` or a `file`."""
        if message["event"] == "file":
            name = os.path.normpath(message["name"])
            if name.startswith(("..", "/")):
                return  # A host must not write elsewhere.
            path = self._attempt / name
            # Of an attempt that was begun from another machine, only its record is here.
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            contract.write_atomically(path, message["text"], mode=0o600)
            return
        log = self._logs[message["process_id"]]
        data, offset = base64.b64decode(message["data"]), message["offset"]
        if offset > log.end:
            log.skip_to(offset)
        data = data[log.end - offset :]
        while data:
            data = data[os.write(log.fd, data) :]
        log.trim()

    def close(self) -> None:
        """Give the files back."""
        for log in self._logs.values():
            log.close()


@dataclasses.dataclass(frozen=True)
class Start:
    """What an agent is started with, see launch.agent.host."""

    run: str
    attempt: int
    python: str
    container: list[str]


class HostLink(threading.Thread):
    """Keeps up the connection to one host's agent.

    Attributes:
      channel: what the controller reads and writes; connected once the agent is there.
      trouble: why the host is not reached now; "" while it is.
      displaced: who owns the agent, if it is another controller.
    """

    def __init__(
        self,
        host: Host,
        start: Start,
        *,
        owner: Mapping[str, Any],
        copies: Copies,
        session: Session | None,
        say: Callable[[str], None],
    ):
        """Takes what it needs; `start` begins.

        Args:
          host: the host.
          start: how the agent is started, where it is not there yet.
          owner: who this controller is.
          copies: of what its processes write.
          session: a connection that is open already.
          say: tells the user a line.
        """
        super().__init__(daemon=True, name=host.name)
        self.host = host
        self.channel = RemoteChannel(host.name)
        self.trouble = ""
        self.displaced: Mapping[str, Any] | None = None
        self._start = start
        self._owner = dict(owner)
        self._copies = copies
        self._session = session
        self._say = say
        self._ours, self._theirs = socket.socketpair()
        self._ours.setblocking(False)
        self._from_controller = b""
        self._unread = b""
        self._plan: dict[str, Any] | None = None
        self._commands: list[dict[str, Any]] = []  # Numbered from 1.
        self._lease: dict[str, Any] | None = None  # The last, if it was not answered.
        self._heard = 0
        self._done = False
        self._uncopied = False  # Whether that was said.
        self._open = True  # Whether the controller still wants to hear of it.

    def run(self) -> None:
        """Connect, and connect anew, until the agent is done or the controller has had enough."""
        wait = 0.25
        try:
            while self._open and not self._done:
                began = time.monotonic()
                try:
                    self._connect_and_pass_on()
                except SshError as error:
                    if not self.trouble and not self._done:
                        self._say(f"muster: lost the connection to {self.host.name}: {error}")
                    self.trouble = str(error)
                except HostFailedError as error:
                    self.trouble = ""  # The host is reached: nothing is to be asked of its node.
                    if self.displaced is None and not self._done:
                        self._say(f"muster: {self.host.name}: {error}")
                    return
                if time.monotonic() > began + 10:
                    wait = 0.25
                self._linger(wait)
                wait = min(_MOST_WAIT_SECONDS, wait * 2)
        finally:
            self._ours.close()
            self._copies.close()
            if self.channel.fd is None:
                # It never came: the controller must see that it does not.
                self.channel.connect(self._theirs)

    def stop(self) -> None:
        """Have it end, whatever it does."""
        self._open = False

    def _linger(self, seconds: float) -> None:
        """Wait, and see whether the controller has had enough."""
        limit = time.monotonic() + seconds
        while self._open and time.monotonic() < limit and not self._done:
            if select.select([self._ours], [], [], limit - time.monotonic())[0]:
                self._hear_controller(None)

    # ------------------------------------------------------------------ one connection

    def _connect_and_pass_on(self) -> None:
        session, self._session = self._session or Session(self.host, HOST_PYTHON), None
        try:
            start = self._start
            session.call("clear", run=start.run, keep=start.attempt)
            session.call("start", run=start.run, attempt=start.attempt, python=start.python,
                         patience=_PLAN_SECONDS, container=start.container)  # fmt: skip
            out, into, unread = session.relay(start.run, start.attempt)
            self._unread = unread
            writer = _Writer(into)
            writer.send(
                {
                    "command": "attach",
                    "owner": self._owner,
                    "heard": self._heard,
                    "logs": self._copies.positions(),
                    "echo": time.monotonic(),
                }
            )
            self._pass_on(session, out, writer)
        finally:
            session.close()

    def _pass_on(self, session: Session, out: int, writer: _Writer) -> None:
        attached = False
        for message in self._messages(b""):
            attached |= self._take(message, writer)
        while self._open:
            awaited: list[Any] = [out, self._ours] if attached else [out]
            readable, writable, _ = select.select(
                awaited, [writer.fd] if writer.unsent else [], [], 1.0
            )
            if out in readable:
                data = os.read(out, _READ_BYTES)
                if not data:
                    raise SshError(session.complaint)
                for message in self._messages(data):
                    attached |= self._take(message, writer)
            if self._ours in readable:
                self._hear_controller(writer)
            if writable:
                writer.flush()
            if self._done:
                self._say_goodbye(out, writer)
                return

    def _messages(self, data: bytes) -> list[dict[str, Any]]:
        *lines, self._unread = (self._unread + data).split(b"\n")
        return [json.loads(line) for line in lines]

    def _take(self, message: dict[str, Any], writer: _Writer) -> bool:
        """Deal with a message of the agent's; whether it was the answer to `attach`."""
        event = message["event"]
        if event == "attached":
            self.trouble = ""
            if self.channel.fd is None:
                self.channel.connect(self._theirs)  # By it comes the plan.
            self._resend(message, writer)
            return True
        if event == "refused":
            self.displaced = message["owner"]
            raise HostFailedError(f"another controller has it: {message['owner']}")
        if event in ("log", "file"):
            try:
                self._copies.take(message)
            except OSError as error:  # A full disk here must not cost the run.
                if not self._uncopied:
                    self._uncopied = True
                    self._say(f"muster: what {self.host.name} writes is not copied: {error}")
            return False
        number = message.pop("seq", None)
        if number is not None:
            if number <= self._heard:
                return False
            self._heard = number
        if event == "pulse":
            self._lease = None
        if event == "done":
            self._done = True
        self._tell_controller(json.dumps(message).encode() + b"\n")
        return False

    def _resend(self, attached: Mapping[str, Any], writer: _Writer) -> None:
        """What the agent has not heard yet."""
        if not attached["plan"]:
            while self._plan is None:  # It is on its way from the controller.
                if not self._open:
                    raise SshError("there is no plan")
                if select.select([self._ours], [], [], 1.0)[0]:
                    self._hear_controller(None)
            writer.send({"command": "plan", "plan": self._plan})
        for command in self._commands[attached["obeyed"] :]:
            writer.send(command)
        if self._lease is not None:
            writer.send(self._lease)

    def _say_goodbye(self, out: int, writer: _Writer) -> None:
        writer.send({"command": "bye"})
        limit = time.monotonic() + _GOODBYE_SECONDS
        with contextlib.suppress(OSError, SshError):
            while time.monotonic() < limit:
                writer.flush()
                readable = select.select([out], [], [], 0.2)[0]
                if readable and not os.read(out, _READ_BYTES):
                    return

    # ------------------------------------------------------------------ the controller's side

    def _hear_controller(self, writer: _Writer | None) -> None:
        """Take in what the controller has to say, and pass it on if there is a connection."""
        try:
            data = self._ours.recv(_READ_BYTES)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._open = False
            return
        *lines, self._from_controller = (self._from_controller + data).split(b"\n")
        for line in lines:
            message = json.loads(line)
            if self._plan is None:
                self._plan = message
                continue
            if message["command"] == "lease":
                self._lease = message
            else:
                message["n"] = len(self._commands) + 1
                self._commands.append(message)
            if writer is not None:
                writer.send(message)

    def _tell_controller(self, data: bytes) -> None:
        while data and self._open:
            try:
                data = data[self._ours.send(data) :]
            except BlockingIOError:
                select.select([], [self._ours], [], 1.0)
            except OSError:
                self._open = False


class _Writer:
    """Writes to a descriptor what it takes, and keeps the rest."""

    def __init__(self, fd: int):
        self.fd = fd
        self.unsent = b""
        os.set_blocking(fd, False)

    def send(self, message: Mapping[str, Any]) -> None:
        """Send one message, or as much of it as goes now."""
        self.unsent += json.dumps(message).encode() + b"\n"
        self.flush()

    def flush(self) -> None:
        """Send what is left."""
        try:
            while self.unsent:
                self.unsent = self.unsent[os.write(self.fd, self.unsent) :]
        except BlockingIOError:
            pass
        except OSError as error:
            raise SshError(str(error)) from None
