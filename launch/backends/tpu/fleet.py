"""A run's slices: asked for, waited for, made anew; all by way of the ledger."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence

from launch.backends.tpu import gcloud
from launch.backends.tpu.commands import NODE, QUEUED
from launch.backends.tpu.creation import Creation
from launch.backends.tpu.gcloud import STOCKOUT, GcloudError
from launch.backends.tpu.ledger import Asked, Ledger
from launch.backends.tpu.nodes import (
    ACTIVE,
    COMING,
    DEAD,
    GONE,
    READY,
    Node,
    Queued,
    find_node,
    list_nodes,
    look_at,
)
from launch.backends.tpu.zones import Zones
from launch.contract import utc
from launch.spec import Cluster, ConfigError
from launch.times import duration, seconds_of

_MAKE_SECONDS = 1800.0  # A node that is made, or worked on, for longer will not come.


class Fleet(Creation):
    """The machines that one run wants; see Holdings."""

    def __init__(
        self,
        cluster: Cluster,
        ledger: Ledger,
        say: Callable[[str], None],
        pause: Callable[[float], None],
    ):
        """See Creation."""
        super().__init__(cluster, ledger, say, pause)
        self._zones = Zones(cluster, say, pause)
        self._waiting: dict[str, float] = {}  # Nodes that are not ready, and since when.

    def acquire(self) -> list[Node]:
        """Have all slices, READY; waits as long as that takes.

        Returns:
          The nodes in order of their slices.

        Raises:
          ConfigError: it cannot be, whatever the wait.
        """
        self._zones.begin()
        if self._spec.nodes:
            return self._adopt()
        self.reconcile()
        if self._spec.way == "queued":
            # One is enough: an earlier one that nobody could close is given back.
            self.delete(self._ledger.owned[:-1])
        while True:
            try:
                nodes = self._queued() if self._spec.way == "queued" else self._direct()
            except GcloudError as error:
                self._zones.fail(error)
                nodes = None
            if nodes is not None:
                return nodes

    def _adopt(self) -> list[Node]:
        """Nodes that were there before."""
        spec, zone = self._spec, self._spec.zones[0]
        while True:
            there = self._ask(lambda: list_nodes(self._spec.project, zone))
            nodes = [there.get(name, Node(name)) for name in self._spec.nodes]
            for node in nodes:
                if node.state == GONE:
                    known = ", ".join(sorted(there)[:8]) or "none"
                    rule = f"there is no such node in {zone}; there are: {known}"
                    raise ConfigError("cluster.tpu.nodes", rule, node.name)
                if node.state != READY and node.state not in COMING:
                    rule = f"is {node.state}; start it, or take another"
                    raise ConfigError("cluster.tpu.nodes", rule, node.name)
            if not self._ledger.open:
                names = self._spec.nodes
                asked = Asked(
                    NODE, ",".join(names), spec.project, zone, names, self._chips, utc(time.time())
                )
                asked.owned = False
                self._ledger.asked.append(asked)
            if all(node.ready for node in nodes):
                self._note_held(self._ledger.open[-1])
                return nodes
            self._wait(", ".join(f"{node.name} is {node.condition}" for node in nodes))

    def _queued(self) -> list[Node] | None:
        """One look at the queued resource, which is asked for if there is none."""
        asked = self._ledger.owned[-1] if self._ledger.owned else None
        if asked is None:
            asked = self._intend(QUEUED, self._zones.here, len(self._ledger.asked))
        if asked.state is None:
            self._create(asked)
        queued = self._ask(lambda: look_at(asked))
        assert isinstance(queued, Queued)
        self._see(asked, queued.state)
        if queued.state == GONE:
            self._say(f"muster: {asked.name} is no more: somebody has deleted it")
            self._close(asked)
            self._wait(f"{asked.zone}: asking anew")
            return None
        if queued.state in DEAD or queued.state == "DELETING":
            why = f": {queued.error.said}" if queued.error else ""
            self._say(f"muster: {asked.name} in {asked.zone} is {queued.state}{why}")
            self.delete([asked])
            if queued.state == "FAILED":
                raise queued.error or gcloud.of_operation({})
            return None
        if queued.state != ACTIVE:
            self._wait_in_queue(asked, queued)
            return None
        return self._ready([asked])

    def _wait_in_queue(self, asked: Asked, queued: Queued) -> None:
        """Wait a little more, or leave the queue of this zone."""
        waited = time.time() - (seconds_of(asked.asked_at) or time.time())
        limit = self._spec.queue_seconds
        if limit is not None and waited > limit:
            message = f"{asked.name} has waited for {duration(waited)} in {asked.zone}"
            self._say(f"muster: {message}, and tpu.queue_seconds is {limit:g}")
            self.delete([asked])
            raise GcloudError(STOCKOUT, message, "raise tpu.queue_seconds, or add to tpu.zones")
        self._wait(
            f"{asked.name} in {asked.zone} is {queued.state}, asked for {duration(waited)} ago"
        )

    def _direct(self) -> list[Node] | None:
        """Create the nodes, all in one zone."""
        open_ = self._ledger.owned
        zone = open_[0].zone if open_ else self._zones.here
        missing = self._cluster.slices - len(open_)
        first = len(self._ledger.asked)
        asked = [*open_, *(self._intend(NODE, zone, first + i) for i in range(missing))]
        new = [one for one in asked if one.state is None]
        errors = self._create_all(new)
        if errors:
            if any(error.kind == STOCKOUT for error in errors):
                self.delete(self._ledger.owned)  # All or nothing: slices must be in one zone.
            raise errors[0]
        return self._ready(asked)

    def _ready(self, asked: Sequence[Asked]) -> list[Node] | None:
        """The nodes, if they are all in order; else waits, or makes those that are not anew."""
        zone = asked[0].zone
        there = self._ask(lambda: list_nodes(self._spec.project, zone))
        for name in {name for one in asked for name in one.nodes} - there.keys():
            # A list that leaves one out is not enough to give machines up for.
            there[name] = self._ask(functools.partial(find_node, self._spec.project, zone, name))
        found = [(one, there[name]) for one in asked for name in one.nodes]
        for one in asked:
            if one.kind == NODE:
                self._see(one, there[one.name].state)
        broken = {id(one): one for one, node in found if node.state not in (READY, *COMING)}
        now = time.monotonic()
        waiting = {node.name for _, node in found if not node.ready}
        self._waiting = {name: self._waiting.get(name, now) for name in waiting}
        for one, node in found:
            if now > self._waiting.get(node.name, now) + _MAKE_SECONDS:
                broken[id(one)] = one
        if broken:
            states = ", ".join(f"{node.name} is {node.condition}" for one, node in found
                               if id(one) in broken)  # fmt: skip
            self._say(f"muster: {states}: deleted, to be made anew")
            self.delete(list(broken.values()))
            return None
        if all(node.ready for _, node in found):
            for one in asked:
                self._note_held(one)
            return [node for _, node in found]
        self._wait(", ".join(f"{node.name} is {node.condition}" for _, node in found))
        return None
