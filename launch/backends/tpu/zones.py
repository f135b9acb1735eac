"""The zones in which a run asks for machines, one after another, and what errors mean for that."""

from __future__ import annotations

import time
from collections.abc import Callable

from launch.backends.tpu.gcloud import FAILED, QUOTA, STOCKOUT, GcloudError
from launch.spec import Cluster, ConfigError
from launch.times import duration

_RETRY_SECONDS = 5.0
_MOST_ROUND_SECONDS = 60.0  # Between two rounds through the zones, when none has anything.
_MOST_FAILURES = 5  # What fails more often than that will not be made.


class Zones:
    """Where to ask now."""

    def __init__(
        self, cluster: Cluster, say: Callable[[str], None], pause: Callable[[float], None]
    ):
        """Begins with the first zone; for the arguments see Fleet."""
        self._cluster = cluster
        self._spec = cluster.tpu
        self._say = say
        self._pause = pause
        self._next = 0
        self.begin()

    def begin(self) -> None:
        """Begin a search; it starts where the last one has found something."""
        self._round_seconds = _RETRY_SECONDS
        self._failures = 0
        self._began = time.monotonic()

    @property
    def here(self) -> str:
        """The zone in which to ask."""
        return self._spec.zones[self._next % len(self._spec.zones)]

    def fail(self, error: GcloudError) -> None:
        """What an error means for the run: another zone, a wait, or its end.

        Raises:
          ConfigError: the end.
        """
        last = self._next % len(self._spec.zones) == len(self._spec.zones) - 1
        here = self.here
        if error.kind not in (STOCKOUT, QUOTA, "zone", "accelerator") and not error.passes:
            raise self._refused(error, here)
        self._next += 1
        if not last:
            self._say(f"muster: {here}: {error.kind}: {error.said}; trying {self.here}")
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
