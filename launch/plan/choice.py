"""Ways to run a training step, estimated or compiled: which to compile next, and in what order
they are shown. Pure."""

from __future__ import annotations

import dataclasses
import itertools
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

# Fields of the config that a search sets.
SEARCHED = (
    *("mesh", "model.remat", "num_microbatches", "sharding.optimizer_axes", "global_batch_size"),
)


@dataclasses.dataclass(eq=False)
class Way:
    """A way to run the step.

    Attributes:
      fields: of the config, by dotted name.
      accelerator: of a TPU cluster.
      devices: how many.
      tokens: in a step.
      estimate: figures named as in a plan's record, and `state_bytes`.
      overrides: the words that give it.
      record: the plan, once it was compiled.
      error: why it could not be.
    """

    fields: Mapping[str, Any]
    accelerator: str | None
    devices: int
    tokens: int
    estimate: Mapping[str, Any]
    overrides: tuple[str, ...] = ()
    record: Mapping[str, Any] | None = None
    error: str | None = None

    @property
    def figures(self) -> Mapping[str, Any]:
        """The best that is known."""
        return self.estimate if self.record is None else self.record

    @property
    def usable_bytes(self) -> float | None:
        """Memory of a device that a program can have; None if not known."""
        figures = self.figures
        return figures.get("usable_hbm_bytes") or figures.get("hbm_bytes")

    @property
    def seconds_per_token(self) -> float | None:
        """The bound, so that steps of different batches compare."""
        seconds = self.figures["step_seconds_bound"]
        return None if seconds is None else seconds / self.tokens

    @property
    def remat(self) -> str | None:
        """What the model keeps."""
        return self.fields.get("model.remat")

    @property
    def family(self) -> tuple[Any, ...]:
        """Ways that differ from it in memory and hardly in time: once one of them fits, it is as
        good as the others."""
        rest = {k: v for k, v in self.fields.items() if k not in _MEMORY_ALONE}
        return (self.accelerator, *sorted((k, str(v)) for k, v in rest.items()))


_MEMORY_ALONE = ("num_microbatches", "sharding.optimizer_axes")


@dataclasses.dataclass(frozen=True)
class Correction:
    """How many times the estimated temporaries were seen, by what was compiled so far.

    Attributes:
      temp: the middle one of what was seen.
      temp_by_remat: the same of each remat policy: it decides what there is to be estimated.
    """

    temp: float = 1.0
    temp_by_remat: Mapping[Any, float] = dataclasses.field(default_factory=dict)

    @classmethod
    def of(cls, ways: Iterable[Way]) -> Correction:
        """What these show."""
        seen: dict[Any, list[float]] = {}
        for way in ways:
            if way.record is not None and way.estimate["temp_bytes"]:
                temp = way.record["peak_bytes"] - way.estimate["state_bytes"]
                seen.setdefault(way.remat, []).append(temp / way.estimate["temp_bytes"])
        if not seen:
            return cls()
        by_remat = {remat: statistics.median(ratios) for remat, ratios in seen.items()}
        return cls(statistics.median(itertools.chain(*seen.values())), by_remat)

    def peak_bytes(self, way: Way) -> float:
        """A way's memory, by its plan or by the estimate and this."""
        if way.record is not None:
            return way.record["peak_bytes"]
        times = self.temp_by_remat.get(way.remat, self.temp)
        return way.estimate["state_bytes"] + times * way.estimate["temp_bytes"]

    def fits(self, way: Way) -> bool:
        """Whether a way fits; it does where memory is not known."""
        if way.record is not None:
            return way.record["fits"] is not False
        usable = way.usable_bytes
        return way.error is None and (usable is None or self.peak_bytes(way) <= usable)


def next_way(ways: Sequence[Way], busy: Sequence[Way]) -> Way | None:
    """What to compile next; None if nothing can be learned any more.

    That is the quickest of those that are estimated to fit, one of a family at a time; where none
    is, the smallest. Types of accelerators take turns.

    Args:
      ways: all of them.
      busy: those that are being compiled.
    """
    correction = Correction.of(ways)
    taken = {way.family for way in busy}
    taken |= {way.family for way in ways if way.record is not None and correction.fits(way)}
    # In a family that was seen not to fit: only what is estimated to take less.
    least: dict[tuple[Any, ...], float] = {}
    for way in ways:
        if way.record is not None or way.error is not None:
            peak = _estimated_peak(way)
            least[way.family] = min(peak, least.get(way.family, math.inf))
    open_ways = [
        way
        for way in ways
        if way.record is None
        and way.error is None
        and way.family not in taken
        and _estimated_peak(way) < least.get(way.family, math.inf)
    ]
    turns: dict[str | None, int] = {}
    for way in ways:
        if way in busy or way.record is not None or way.error is not None:
            turns[way.accelerator] = turns.get(way.accelerator, 0) + 1

    def place(way: Way) -> tuple[Any, ...]:
        return (turns.get(way.accelerator, 0), *_order(way, correction))

    return min(open_ways, key=place, default=None)


def ranked(ways: Sequence[Way]) -> list[Way]:
    """In the order in which they are shown: what fits, the quickest first."""
    correction = Correction.of(ways)
    return sorted(ways, key=lambda way: _order(way, correction))


def _order(way: Way, correction: Correction) -> tuple[Any, ...]:
    fits = correction.fits(way)
    peak = correction.peak_bytes(way)
    time = way.seconds_per_token
    known = math.inf if time is None else float(f"{time:.3g}")
    few = way.fields["num_microbatches"]
    return (not fits, known if fits else peak, _unhidden(way), few, peak, way.record is None)


def _unhidden(way: Way) -> float:
    """Seconds per token if nothing were hidden behind anything: tells apart what a bound does
    not."""
    parts = way.figures["bounds"].values()
    return sum(seconds for seconds in parts if seconds is not None) / way.tokens


def _estimated_peak(way: Way) -> float:
    return way.estimate["state_bytes"] + way.estimate["temp_bytes"]


def overrides(fields: Mapping[str, Any], own: Mapping[str, Any]) -> tuple[str, ...]:
    """The words that set fields of a config which has other values.

    Args:
      fields: by dotted name.
      own: the config's own, of which one size of the mesh may be -1: it gives way by itself.
    """
    return tuple(
        f"--config.{name}={_value(value)}"
        for name, value in fields.items()
        if own[name] != value and not (name.startswith("mesh.") and own[name] == -1)
    )


def _value(value: Any) -> str:
    # Quotes that need no escape in a shell's word.
    return str(value).replace("'", '"')
