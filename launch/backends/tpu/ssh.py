"""An ssh connection to a TPU VM, at whose other end commands are carried out."""

from __future__ import annotations

import contextlib
import json
import os
import select
import shlex
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from launch import contract
from launch.backends.tpu.code import bundle
from launch.backends.tpu.reach import Host, SshError

_GREETING_SECONDS = 60.0
_READ_BYTES = 1 << 16

# Reads as many bytes of its raw standard input as the first line says, and goes on from there.
_FIRST = """\
import sys
sys.stdin = r = open(0, "rb", 0, closefd=False)
n = int(r.readline())
b = b""
while len(b) < n:
    b += r.read(n - len(b)) or sys.exit(1)
exec(compile(b, "bootstrap", "exec"))
"""


class HostFailedError(Exception):
    """A host was reached, and something on it is not as it must be."""


class Session:
    """A connection to a host, at whose other end commands are carried out (launch.agent.host)."""

    def __init__(self, host: Host, python: str):
        """Connects.

        Args:
          host: the host.
          python: an interpreter that is there before anything is set up.

        Raises:
          SshError: it is not reached.
        """
        self.host = host
        self._number = 0
        self._unread = b""
        self._errors: list[str] = []
        remote = shlex.join([python, "-I", "-S", "-c", _FIRST])
        self._popen = subprocess.Popen(
            [*host.argv, "--", remote],
            bufsize=0,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        assert self._popen.stdin
        assert self._popen.stdout
        assert self._popen.stderr
        self._in, self._out = self._popen.stdin.fileno(), self._popen.stdout.fileno()
        threading.Thread(target=self._listen, daemon=True).start()
        first = (Path(contract.__file__).parent / "agent/bootstrap.py").read_bytes()
        digest, packages = bundle()
        said = json.dumps({"digest": digest, "bytes": len(packages)}).encode()
        self._send(b"%d\n" % len(first) + first + said + b"\n" + packages)

    def call(
        self,
        command: str,
        *,
        timeout_seconds: float = _GREETING_SECONDS,
        payload: Path | None = None,
        said: Callable[[str], None] = lambda line: None,
        **arguments: Any,
    ) -> dict[str, Any]:
        """Have a command carried out.

        Args:
          command: a method of launch.agent.host.Host.
          timeout_seconds: how long the host may say nothing.
          payload: a file that follows, if the host says that it lacks it.
          said: takes each line that the command prints.
          **arguments: the command's.

        Raises:
          SshError: the connection broke.
          HostFailedError: the host says what is wrong.
        """
        self._number += 1
        message = {"id": self._number, "command": command, **arguments}
        self._send(json.dumps(message).encode() + b"\n")
        while True:
            answer = json.loads(self._read_line(timeout_seconds))
            if answer["event"] == "result":
                break
            if payload is not None and not answer.get("there", True):
                with payload.open("rb") as file:
                    while data := file.read(1 << 20):
                        self._send(data)
            if "line" in answer:
                said(answer["line"])
        if not answer["ok"]:
            raise HostFailedError(answer["error"])
        return answer

    def relay(self, run: str, attempt: int) -> tuple[int, int, bytes]:
        """Lead this connection to an agent: its two descriptors from now on, and what was read of
        it already.

        Raises:
          SshError, HostFailedError: see call.
        """
        message = {"id": 0, "command": "relay", "run": run, "attempt": attempt}
        self._send(json.dumps(message).encode() + b"\n")
        answer = json.loads(self._read_line(_GREETING_SECONDS))
        if answer["event"] != "relayed":
            raise HostFailedError(answer.get("error", "the agent is not there"))
        return self._out, self._in, self._unread

    def close(self) -> None:
        """End the connection; what was started detached lives on."""
        for file in (self._popen.stdin, self._popen.stdout):
            assert file is not None
            with contextlib.suppress(OSError):
                file.close()
        if self._popen.poll() is None:
            self._popen.terminate()
            try:
                self._popen.wait(2.0)
            except subprocess.TimeoutExpired:
                self._popen.kill()
        self._popen.wait()

    @property
    def complaint(self) -> str:
        """What ssh has said last of what is wrong."""
        return self._errors[-1] if self._errors else "the connection was closed"

    def _listen(self) -> None:
        """Keep what ssh and the host complain of."""
        assert self._popen.stderr is not None
        with self._popen.stderr as file:
            for line in file:
                text = line.decode("utf-8", "replace").strip()
                if text:
                    self._errors = [*self._errors[-20:], text]

    def _send(self, data: bytes) -> None:
        try:
            while data:
                data = data[os.write(self._in, data) :]
        except OSError:
            raise SshError(self._why()) from None

    def _read_line(self, timeout_seconds: float) -> bytes:
        limit = time.monotonic() + timeout_seconds
        while b"\n" not in self._unread:
            left = limit - time.monotonic()
            if left <= 0 or not select.select([self._out], [], [], left)[0]:
                raise SshError(f"it said nothing for {timeout_seconds:g} s")
            data = os.read(self._out, _READ_BYTES)
            if not data:
                raise SshError(self._why())
            self._unread += data
        line, _, self._unread = self._unread.partition(b"\n")
        return line

    def _why(self) -> str:
        """Why the connection ended; ssh's last words may still be on their way."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._popen.wait(1.0)
        time.sleep(0.05)
        return self.complaint
