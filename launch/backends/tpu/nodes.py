"""What the API says of nodes and queued resources, read from gcloud's JSON."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from launch.backends.tpu import commands, gcloud
from launch.backends.tpu.gcloud import MISSING, GcloudError
from launch.backends.tpu.ledger import Asked

READY = "READY"
COMING = ("CREATING", "STARTING", "RESTARTING", "REIMAGING", "REPAIRING", "UNKNOWN", "UNHIDING")
MAINTENANCE = "UNHEALTHY_MAINTENANCE"  # Its health; work on the machine is near, or going on.
GONE = "GONE"  # The API has no such thing any more.

# Of queued resources.
ACTIVE = "ACTIVE"
DEAD = ("FAILED", "SUSPENDED", "SUSPENDING")  # Hold their quota until they are deleted.


@dataclasses.dataclass(frozen=True)
class Node:
    """A node, as the API reports it.

    Attributes:
      name: its own.
      path: its full name, `projects/P/locations/Z/nodes/N`.
      state: READY, CREATING, PREEMPTED, ...; GONE where there is none.
      health: HEALTHY, UNHEALTHY_MAINTENANCE, ...; "" where it is not said.
      addresses: of its workers, in order: those that are reached from outside, if there are.
      internal_addresses: by which workers reach one another.
      labels: its labels.
      maker: the queued resource that has made it; "" for none.
    """

    name: str
    path: str = ""
    state: str = GONE
    health: str = ""
    addresses: tuple[str, ...] = ()
    internal_addresses: tuple[str, ...] = ()
    labels: Mapping[str, str] = dataclasses.field(default_factory=dict)
    maker: str = ""

    @property
    def ready(self) -> bool:
        """Whether a gang can start on it."""
        return self.state == READY and bool(self.addresses) and self.health != MAINTENANCE

    @property
    def condition(self) -> str:
        """What keeps it from being ready, as the API calls it."""
        return f"{self.state}, {self.health}" if self.health == MAINTENANCE else self.state

    @property
    def project(self) -> str:
        """The project that it is in."""
        return self.path.split("/")[1] if "/" in self.path else ""


def node_of(record: Mapping[str, Any]) -> Node:
    """A node from gcloud's JSON."""
    path = str(record.get("name", ""))
    endpoints = record.get("networkEndpoints") or []
    inside = tuple(str(one.get("ipAddress", "")) for one in endpoints)
    outside = tuple(
        str((one.get("accessConfig") or {}).get("externalIp") or one.get("ipAddress", ""))
        for one in endpoints
    )
    return Node(
        path.rpartition("/")[2],
        path,
        str(record.get("state", "UNKNOWN")),
        str(record.get("health", "")),
        outside,
        inside,
        dict(record.get("labels") or {}),
        str(record.get("queuedResource", "")).rpartition("/")[2],
    )


def list_nodes(project: str | None, zone: str) -> dict[str, Node]:
    """All nodes of a zone, by name.

    Raises:
      GcloudError: no answer, or no leave.
    """
    found = gcloud.run(commands.list_all(project, commands.NODE, zone)) or []
    return {node.name: node for node in map(node_of, found)}


@dataclasses.dataclass(frozen=True)
class Queued:
    """A queued resource, as the API reports it.

    Attributes:
      name: its own.
      state: ACTIVE, WAITING_FOR_RESOURCES, ...; GONE where there is none.
      error: what the API has against it; None if nothing.
      labels: of the nodes that it makes.
    """

    name: str
    state: str = GONE
    error: GcloudError | None = None
    labels: Mapping[str, str] = dataclasses.field(default_factory=dict)
    maker: str = ""  # Nobody has: it is what makes nodes.


def queued_of(record: Mapping[str, Any]) -> Queued:
    """A queued resource from gcloud's JSON."""
    state = record.get("state") or {}
    error = None
    for key, data in state.items():
        if key.endswith("Data") and isinstance(data, Mapping) and data.get("error"):
            error = gcloud.of_operation(data["error"])
    specs = (record.get("tpu") or {}).get("nodeSpec") or [{}]
    labels = (specs[0].get("node") or {}).get("labels") or {}
    name = str(record.get("name", "")).rpartition("/")[2]
    return Queued(name, str(state.get("state", "UNKNOWN")), error, dict(labels))


def list_queued(project: str | None, zone: str) -> dict[str, Queued]:
    """All queued resources of a zone, by name.

    Raises:
      GcloudError: no answer, or no leave.
    """
    found = gcloud.run(commands.list_all(project, commands.QUEUED, zone)) or []
    return {one.name: one for one in map(queued_of, found)}


def find_node(project: str | None, zone: str, name: str) -> Node:
    """What the API says of a node; of state GONE if it has none.

    Raises:
      GcloudError: no answer, or no leave.
    """
    try:
        return node_of(gcloud.run(commands.describe(project, commands.NODE, zone, name)))
    except GcloudError as error:
        if error.kind != MISSING:
            raise
        return Node(name)


def look_at(asked: Asked) -> Node | Queued:
    """What the API says of something that was asked for; of state GONE if it has none.

    Raises:
      GcloudError: no answer, or no leave.
    """
    if asked.kind == commands.NODE:
        return find_node(asked.project, asked.zone, asked.name)
    argv = commands.describe(asked.project, asked.kind, asked.zone, asked.name)
    try:
        return queued_of(gcloud.run(argv))
    except GcloudError as error:
        if error.kind != MISSING:
            raise
        return Queued(asked.name)
