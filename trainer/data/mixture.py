"""Several sources in one order, each with its weight, its own shuffle and its own epochs."""

from __future__ import annotations

import hashlib
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import grain
import numpy as np

from launch.spec import ConfigError, closest, require
from trainer.data.filtering import ENDLESS
from trainer.data.shares import Span

_NAME = re.compile(r"[A-Za-z0-9_-]+")


def mixture(
    sources: Mapping[str, grain.MapDataset],
    weights: Mapping[str, float],
    field: str = "config.data.mixture",
) -> Mixture:
    """Examples of several datasets, so many of each as its weight says.

    The datasets take turns in a fixed pattern: any stretch of the mixture holds each one's share
    but for an example or two. Each goes through its own examples in its own order: give each
    `training_order` of it, with `source_seed`. Transform the mixture with map() and random_map()
    alone; shuffle, filter and pack before.

    Weights may change when a run resumes: from that example on the new ones hold, and each source
    goes on where it stood. A source may be added, and begins at its beginning; or taken out, and
    goes on where it stood should it come back.

    Args:
      sources: name -> examples, of the same names, shapes and dtypes in all.
      weights: name -> weight, not negative, not all 0; only their ratios count.
      field: how messages call the weights.

    Raises:
      ConfigError: weights and sources do not fit, or a source is a mixture itself.
    """
    return Mixture(sources, weights, field)


def source_seed(seed: int, name: str) -> int:
    """A seed for each source of a mixture, which does not depend on what else is in it."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:4], "little")


def check_weights(weights: Mapping[str, float], field: str) -> None:
    """Refuse weights that are none.

    Raises:
      ConfigError: a weight is negative or infinite, all are 0, or a name is no word.
    """
    require(bool(weights), field, dict(weights), "holds no source")
    for name, weight in weights.items():
        rule = "a source's name must be letters, digits, _ and -"
        require(bool(_NAME.fullmatch(name)), field, name, rule)
        number = isinstance(weight, (int, float)) and not isinstance(weight, bool)
        ok = number and 0 <= weight < float("inf")
        require(ok, f"{field}.{name}.weight", weight, "must be a number, 0 or more")
    rule = "all weights are 0; at least one source must be read"
    require(any(weights.values()), field, dict(weights), rule)


class Mixture(grain.MapDataset):
    """A dataset that knows its history; see `mixture`.

    Attributes:
      sources: name -> dataset.
      history: spans of weights, by their first examples; the last one is today's.
    """

    def __init__(
        self, sources: Mapping[str, grain.MapDataset], weights: Mapping[str, float], field: str
    ):
        check_weights(weights, field)
        for name in sorted({*sources} ^ {*weights}):
            known = weights if name in sources else sources
            lacks = "weight" if name in sources else "source"
            raise ConfigError(f"{field}.{name}", f"has no {lacks}; {closest(name, known)}")
        self.names = sorted(sources)
        for name in self.names:
            if not isinstance(sources[name], grain.MapDataset):
                kind = type(sources[name]).__name__
                rule = f"is {kind}, and must be a grain.MapDataset; training_order() makes one"
                raise ConfigError(f"{field}.{name}", rule)
        super().__init__([sources[name] for name in self.names])
        self.sources = {name: sources[name] for name in self.names}
        self.field = field
        self._weights = {name: float(weights[name]) for name in self.names}
        self.history = [Span(0, self._weights, {})]
        self._length = self._find_length()

    def __len__(self) -> int:
        return self._length

    def __str__(self) -> str:
        return f"Mixture({', '.join(self.names)})"

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return self.slice(index)
        return self._getitems([index])[0]

    def _getitems(self, indices: Sequence[int]) -> Sequence[Any]:
        elements = np.asarray(indices, np.int64)
        found: list[Any] = [None] * len(elements)
        # Which span an element lies in; nearly always the last one.
        firsts = [span.first for span in self.history]
        spans = np.searchsorted(firsts, elements, side="right") - 1
        for number in np.unique(spans).tolist():
            span, here = self.history[number], np.flatnonzero(spans == number)
            source, index = span.choose(elements[here])
            for s, name in enumerate(span.names):
                places = here[source == s]
                if len(places):
                    wanted = index[source == s].tolist()
                    for place, example in zip(places, self._read(name, wanted), strict=True):
                        found[place] = example
        return found

    def _read(self, name: str, indices: Sequence[int]) -> Sequence[Any]:
        if name not in self.sources:
            raise ValueError(f"example {indices[0]} of {name} was read before it was taken out")
        return self.sources[name]._getitems(indices)

    def counts(self, example: int) -> dict[str, int]:
        """How many examples of each source come before one of the mixture."""
        span = [span for span in self.history if span.first <= example][-1]
        return span.counts(example)

    def restore(self, history: Sequence[Mapping[str, Any]], example: int) -> list[str]:
        """Go on at `example` of a mixture with this history, by today's weights from there on.

        Args:
          history: spans as JSON, as in a data position.
          example: the next one.

        Returns:
          What has changed, in a line for people; none if nothing has.
        """
        spans = [Span.from_json(record) for record in history]
        old = spans[-1]
        self.history = spans
        if old.weights != self._weights:
            # Weights that were never used are no history.
            kept = [span for span in spans if span.first < example]
            self.history = [*kept, Span(example, self._weights, old.counts(example))]
        self._length = self._find_length()
        return [] if old.weights == self._weights else [_changes(old, self._weights, example)]

    def _find_length(self) -> int:
        lengths = {name: len(dataset) for name, dataset in self.sources.items()}
        span = self.history[-1]
        used = {name: lengths[name] for name in self.names if span.weights[name]}
        if all(length >= ENDLESS for length in used.values()):
            return sys.maxsize
        # The most that no source gives more for than it has: counts only grow.
        low, high = span.first, span.first + sum(min(n, ENDLESS >> 8) for n in lengths.values())
        while low < high:
            middle = (low + high + 1) // 2
            counted = span.counts(middle)
            fits = all(counted[name] <= length for name, length in used.items())
            low, high = (middle, high) if fits else (low, middle - 1)
        return low


def _changes(old: Span, weights: Mapping[str, float], example: int) -> str:
    """`data: from example 640 on, weights web 0.7 -> 0.5, books 0.1 (new)`."""
    parts = []
    for name in sorted({*old.weights, *weights}):
        before, now = old.weights.get(name), weights.get(name)
        if before is None and now is not None:
            done = old.taken.get(name, 0)
            parts.append(f"{name} {now:g} (new{f', goes on at its {done:,}th' if done else ''})")
        elif now is None:
            parts.append(f"{name} taken out after {old.counts(example)[name]:,} examples")
        elif before != now:
            parts.append(f"{name} {before:g} -> {now:g}")
    return f"data: the mixture changes at example {example:,}: {', '.join(parts)}"
