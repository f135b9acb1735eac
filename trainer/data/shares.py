"""Which source element n of a mixture is from, and how many each has given before: in closed form.

Element n comes from source s by integer arithmetic on n and the weights, so nothing has to be
counted up to n. All but the last source together have had f(n) = round(n * P / Q) of the first n
elements, P and Q being their weight and that of all; of these f(n), all but the last two have
had another such part, and so on. Each of these counts grows by 0 or 1 with n: so each element is
from exactly one source, each source's elements come one by one, and after n elements each has had
its share of them but for as many elements as there are sources at most.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

_ONE = 1 << 30  # The sum of all weights as integers, about.


@dataclasses.dataclass(frozen=True)
class Span:
    """From one element on, a mixture of these weights.

    Attributes:
      first: the first element.
      weights: name -> weight, not negative, not all 0.
      taken: name -> how many elements of each source came before `first`; 0 if it is not there.
    """

    first: int
    weights: Mapping[str, float]
    taken: Mapping[str, int]

    @property
    def names(self) -> list[str]:
        """The sources, in the order that `choose` counts them."""
        return sorted(self.weights)

    def choose(self, elements: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Source and index in it of elements [N] of this span: two of [N] int64."""
        return choose(self._integers(), elements - self.first, self._taken())

    def counts(self, element: int) -> dict[str, int]:
        """How many elements of each source come before one of this span."""
        new = counts(self._integers(), element - self.first)
        counted = {
            name: int(old + more)
            for name, old, more in zip(self.names, self._taken(), new, strict=True)
        }
        return {**self.taken, **counted}  # With those that are out of the mixture.

    def _integers(self) -> list[int]:
        total = sum(self.weights.values())
        # However little it is: a source that has a weight has its turn.
        return [
            max(1, round(self.weights[name] / total * _ONE)) if self.weights[name] else 0
            for name in self.names
        ]

    def _taken(self) -> np.ndarray:
        return np.array([self.taken.get(name, 0) for name in self.names], np.int64)

    def as_json(self) -> dict[str, Any]:
        """Plain JSON, for a checkpoint's data position."""
        weights = {name: float(self.weights[name]) for name in self.names}
        return {"first_example": self.first, "weights": weights, "taken": dict(self.taken)}

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Span:
        """From what `as_json` made."""
        return cls(record["first_example"], record["weights"], record["taken"])


def choose(
    weights: Sequence[int], elements: np.ndarray, taken: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The source of each element, and how many of that source came before it.

    Args:
      weights: [S] integers, not negative, not all 0.
      elements: [N] int64.
      taken: [S] int64, added to the second result.
    """
    count = np.array(elements, np.int64)
    source: np.ndarray = np.zeros(len(count), np.int64)
    index = count.copy()
    open_: np.ndarray = np.ones(len(count), bool)  # Not from any source looked at so far.
    total = sum(weights)
    for number in range(len(weights) - 1, 0, -1):
        rest = total - weights[number]
        before, after = _part(count, rest, total), _part(count + 1, rest, total)
        here = open_ & (after == before)
        source[here] = number
        index[here] = (count - before)[here]
        open_ &= ~here
        count, total = before, rest
        if not rest:
            break
    index[open_] = count[open_]
    return source, index + taken[source]


def counts(weights: Sequence[int], element: int) -> list[int]:
    """How many elements of each source come before an element: [S], their sum is `element`."""
    count, total = np.array([element], np.int64), sum(weights)
    found = [0] * len(weights)
    for number in range(len(weights) - 1, 0, -1):
        rest = total - weights[number]
        before = _part(count, rest, total) if total else count
        found[number] = int((count - before)[0])
        count, total = before, rest
    found[0] = int(count[0])
    return found


def _part(count: np.ndarray, rest: int, total: int) -> np.ndarray:
    """round(count * rest / total), without what int64 cannot hold."""
    whole, left = np.divmod(count, total)
    return whole * rest + (2 * left * rest + total) // (2 * total)
