"""How hosts are reached: by the addresses, keys and known hosts that gcloud names."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from launch.backends.tpu import commands, gcloud
from launch.backends.tpu.gcloud import GcloudError
from launch.backends.tpu.nodes import Node
from launch.spec import Cluster

_CONNECT_SECONDS = 10
_ALIVE_SECONDS = 10  # Between two signs of life; three missing ones break the connection.
_GCLOUD_SSH_SECONDS = 180.0  # gcloud tries ten times, five seconds apart.


class SshError(Exception):
    """A host was not reached, or the connection broke: nothing is known of what it did."""


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
