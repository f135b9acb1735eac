"""What a run has in Google Cloud: kept in line with the ledger, and given back."""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from launch import rundir
from launch.backends.tpu import commands, gcloud
from launch.backends.tpu.commands import NODE, QUEUED
from launch.backends.tpu.gcloud import MISSING, GcloudError
from launch.backends.tpu.ledger import Asked, Ledger
from launch.backends.tpu.nodes import DEAD, GONE, Node, Queued, list_nodes, list_queued, look_at
from launch.contract import utc
from launch.spec import Cluster

_PATIENCE_SECONDS = 900.0  # So long an API that gives no answer is asked again.
_RETRY_SECONDS = 1.25  # At first.
_DELETE_TRIES = 5


def labels(cluster: Cluster, run_id: str) -> dict[str, str]:
    """By which everything of a run is found again."""
    user = rundir.user_name().lower()
    user = "".join(letter if letter.isalnum() and letter.isascii() else "-" for letter in user)
    ours = {commands.RUN_LABEL: run_id.lower(), "muster-user": user[:63]}
    return {**cluster.tpu.labels, **ours}


Found = tuple[str, Node | Queued]  # What kind of thing it is, and the thing.


def all_labelled(project: str | None, zone: str) -> list[Found]:
    """Everything in a zone that carries the label of a run; queued resources first.

    Raises:
      GcloudError: no answer, or no leave.
    """
    found: list[Found] = [(QUEUED, one) for one in list_queued(project, zone).values()]
    found += [(NODE, one) for one in list_nodes(project, zone).values()]
    return [(kind, one) for kind, one in found if commands.RUN_LABEL in one.labels]


class Holdings:
    """Everything that carries a run's name in Google Cloud.

    `pause` is how it waits for answers: it may raise, and nothing is lost then.
    """

    def __init__(
        self,
        ledger: Ledger,
        say: Callable[[str], None],
        pause: Callable[[float], None] = time.sleep,
        labelled: Callable[[str | None, str], Sequence[Found]] | None = None,
    ):
        """Takes what is on record.

        Args:
          ledger: of the run.
          say: tells the user a line.
          pause: waits so many seconds.
          labelled: what there is in a project and zone with the label of any run.
        """
        self._ledger = ledger
        self._say = say
        self._pause = pause
        self._labelled = labelled or all_labelled
        self._unheard = ""  # What was said of an API that gives no answer.

    def reconcile(self) -> None:
        """Bring ledger and API together; what is ours and not in the ledger is deleted."""
        self.look()
        self.delete(self.strays())

    def look(self) -> None:
        """See what has become of everything in the ledger."""
        for asked in self._ledger.open:
            if asked.owned:
                there = self._ask(functools.partial(look_at, asked))
                if there.state != GONE:
                    self._see(asked, there.state)
                elif asked.state is not None:
                    self._close(asked)  # Else it was never asked for; it may be now.

    def dead(self) -> list[Asked]:
        """Queued resources that will never give machines, and count against the quota."""
        return [one for one in self._ledger.owned if one.kind == QUEUED and one.state in DEAD]

    def strays(self) -> list[Asked]:
        """What carries this run's label and the ledger does not know as open."""
        zones = sorted({(one.project, one.zone) for one in self._ledger.asked}, key=str)
        return [stray for project, zone in zones for stray in self._strays(project, zone)]

    def _strays(self, project: str | None, zone: str) -> list[Asked]:
        run = self._ledger.run_id.lower()
        known = {one.name for one in self._ledger.open}
        known |= {name for one in self._ledger.open for name in one.nodes}
        strays = []
        for kind, one in self._ask(functools.partial(self._labelled, project, zone)):
            # A node goes with the queued resource that has made it.
            if one.labels.get(commands.RUN_LABEL) != run or {one.name, one.maker} & known:
                continue
            known.add(one.name)
            now = utc(time.time())
            stray = Asked(kind, one.name, project, zone, (one.name,), 0, now, "FOUND")
            self._ledger.asked.append(stray)
            strays.append(stray)
        if strays:
            self._ledger.write()
        return strays

    def delete(self, asked: Sequence[Asked]) -> list[Asked]:
        """Delete things and see that they are gone; what is still there is returned, and stays in
        the ledger."""
        asked = [one for one in asked if one.owned and one.open]
        if not asked:
            return []
        with ThreadPoolExecutor(min(16, len(asked))) as pool:
            gone = list(pool.map(self._delete, asked))
        self._ledger.write()
        return [one for one, ok in zip(asked, gone, strict=True) if not ok]

    def _delete(self, asked: Asked) -> bool:
        """Delete one thing and see that it is gone; an API that gives no answer is waited for."""
        argv = commands.delete(asked.project, asked.kind, asked.zone, asked.name)
        limit = time.monotonic() + _PATIENCE_SECONDS
        refusals = 0
        told: set[str] = set()

        def say(text: str) -> None:
            if text not in told:
                told.add(text)
                self._say(text)

        while refusals < _DELETE_TRIES and time.monotonic() < limit:
            try:
                gcloud.run(argv, timeout_seconds=gcloud.LONG_SECONDS)
            except GcloudError as error:
                if error.kind != MISSING:
                    say(f"muster: {asked.name} is not deleted yet: {error.said}")
                refusals += error.kind != gcloud.UNAVAILABLE
            try:
                if look_at(asked).state == GONE:
                    asked.see(GONE)
                    asked.ended_at = utc(time.time())
                    return True
            except GcloudError as error:
                say(f"muster: whether {asked.name} is deleted is not known: {error.said}")
            time.sleep(min(30.0, 2.0**refusals / 2))
        return False

    def release(self) -> list[Asked]:
        """Give back everything that is owned, at the end of the run; what could not be."""
        owned = self._ledger.owned
        for asked in self._ledger.open:
            if not asked.owned:
                asked.ended_at = utc(time.time())
        left = self.delete(owned)
        self._ledger.write()
        names = ", ".join(one.name for one in owned if one not in left)
        if names:
            self._say(f"muster: deleted {names}")
        for one in left:
            shown = " ".join(commands.delete(one.project, one.kind, one.zone, one.name))
            self._say(f"muster: error: {one.name} could not be deleted; `muster gc`, or: {shown}")
        return left

    # ------------------------------------------------------------------ asking

    def _ask(self, ask: Callable[[], Any], over: threading.Event | None = None) -> Any:
        """Ask, again and again while there is no answer; what it says.

        Args:
          ask: asks.
          over: in a thread of its own: when it is set, no more.
        """
        limit = time.monotonic() + _PATIENCE_SECONDS
        seconds = _RETRY_SECONDS
        while True:
            try:
                return ask()
            except GcloudError as error:
                late = time.monotonic() > limit or (over is not None and over.is_set())
                if error.kind != gcloud.UNAVAILABLE or late:
                    raise
                if error.said != self._unheard:
                    self._unheard = error.said
                    self._say(f"muster: Google Cloud gives no answer, asked again: {error.said}")
            (over.wait if over else self._pause)(seconds)
            seconds = min(60.0, seconds * 2)

    # ------------------------------------------------------------------ keeping the books

    def _see(self, asked: Asked, state: str) -> None:
        if asked.see(state):
            self._ledger.write()

    def _close(self, asked: Asked) -> None:
        asked.see(GONE)
        asked.ended_at = utc(time.time())
        self._ledger.write()

    def _note_held(self, asked: Asked) -> None:
        if asked.held_at is None:
            asked.held_at = utc(time.time())
        self._ledger.write()
