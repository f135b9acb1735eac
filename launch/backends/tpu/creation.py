"""Asking for machines: each once, whatever becomes of the answer."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence

from launch.backends.tpu import commands, gcloud
from launch.backends.tpu.commands import QUEUED
from launch.backends.tpu.gcloud import EXISTS, GcloudError
from launch.backends.tpu.holdings import Holdings, labels
from launch.backends.tpu.ledger import Asked, Ledger
from launch.backends.tpu.nodes import GONE, look_at
from launch.contract import utc
from launch.spec import Cluster
from launch.times import duration

_SAID_EVERY_SECONDS = 300.0  # A wait in which nothing changes is told again after this.


class Creation(Holdings):
    """Holdings to which more can be added; see Holdings."""

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
        self._told = ("", 0.0)

    @property
    def _chips(self) -> int:
        return self._cluster.slice.chips * self._cluster.slices

    def _intend(self, kind: str, zone: str, number: int) -> Asked:
        """Write down what is about to be asked for."""
        name = commands.resource_name(self._ledger.run_id, number)
        nodes = commands.node_names(self._cluster, name) if kind == QUEUED else (name,)
        chips = self._chips if kind == QUEUED else self._cluster.slice.chips
        now = utc(time.time())
        asked = Asked(kind, name, self._spec.project, zone, nodes, chips, now)
        self._ledger.asked.append(asked)
        self._ledger.write()
        self._ledger.on_intent()
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

    def _create_all(self, asked: Sequence[Asked]) -> list[GcloudError]:
        """Create nodes side by side, for gcloud waits until they are there."""
        errors: list[GcloudError] = []
        over = threading.Event()
        began = time.monotonic()

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
                waited = duration(time.monotonic() - began)
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
