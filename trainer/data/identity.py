"""What data is recognised by: is it still what it was, and is it the same on every process?

An order depends on the config and the seed, and on the data being the same: as many examples, the
same index of a filter or a packing, and the same examples. Of these a few are looked at, by sums
that a data position holds. Rows that come in the order of a set, of a directory, or of the clock
are found in that way.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import grain
import numpy as np

from launch.spec import ConfigError
from trainer.data.mixture import Mixture

_PROBES = (0, 1, 2)  # Examples that are looked at.
# Not exact: other kinds of machines may round an augmentation differently.
_TOLERANCE = 1e-3

Identity = dict[str, dict[str, Any]]


def identify(dataset: grain.MapDataset, what: str) -> Identity:
    """What the data can be recognised by: JSON for each source of a mixture, or for "".

    Reads a few examples, twice.

    Raises:
      ConfigError: an example is another one when it is read again.
    """
    _check_twice(dataset, what)
    mixed = find_mixture(dataset)
    sources = {"": dataset} if mixed is None else mixed.sources
    return {name: _identify(source) for name, source in sources.items()}


def find_mixture(dataset: grain.MapDataset) -> Mixture | None:
    """The mixture that a dataset is, below its maps; None if it is none."""
    node = dataset
    while not isinstance(node, Mixture):
        if len(node.parents) != 1:
            return None
        node = node.parents[0]
    return node


def _identify(dataset: grain.MapDataset) -> dict[str, Any]:
    lengths, index, to_visit = [], [], [dataset]
    while to_visit:
        node = to_visit.pop()
        to_visit.extend(node.parents)
        if not node.parents:
            lengths.append(len(node))
            digest = getattr(getattr(node, "source", None), "digest", None)
            index += [digest] if digest else []
        proportions = getattr(getattr(node, "_selection_map", None), "_proportions", None)
        index += [f"mix {proportions}"] if proportions else []  # grain.MapDataset.mix
    examples = dataset._getitems([i for i in _PROBES if i < len(dataset)])
    return {
        "examples": sum(lengths),
        "index": ", ".join(index),
        "sketch": [_sketch(example) for example in examples],
    }


def _sketch(example: Any) -> list[int | float]:
    """A number for each array, which an array in another order has not: exact, but of floats."""
    if not isinstance(example, Mapping):
        return []  # Refused when a batch is made, with what it is.
    sums: list[int | float] = []
    for _, value in sorted(example.items()):
        array = np.asarray(value)
        weights: np.ndarray = 1 + np.arange(array.size) % 97
        if array.dtype.kind in "biu":
            total = int((array.reshape(-1).astype(np.uint64) * weights.astype(np.uint64)).sum())
            sums.append(total % (1 << 53))  # What JSON's readers hold without loss.
        elif array.dtype.kind == "f":
            flat = np.nan_to_num(array.reshape(-1).astype(np.float64))
            sums.append(float(flat @ weights / max(1, array.size)))
    return sums


def _check_twice(dataset: grain.MapDataset, what: str) -> None:
    probes = [i for i in _PROBES if i < len(dataset)]
    first, second = dataset._getitems(probes), dataset._getitems(probes)
    for number, one, other in zip(probes, first, second, strict=True):
        if not (isinstance(one, Mapping) and isinstance(other, Mapping)):
            continue
        for name in one:
            a, b = np.asarray(one[name]), np.asarray(other.get(name))
            if a.shape != b.shape or a.tobytes() != b.tobytes():
                raise ConfigError(
                    "config.task",
                    f"{name!r} of example {number} of the {what} is another one each time it is "
                    "read: something in it depends on the clock, on random numbers without a "
                    "seed, or on what was read before; use random_map(), which gives each example "
                    "a generator of its own, behind seed()",
                )


def difference(before: Identity, now: Identity) -> str:
    """How data differs from what it was, in a phrase; empty if it does not. Sources are compared
    that are in both."""
    for name in sorted(before.keys() & now.keys()):
        old, new = before[name], now[name]
        source = f"source {name!r}" if name else "the data"
        if old["examples"] != new["examples"]:
            return f"{source} had {old['examples']:,} examples, and has {new['examples']:,} now"
        if old["index"] != new["index"]:
            return (
                f"what {source} keeps of its examples, or how it packs or mixes them, has changed"
            )
        for number, (a, b) in enumerate(zip(old["sketch"], new["sketch"], strict=False)):
            if len(a) != len(b) or not all(map(_alike, a, b)):
                return f"example {_PROBES[number]} of {source} is another one"
    return ""


def _alike(a: float, b: float) -> bool:
    if isinstance(a, int) and isinstance(b, int):
        return a == b
    return bool(np.isclose(a, b, rtol=_TOLERANCE, atol=_TOLERANCE))
