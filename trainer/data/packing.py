"""Documents of any length as rows of one length, each with whole documents side by side.

Which documents share a row follows from their lengths alone, window by window: the longest first,
each into the fullest row that still has room. So the rows are a source like any other, with a
length and a row by index; they are shuffled, repeated and mixed as examples are, and every epoch
has every document once. The plan is an index of the run (`trainer.data.index`): 12 bytes for each
piece of a document on disk, and 8 for each row in memory.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, SupportsIndex

import grain
import numpy as np

from launch.spec import ConfigError, require
from trainer.data.filtering import check_finite, source_key
from trainer.data.index import make_index
from trainer.data.sources import read_many

WINDOW = 16_384  # Documents that are packed together.
_READ = 256  # Documents held at a time.
_MAX_LENGTH = (1 << 32) - 1


def packed(
    source: grain.sources.RandomAccessDataSource,
    row_length: int,
    *,
    overlap: int = 0,
    positions: bool = True,
    field: str = "config.data",
) -> Packed:
    """Rows of `row_length` places that hold the documents of `source`, padded with zeros.

    Document: a dict of arrays [n], [n, ...], of any n, the same for all of its arrays. Row: the
    same names with arrays [row_length, ...], and besides

        segment_ids   [row_length] int32: 1 for the first document's places, 2 for the second's,
                      ..., 0 for padding
        positions     [row_length] int32: places within each document, from 0; if asked for

    Args:
      source: documents by index. If it has `lengths(indices)`, they are not read for the plan.
      row_length: places of a row. A longer document is cut into pieces, which become documents of
        their own: nothing is lost.
      overlap: places that two pieces of a cut document share; 1 where each place predicts the
        next, so that none goes unpredicted. A document of no more than that is left out.
      positions: make them. Rotary embedding has no use for them: it sees how far apart tokens are.
      field: how messages call this.

    Raises:
      ConfigError: no document is long enough, or `source` is endless.
    """
    return Packed(source, row_length, overlap, positions, field)


class Packed:
    """A source of packed rows.

    Attributes:
      num_documents: documents that are in rows.
      num_dropped: documents too short to be.
      efficiency: share of the rows' places that are not padding.
      digest: of the plan.
    """

    def __init__(self, source: Any, row_length: int, overlap: int, positions: bool, field: str):
        require(row_length >= 2, field, row_length, "rows must be at least 2 places long")
        if not 0 <= overlap < row_length:
            raise ValueError(f"overlap={overlap} must be at least 0 and below {row_length}")
        check_finite(source, "packed()")
        self._source, self._row_length, self._positions = source, row_length, positions
        self.key = {"rows": [row_length, overlap, WINDOW], "of": source_key(source)}

        def make(number: int) -> dict[str, np.ndarray]:
            window = range(number * WINDOW, min((number + 1) * WINDOW, len(source)))
            return plan_rows(window.start, lengths_of(source, window), row_length, overlap)

        index = make_index("packing", self.key, -(-len(source) // WINDOW), make)
        self.digest = index.digest
        self._document = index.arrays["document"]
        self._start, self._length = index.arrays["start"], index.arrays["length"]
        pieces = index.arrays["pieces"]
        # Row r has pieces _begin[r] to _begin[r + 1].
        self._begin = np.concatenate([[0], np.cumsum(pieces, dtype=np.int64)])
        if not len(self):
            rule = f"none of its {len(source):,} documents has more than {overlap} tokens"
            raise ConfigError(field, f"{rule}; there is nothing to pack")
        self.num_documents = int((self._start == 0).sum())
        self.num_dropped = len(source) - self.num_documents
        places = int(self._length.sum(dtype=np.int64))
        self.efficiency = places / (len(self) * row_length)

    def __len__(self) -> int:
        return len(self._begin) - 1

    def __getitem__(self, index: SupportsIndex) -> dict[str, np.ndarray]:
        return self._getitems([int(index)])[0]

    def _getitems(self, indices: Sequence[int]) -> list[dict[str, np.ndarray]]:
        """Rows of a batch, put together all at once: in Python, a row would cost 70 us."""
        rows = np.asarray(indices, np.int64)
        M, L = len(rows), self._row_length
        count = self._begin[rows + 1] - self._begin[rows]  # [M] pieces of each row.
        first = np.cumsum(count) - count
        in_row = np.arange(count.sum()) - np.repeat(first, count)  # [P] 0, 1, ... of each row.
        pieces = np.repeat(self._begin[rows], count) + in_row
        length = self._length[pieces].astype(np.int64)
        before = np.cumsum(length) - length
        # [T] of all tokens: where in the M * L places of the batch each of them goes.
        origin: np.ndarray = np.repeat(np.arange(M) * L - before[first], count)
        place = np.repeat(origin, length) + np.arange(length.sum())

        def spread(values: np.ndarray) -> list[np.ndarray]:
            flat: np.ndarray = np.zeros((M * L, *values.shape[1:]), values.dtype)
            flat[place] = values
            return list(flat.reshape(M, L, *values.shape[1:]))

        found = {name: spread(values) for name, values in self._read(pieces, length).items()}
        found["segment_ids"] = spread(np.repeat((in_row + 1).astype(np.int32), length))
        if self._positions:
            positions = np.arange(length.sum()) - np.repeat(before, length)
            found["positions"] = spread(positions.astype(np.int32))
        return [
            dict(zip(found, values, strict=True)) for values in zip(*found.values(), strict=True)
        ]

    def _read(self, pieces: np.ndarray, length: np.ndarray) -> dict[str, np.ndarray]:
        """Name -> arrays [T, ...] of some pieces, one behind the other."""
        documents = self._document[pieces].tolist()
        # Several pieces of a long document are read with it once.
        unique = sorted(set(documents))
        read = dict(zip(unique, read_many(self._source, unique), strict=True))
        start = self._start[pieces].astype(np.int64)
        spans = list(zip(documents, start.tolist(), (start + length).tolist(), strict=True))
        found = {}
        for name in read[unique[0]]:
            parts = [read[document][name][start:stop] for document, start, stop in spans]
            if sum(map(len, parts)) != length.sum():
                document, stop = next((d, b) for d, _, b in spans if len(read[d][name]) < b)
                raise ConfigError(
                    "config.data",
                    f"document {document} has {len(read[document][name])} {name}, and had at "
                    f"least {stop} when the rows were planned; restore the data, or start a new "
                    "run",
                )
            found[name] = np.concatenate(parts)
        return found

    def __repr__(self) -> str:
        return f"Packed({len(self)} rows of {self._row_length} from {self._source!r})"


def lengths_of(source: Any, documents: Sequence[int]) -> np.ndarray:
    """The length of each document, [N] int64: from the source if it knows, else by reading them.

    Raises:
      ConfigError: a document is no dict of arrays of one length.
    """
    known = getattr(source, "lengths", None)
    if known is not None:
        return np.asarray(known(documents), np.int64)
    lengths = []
    for start in range(0, len(documents), _READ):
        some = documents[start : start + _READ]
        for index, document in zip(some, read_many(source, some), strict=True):
            lengths.append(_length(document, index))
    return np.array(lengths, np.int64)


def _length(document: Any, index: int) -> int:
    shapes = (
        {name: np.shape(value) for name, value in document.items()}
        if isinstance(document, Mapping)
        else {}
    )
    found = {shape[0] for shape in shapes.values() if shape}
    if len(found) != 1 or not all(shapes.values()):
        shown = shapes or type(document).__name__
        rule = f"document {index} is {shown}, and must be a dict of arrays of one length"
        raise ConfigError("config.task", f"{rule}; leave out the others in a map()")
    return found.pop()


def plan_rows(
    first: int, lengths: np.ndarray, row_length: int, overlap: int
) -> dict[str, np.ndarray]:
    """Which documents of a window come into which row.

    Args:
      first: number of the window's first document.
      lengths: [N] of its documents.
      row_length, overlap: as in `packed`.

    Returns:
      `document`, `start`, `length` [P] of each piece, row after row, and `pieces` [R]: how many
      each row has.
    """
    if len(lengths) and lengths.max() > _MAX_LENGTH:
        longest = first + int(lengths.argmax())
        rule = f"document {longest} has {lengths.max():,} tokens, more than {_MAX_LENGTH:,}"
        raise ConfigError("config.data", f"{rule}; cut it when the data is prepared")
    stride = row_length - overlap
    num_pieces = np.where(lengths > overlap, -(-(lengths - overlap) // stride), 0)
    document: np.ndarray = np.repeat(np.arange(len(lengths)), num_pieces)
    before = np.cumsum(num_pieces) - num_pieces
    start = (np.arange(len(document)) - before[document]) * stride
    length = np.minimum(row_length, lengths[document] - start)
    row = fit(length, row_length)
    order = np.argsort(row, kind="stable")  # Within a row, as the documents come.
    kind = np.uint32 if first + len(lengths) <= _MAX_LENGTH else np.int64
    return {
        "document": (first + document[order]).astype(kind),
        "start": start[order].astype(np.uint32),
        "length": length[order].astype(np.uint32),
        "pieces": np.bincount(row).astype(np.uint32),
    }


def fit(lengths: np.ndarray, capacity: int) -> np.ndarray:
    """Put pieces into few rows: the longest first, each where it leaves the least room.

    Args:
      lengths: [P] in [1, capacity].
      capacity: of a row.

    Returns:
      [P] int64, the row of each piece; rows are numbered from 0 without gaps.
    """
    rows: np.ndarray = np.empty(len(lengths), np.int64)
    # Rows by the room that they have left, and a bit for each room of which there is one.
    by_room: list[list[int]] = [[] for _ in range(capacity + 1)]
    rooms, num_rows = 0, 0
    order = np.argsort(-lengths, kind="stable").tolist()
    sizes = lengths.tolist()
    for piece in order:
        size = sizes[piece]
        large_enough = rooms >> size
        if large_enough:
            room = size + (large_enough & -large_enough).bit_length() - 1
            row = by_room[room].pop()
            if not by_room[room]:
                rooms ^= 1 << room
        else:
            room, row = capacity, num_rows
            num_rows += 1
        if room > size:
            by_room[room - size].append(row)
            rooms |= 1 << (room - size)
        rows[piece] = row
    return rows
