"""A run's slices: asked for, waited for, made anew; all by way of the ledger."""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable, Sequence

from launch.backends.tpu import commands, gcloud
from launch.backends.tpu.commands import NODE, QUEUED
from launch.backends.tpu.gcloud import EXISTS, FAILED, QUOTA, STOCKOUT, GcloudError
from launch.backends.tpu.holdings import Holdings, labels
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
from launch.contract import utc
from launch.spec import Cluster, ConfigError
from launch.times import duration, seconds_of

_RETRY_SECONDS = 5.0
_MAKE_SECONDS = 1800.0  # A node that is made, or worked on, for longer will not come.
_MOST_ROUND_SECONDS = 60.0  # Between two rounds through the zones, when none has anything.
_MOST_FAILURES = 5  # What fails more often than that will not be made.
_SAID_EVERY_SECONDS = 300.0  # A wait in which nothing changes is told again after this.


class Fleet(Holdings):
    """The machines that one run wants; see Holdings."""

    def __init__(
        self,
        cluster: Cluster,
        ledger: Ledger,
        say: Callable[[str], None],
        pause: Callable[[float], None],
    ):
        """Takes what the run wants and what it has.

        Args:
          cluster: a TPU cluster.
          ledger: of the run.
          say: tells the user a line.
          pause: waits so many seconds; raises when the run is to stop.
        """
        super().__init__(ledger, say, pause)
        self._cluster = cluster
        self._spec = cluster.tpu
        self._labels = labels(cluster, ledger.run_id)
        self._next_zone = 0
        self._round_seconds = _RETRY_SECONDS
        self._failures = 0
        self._waiting: dict[str, float] = {}  # Nodes that are not ready, and since when.
        self._told = ("", 0.0)
        self._began = time.monotonic()

    # ------------------------------------------------------------------ getting

    def acquire(self) -> list[Node]:
        """Have all slices, READY; waits as long as that takes.

        Returns:
          The nodes in order of their slices.

        Raises:
          ConfigError: it cannot be, whatever the wait.
        """
        self._began = time.monotonic()
        self._round_seconds, self._failures = _RETRY_SECONDS, 0
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
                self._fail(error)
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

    @property
    def _chips(self) -> int:
        return self._cluster.slice.chips * self._cluster.slices

    def _queued(self) -> list[Node] | None:
        """One look at the queued resource, which is asked for if there is none."""
        asked = self._ledger.owned[-1] if self._ledger.owned else None
        if asked is None:
            asked = self._intend(QUEUED, self._zone, len(self._ledger.asked))
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
        zone = open_[0].zone if open_ else self._zone
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

    def _create_all(self, asked: Sequence[Asked]) -> list[GcloudError]:
        """Create nodes side by side, for gcloud waits until they are there."""
        errors: list[GcloudError] = []
        over = threading.Event()

        def one(each: Asked) -> None:
            try:
                self._create(each, over)
            except GcloudError as error:
                errors.append(error)

        threads = [threading.Thread(target=one, args=(each,), daemon=True) for each in asked]
        for thread in threads:
            thread.start()
        try:
            while any(thread.is_alive() for thread in threads):
                waited = duration(time.monotonic() - self._began)
                names = ", ".join(each.name for each in asked)
                self._tell(f"{names} in {asked[0].zone}: being created, asked for {waited} ago")
                self._pause(0.1)
        except BaseException:
            # gcloud asks again by itself: it could make what is seen to be gone by now.
            over.set()
            for thread in threads:
                thread.join()
            raise
        return errors

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

    # ------------------------------------------------------------------ asking

    @property
    def _zone(self) -> str:
        return self._spec.zones[self._next_zone % len(self._spec.zones)]

    def _intend(self, kind: str, zone: str, number: int) -> Asked:
        """Write down what is about to be asked for."""
        name = commands.resource_name(self._ledger.run_id, number)
        nodes = commands.node_names(self._cluster, name) if kind == QUEUED else (name,)
        chips = self._chips if kind == QUEUED else self._cluster.slice.chips
        now = utc(time.time())
        asked = Asked(kind, name, self._spec.project, zone, nodes, chips, now)
        self._ledger.asked.append(asked)
        self._ledger.write()
        return asked

    def _create(self, asked: Asked, over: threading.Event | None = None) -> None:
        """Ask for it, unless that is over. To ask twice gives one: the name is its own."""
        argv = commands.create(self._cluster, asked.kind, asked.zone, asked.name, self._labels)
        try:
            self._ask(
                lambda: gcloud.run(argv, timeout_seconds=gcloud.LONG_SECONDS, over=over), over
            )
        except GcloudError as error:
            if over and over.is_set():
                return  # Whether it is there is not known; the ledger has it.
            # gcloud itself asks again when it got no answer, and may then find its own work.
            if error.kind == EXISTS:
                self._check_ours(asked, over)
            else:
                if error.begun and self._is_there(asked):
                    asked.see("FAILED")
                    self.delete([asked])
                else:
                    self._close(asked)
                raise
        asked.see("ASKED")
        self._ledger.write()

    def _check_ours(self, asked: Asked, over: threading.Event | None) -> None:
        there = self._ask(lambda: look_at(asked), over)
        run = self._ledger.run_id.lower()
        if there.state != GONE and there.labels.get(commands.RUN_LABEL) != run:
            asked.owned = False
            self._close(asked)
            raise GcloudError("name", f"there is another {asked.name}, which this run has not made")

    def _is_there(self, asked: Asked) -> bool:
        """Whether a creation that failed has left something behind; if unknown, yes."""
        try:
            return look_at(asked).state != GONE
        except GcloudError:
            return True

    def _fail(self, error: GcloudError) -> None:
        """What an error means for the run: another zone, a wait, or its end.

        Raises:
          ConfigError: the end.
        """
        last = self._next_zone % len(self._spec.zones) == len(self._spec.zones) - 1
        here = self._zone
        if error.kind not in (STOCKOUT, QUOTA, "zone", "accelerator") and not error.passes:
            raise self._refused(error, here)
        self._next_zone += 1
        if not last:
            self._say(f"muster: {here}: {error.kind}: {error.said}; trying {self._zone}")
            return
        self._failures += error.kind == FAILED
        if error.kind not in (STOCKOUT, FAILED) or self._failures > _MOST_FAILURES:
            raise self._refused(error, here)
        waited = time.monotonic() - self._began
        limit = self._spec.queue_seconds
        if limit is not None and waited > limit:
            raise self._refused(error, ", ".join(self._spec.zones))
        seconds = self._round_seconds
        self._round_seconds = min(_MOST_ROUND_SECONDS, seconds * 2)
        zones = ", ".join(self._spec.zones)
        what = f"no zone has it ({zones})" if error.kind == STOCKOUT else f"{here}: {error.kind}"
        self._say(f"muster: {what}: {error.said}; tried again in {duration(seconds)}")
        self._pause(seconds)

    def _refused(self, error: GcloudError, zone: str) -> ConfigError:
        field = {
            "zone": "cluster.tpu.zones",
            "accelerator": "cluster.accelerator",
            "runtime version": "cluster.tpu.runtime_version",
        }.get(error.kind, "")
        rule = f"Google Cloud refuses it in {zone}: {error}"
        if not field:
            return ConfigError("", rule)
        values = {
            "cluster.tpu.zones": zone,
            "cluster.accelerator": self._cluster.accelerator,
            "cluster.tpu.runtime_version": self._spec.runtime_version,
        }
        return ConfigError(field, rule, values[field])

    # ------------------------------------------------------------------ waiting

    def _wait(self, what: str) -> None:
        """Wait until the next look."""
        self._tell(what)
        self._pause(self._spec.poll_seconds)

    def _tell(self, what: str) -> None:
        """Say what is waited for, when it has changed but for its age, or now and then."""
        key = what.partition(", asked for")[0]
        told, at = self._told
        if key != told or time.monotonic() > at + _SAID_EVERY_SECONDS:
            self._told = (key, time.monotonic())
            self._say(f"muster: {what}")
