"""Where the agents of other machines come in: one port, and a key that both sides must have."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
from collections.abc import Mapping
from pathlib import Path

from launch import contract
from launch.agent import connect
from launch.channel import RemoteChannel

_GREETING_SECONDS = 15.0  # Within this an agent has shown who it is.
_WAITING = 1024  # Agents that may be at the door at once.


class Door:
    """Listens on one interface, and lets in the agents that are expected."""

    def __init__(self, address: str, path: Path, channels: Mapping[str, RemoteChannel]):
        """Opens the door.

        Args:
          address: of the interface.
          path: the file that tells agents where it is, and the key; it is the user's alone.
          channels: host -> the way to its agent, which is connected when it comes.
        """
        self._channels = channels
        self._key = connect.new_key()
        self._path = path
        self._came: set[str] = set()
        self._lock = threading.Lock()
        self._listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        self._listener.bind((address, 0))
        self._listener.listen(_WAITING)
        where = {"address": address, "port": self._listener.getsockname()[1], "key": self._key}
        contract.write_atomically(path, json.dumps(where) + "\n", mode=0o600)
        threading.Thread(target=self._listen, daemon=True).start()

    def close(self) -> None:
        """Let nobody in any more."""
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        with contextlib.suppress(OSError):
            os.unlink(self._path)

    def _listen(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:  # Closed.
                return
            # A thread for each, so that one that says nothing holds up nobody.
            threading.Thread(target=self._greet, args=(connection,), daemon=True).start()

    def _greet(self, connection: socket.socket) -> None:
        connection.settimeout(_GREETING_SECONDS)
        try:
            host = self._know(connection)
        except (OSError, ValueError, KeyError):
            connection.close()
            return
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with self._lock:
            expected = host in self._channels and host not in self._came
            self._came.add(host)
        if expected:
            self._channels[host].connect(connection)
        else:
            connection.close()

    def _know(self, connection: socket.socket) -> str:
        """The host of an agent that has the key."""
        hello = connect.receive(connection)
        theirs, mine = str(hello["nonce"]), connect.nonce()
        connect.send(connection, nonce=mine, proof=connect.proof(self._key, "owner", theirs, mine))
        answer = connect.receive(connection)
        if not connect.same(answer["proof"], connect.proof(self._key, "agent", mine, theirs)):
            raise OSError("an agent without the key")
        return str(hello["host"])
