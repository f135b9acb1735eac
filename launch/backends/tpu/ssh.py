"""Direct ssh to TPU VMs, with the addresses, keys and known hosts that gcloud names."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import select
import shlex
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from launch import contract
from launch.backends.tpu import commands, gcloud
from launch.backends.tpu.code import bundle
from launch.backends.tpu.gcloud import GcloudError
from launch.backends.tpu.nodes import Node
from launch.spec import Cluster

_CONNECT_SECONDS = 10
_ALIVE_SECONDS = 10  # Between two signs of life; three missing ones break the connection.
_GREETING_SECONDS = 60.0
_READ_BYTES = 1 << 16
_GCLOUD_SSH_SECONDS = 180.0  # gcloud tries ten times, five seconds apart.

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


class SshError(Exception):
    """A host was not reached, or the connection broke: nothing is known of what it did."""


class HostFailedError(Exception):
    """A host was reached, and something on it is not as it must be."""


@dataclasses.dataclass(frozen=True)
class Host:
    """A worker of a node, and how it is reached.

    Attributes:
      name: NODE-wINDEX, as it is called in messages and records.
      node: its node.
      slice: the slice's number.
      worker: its number within the slice.
      address: by which the other hosts reach it.
      argv: the ssh command without the remote one.
    """

    name: str
    node: str
    slice: int
    worker: int
    address: str
    argv: tuple[str, ...]


def hosts_of(cluster: Cluster, zone: str, node: Node, slice_: int) -> list[Host]:
    """How a node's workers are reached. gcloud makes the user's key, and brings it there.

    Raises:
      GcloudError: the node's first worker is not reached, or not there yet.
    """
    quick = [f"--ssh-flag=-oConnectTimeout={_CONNECT_SECONDS}", "--ssh-flag=-oBatchMode=yes"]
    gcloud.run(
        commands.ssh(cluster, zone, node.name, "0", *quick),
        timeout_seconds=_GCLOUD_SSH_SECONDS,
        json_output=False,
    )
    said = gcloud.run(commands.ssh(cluster, zone, node.name, "all", "--dry-run"), json_output=False)
    lines = [line for line in said.splitlines() if "ssh" in line and "@" in line]
    if len(lines) != len(node.addresses):
        raise GcloudError(
            "gcloud",
            f"{node.name} has {len(node.addresses)} workers, and gcloud's dry run {said!r}",
        )
    return [
        Host(
            f"{node.name}-w{worker}",
            node.name,
            slice_,
            worker,
            node.internal_addresses[worker],
            ssh_argv(line),
        )
        for worker, line in enumerate(lines)
    ]


def ssh_argv(line: str) -> tuple[str, ...]:
    """An ssh command line as gcloud prints it, without terminal and remote command, and with what a
    program needs that waits for it."""
    words = line.split()
    target = next(i for i, word in enumerate(words) if "@" in word and not word.startswith("-"))
    options = [word for word in words[1:target] if word != "-t"]
    return (
        words[0],
        "-T",
        *options,
        *("-o", "BatchMode=yes", "-o", f"ConnectTimeout={_CONNECT_SECONDS}"),
        *("-o", f"ServerAliveInterval={_ALIVE_SECONDS}", "-o", "ServerAliveCountMax=3"),
        *("-o", "LogLevel=ERROR"),
        words[target],
    )


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


def tried(
    attempt: Callable[[], Any],
    limit_seconds: float,
    pause: Callable[[float], None],
    say: Callable[[str], None],
    what: str,
) -> Any:
    """Do something that needs a connection, again with growing waits while there is none.

    Args:
      attempt: what to do; it is done from its beginning each time.
      limit_seconds: how long.
      pause: waits.
      say: tells the user.
      what: the host, in messages.

    Raises:
      SshError: the time is over.
    """
    limit = time.monotonic() + limit_seconds
    seconds = 0.5
    while True:
        try:
            return attempt()
        except SshError as error:
            left = limit - time.monotonic()
            if left <= 0:
                raise
            say(f"muster: {what} is not reached: {error}; trying again for {left:.0f} s")
        pause(min(seconds, max(0.1, limit - time.monotonic())))
        seconds = min(15.0, seconds * 2)


def summary(problems: Mapping[str, str], most: int = 4) -> str:
    """`HOST: WHY` of several hosts; those that say the same are told together."""
    by_text: dict[str, list[str]] = {}
    for name, text in problems.items():
        by_text.setdefault(text, []).append(name)
    parts = [f"{_names(names, most)}: {text}" for text, names in by_text.items()]
    return "; ".join(parts[:most])


def _names(names: Sequence[str], most: int) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
