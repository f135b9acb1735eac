"""Leave examples out, and still know example i."""

from __future__ import annotations

import hashlib
import re
import types
from collections.abc import Callable, Sequence
from typing import Any, SupportsIndex

import grain
import numpy as np

from launch.spec import ConfigError
from trainer.data.index import make_index
from trainer.data.sources import read_many

_CHUNK = 4096  # Examples that one process reads for the others at a time.
_READ = 256  # Examples held at a time.
_PROBES = 32
ENDLESS = 1 << 62  # Grain's repeat() is as long as sys.maxsize.


def filtered(
    source: grain.sources.RandomAccessDataSource,
    keep: Callable[[Any], Any],
    field: str = "config.task",
) -> Filtered:
    """The examples of `source` for which `keep(example)` is true, in their order.

    Reads all of `source` once, together with the other processes of a gang; from then on the run
    has an index of what is kept (see `trainer.data.index`), and example i is found at once.

    Args:
      source: examples by index; or a finite grain.MapDataset.
      keep: depends on the example alone.
      field: how messages call this filter.

    Raises:
      ConfigError: nothing is kept, `source` is endless, or an index made before is not true of
        today's `keep`.
    """
    return Filtered(source, keep, field)


class Filtered:
    """A source of what a filter keeps.

    Attributes:
      num_dropped: examples left out.
      digest: of which are kept.
    """

    def __init__(self, source: Any, keep: Callable[[Any], Any], field: str):
        check_finite(source, "filtered()")
        self._source = source
        self.key = {"filter": code_key(keep), "of": source_key(source)}

        def make(number: int) -> dict[str, np.ndarray]:
            chunk = range(number * _CHUNK, min((number + 1) * _CHUNK, len(source)))
            kept = [
                index
                for start in range(chunk.start, chunk.stop, _READ)
                for index in self._kept(keep, chunk[start - chunk.start :][:_READ])
            ]
            return {"kept": np.array(kept, np.int64)}

        index = make_index("filter", self.key, -(-len(source) // _CHUNK), make)
        self._indices, self.digest = index.arrays["kept"], index.digest
        self.num_dropped = len(source) - len(self)
        if not len(self):
            raise ConfigError(field, f"its filter keeps none of {len(source):,} examples")
        self._probe(keep, field)

    def _kept(self, keep: Callable[[Any], Any], indices: Sequence[int]) -> list[int]:
        examples = read_many(self._source, indices)
        return [i for i, example in zip(indices, examples, strict=True) if keep(example)]

    def _probe(self, keep: Callable[[Any], Any], field: str) -> None:
        """See that the index, which may be an old one, is that of today's filter."""
        probes = np.linspace(0, len(self._source) - 1, _PROBES).astype(np.int64).tolist()
        probes = sorted(set(probes))
        now = self._kept(keep, probes)
        then = [i for i in probes if self._has(i)]
        if now != then:
            odd = min(set(now) ^ set(then))
            raise ConfigError(
                field,
                f"its filter {'keeps' if odd in now else 'drops'} example {odd}, and did the "
                "contrary when this run's index of it was made; a filter must depend on the "
                "example alone, and stay as it is: start a new run for another one",
            )

    def _has(self, index: int) -> bool:
        place = int(np.searchsorted(self._indices, index))
        return place < len(self) and int(self._indices[place]) == index

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: SupportsIndex) -> Any:
        return self._getitems([int(index)])[0]

    def _getitems(self, indices: Sequence[int]) -> Sequence[Any]:
        return read_many(self._source, self._indices[list(indices)].tolist())

    def lengths(self, indices: Sequence[int]) -> np.ndarray:
        """As of the source; see `trainer.data.packing.packed`."""
        from trainer.data.packing import lengths_of

        return lengths_of(self._source, self._indices[list(indices)].tolist())

    def __repr__(self) -> str:
        return f"Filtered({len(self)} of {self._source!r})"


def check_finite(source: Any, what: str) -> None:
    """Refuse what has no length, or is endless.

    Raises:
      ConfigError: so it is.
    """
    if not hasattr(source, "__len__") or not hasattr(source, "__getitem__"):
        rule = f"{what} needs a source with a length and examples by index, and was given"
        raise ConfigError("config.task", f"{rule} {type(source).__name__}")
    if isinstance(source, grain.MapDataset):
        from trainer.data.refusals import check_order

        check_order(source, f"dataset given to {what}")
    if len(source) == 0:
        raise ConfigError("config.data", f"{what} was given a source that holds no examples")
    if len(source) >= ENDLESS:
        raise ConfigError(
            "config.task",
            f"{what} was given a repeated dataset, which has no end to read to; give it the "
            "source, and repeat what it makes (training_order() does)",
        )


def source_key(source: Any) -> Any:
    """JSON that tells a source from others of a run."""
    key = getattr(source, "key", None)
    if key is not None:
        return key
    return [type(source).__module__, type(source).__qualname__, _shown(source), len(source)]


def code_key(function: Any) -> list[str]:
    """Name, code and bound values of a callable, digested; what it calls is not seen."""
    inner = getattr(function, "func", function)  # Of functools.partial.
    method = inner if hasattr(inner, "__code__") else vars(type(inner)).get("__call__")
    code = getattr(method, "__code__", None)
    bound = [
        [cell.cell_contents for cell in getattr(inner, "__closure__", None) or ()],
        [getattr(inner, name, None) for name in ("__defaults__", "__kwdefaults__")],
        [getattr(function, name, None) for name in ("args", "keywords")],
        getattr(inner, "__dict__", None),
    ]
    text = f"{_code_text(code) if code else ''} {_shown(bound)}"
    name = getattr(inner, "__qualname__", type(inner).__qualname__)
    module = getattr(inner, "__module__", None) or ""
    return [module, name, hashlib.sha256(text.encode()).hexdigest()[:16]]


def _shown(value: Any) -> str:
    """A value as text, without addresses in memory."""
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value))


def _code_text(code: types.CodeType) -> str:
    consts = [
        _code_text(const) if isinstance(const, types.CodeType) else _const(const)
        for const in code.co_consts
    ]
    return f"{code.co_code.hex()} {code.co_names} {consts}"


def _const(value: Any) -> str:
    # A set's order differs from process to process.
    return repr(sorted(map(repr, value))) if isinstance(value, frozenset) else _shown(value)
