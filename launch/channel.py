"""The way to one host's agent and back: pipes to a process of this machine, or a connection."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
from collections.abc import Iterable
from typing import Protocol

from launch.agent.processes import kill_descendants

_READ_BYTES = 1 << 20


class Channel(Protocol):
    """A way to an agent.

    Attributes:
      host: the agent's.
      pid: its process id, if it runs on this machine; None for another one's.
    """

    host: str
    pid: int | None

    @property
    def fd(self) -> int | None:
        """Readable when the agent has said something; None as long as it has not come."""

    def read(self) -> bytes:
        """What it has said; b"" at its end."""

    def write(self, data: bytes) -> int:
        """Send what it takes now; raises BlockingIOError or OSError like os.write."""

    def close_input(self) -> None:
        """Let it see the end of its input: it then stops by itself."""

    def end(self, done: bool, others: Iterable[int]) -> None:
        """Clear up when no more is heard of it.

        Args:
          done: it has said that nothing is left of its processes.
          others: process ids of the agents on this machine that live on.
        """


class LocalChannel:
    """Pipes to an agent that is a child of this process; see Channel."""

    def __init__(self, host: str, popen: subprocess.Popen[bytes]):
        self.host = host
        self.pid: int | None = popen.pid
        self._popen = popen
        assert popen.stdin is not None
        assert popen.stdout is not None
        self._input, self._output = popen.stdin, popen.stdout
        os.set_blocking(self._input.fileno(), False)

    @property
    def fd(self) -> int | None:
        """See Channel."""
        return self._output.fileno()

    def read(self) -> bytes:
        """See Channel."""
        return os.read(self._output.fileno(), _READ_BYTES)

    def write(self, data: bytes) -> int:
        """See Channel."""
        return os.write(self._input.fileno(), data)

    def close_input(self) -> None:
        """See Channel."""
        with contextlib.suppress(BrokenPipeError):
            self._input.close()

    def end(self, done: bool, others: Iterable[int]) -> None:
        """Wait for it, and kill what it has left; see Channel."""
        if not done:
            self._popen.kill()
        self.close_input()
        self._output.close()
        self._popen.wait()
        if not done:
            kill_descendants(spare=list(others))


class RemoteChannel:
    """A connection to an agent on another machine, once it has come; see Channel."""

    def __init__(self, host: str):
        self.host = host
        self.pid: int | None = None
        self._socket: socket.socket | None = None

    def connect(self, connection: socket.socket) -> None:
        """Take the connection over; may be called by another thread."""
        connection.setblocking(False)
        self._socket = connection

    @property
    def fd(self) -> int | None:
        """See Channel."""
        return None if self._socket is None else self._socket.fileno()

    def read(self) -> bytes:
        """See Channel."""
        assert self._socket is not None
        try:
            return self._socket.recv(_READ_BYTES)
        except OSError:  # Reset, or given up by the kernel: its end either way.
            return b""

    def write(self, data: bytes) -> int:
        """See Channel."""
        if self._socket is None:
            raise BlockingIOError
        return self._socket.send(data)

    def close_input(self) -> None:
        """See Channel."""
        if self._socket is not None:
            with contextlib.suppress(OSError):
                self._socket.shutdown(socket.SHUT_WR)

    def end(self, done: bool, others: Iterable[int]) -> None:
        """See Channel. An agent that is not done sees the end of its input, or of its lease."""
        del done, others
        if self._socket is not None:
            self._socket.close()
