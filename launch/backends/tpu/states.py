"""What becomes of a run's nodes while it runs: the API, asked again and again beside everything
else."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence

from launch.backends.tpu.gcloud import GcloudError
from launch.backends.tpu.nodes import GONE, MAINTENANCE, READY, Node, find_node, list_nodes

_WORKING = ("REPAIRING", "RESTARTING", "REIMAGING")


class NodeWatch:
    """Asks for the nodes of a zone, in a thread of its own; the newest answer counts.

    Attributes:
      silent_since: when the first of the answers that failed was asked for; None while they come.
    """

    def __init__(self, project: str | None, zone: str, names: Sequence[str], every_seconds: float):
        self._project = project
        self._zone = zone
        self._names = tuple(names)
        self._every = every_seconds
        self._nodes: dict[str, Node] = {}
        self._closed = threading.Event()
        self._asked = threading.Lock()
        self.silent_since: float | None = None
        self.error = ""
        threading.Thread(target=self._watch, daemon=True).start()

    def nodes(self) -> list[Node]:
        """The nodes as they were last seen; those that were not yet are left out."""
        return [self._nodes[name] for name in self._names if name in self._nodes]

    def look(self) -> None:
        """Ask now, and wait for the answer; without one, what was seen last stands."""
        with self._asked:
            began = time.monotonic()
            try:
                there = list_nodes(self._project, self._zone)
                for name in set(self._names) - there.keys():
                    # A list that leaves one out is not enough to give up a run for.
                    there[name] = find_node(self._project, self._zone, name)
            except GcloudError as error:
                self.silent_since = self.silent_since or began
                self.error = error.said
                return
            self.silent_since = None
            self._nodes = there

    def close(self) -> None:
        """Ask no more."""
        self._closed.set()

    def _watch(self) -> None:
        while not self._closed.wait(self._every):
            self.look()


def trouble(node: Node) -> tuple[str, str] | None:
    """What a node's state means for a gang on it: a cause, and a message. None if all is well."""
    if node.state == "PREEMPTED":
        return "preempted", f"{node.name} was preempted: Google has taken the machine back"
    if node.state in _WORKING:
        return "preempted", f"{node.name} is {node.state}: Google Cloud works on the machine"
    if node.state == GONE:
        return "host_lost", f"{node.name} is no more: somebody has deleted it"
    if node.state != READY:
        return "host_lost", f"{node.name} is {node.state}: somebody has stopped it"
    if node.health == MAINTENANCE:
        return "preempted", f"{node.name} is about to have maintenance ({MAINTENANCE})"
    return None


def is_lost(node: Node) -> bool:
    """Whether nothing on a node is alive any more, or will be soon."""
    return node.state != READY
