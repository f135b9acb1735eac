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
    field: str = "config.data",
) -> Packed:
    """Rows of `row_length` places that hold the documents of `source`, padded with zeros.

    Document: a dict of arrays [n], [n, ...], of any n, the same for all of its arrays. Row: the
    same names with arrays [row_length, ...], and besides

        segment_ids   [row_length] int32: 1 for the first document's places, 2 for the second's,
                      ..., 0 for padding
        positions     [row_length] int32: places within each document, from 0

    Args:
      source: documents by index. If it has `lengths(indices)`, they are not read for the plan.
      row_length: places of a row. A longer document is cut into pieces, which become documents of
        their own: nothing is lost.
      overlap: places that two pieces of a cut document share; 1 where each place predicts the
        next, so that none goes unpredicted. A document of no more than that is left out.
      field: how messages call this.

    Raises:
      ConfigError: no document is long enough, or `source` is endless.
    """
    return Packed(source, row_length, overlap, field)


class Packed:
    """A source of packed rows.

    Attributes:
      num_documents: documents that are in rows.
      num_dropped: documents too short to be.
      efficiency: share of the rows' places that are not padding.
      digest: of the plan.
    """

    def __init__(self, source: Any, row_length: int, overlap: int, field: str):
        require(row_length >= 2, field, row_length, "rows must be at least 2 places long")
        if not 0 <= overlap < row_length:
            raise ValueError(f"overlap={overlap} must be at least 0 and below {row_length}")
        check_finite(source, "packed()")
        self._source, self._row_length = source, row_length
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
        spans = [range(self._begin[row], self._begin[row + 1]) for row in indices]
        pieces = np.concatenate([np.asarray(span) for span in spans])
        documents = self._document[pieces].tolist()
        # Several pieces of a long document are read with it once.
        unique = sorted(set(documents))
        read = dict(zip(unique, read_many(self._source, unique), strict=True))
        starts, lengths = self._start[pieces].tolist(), self._length[pieces].tolist()
        parts = iter(zip(documents, starts, lengths, strict=True))
        return [self._row(read, [next(parts) for _ in span]) for span in spans]

    def _row(
        self, documents: Mapping[int, Mapping[str, np.ndarray]], parts: list[tuple[int, int, int]]
    ) -> dict[str, np.ndarray]:
        L = self._row_length
        first = documents[parts[0][0]]
        row = {name: np.zeros((L, *a.shape[1:]), a.dtype) for name, a in first.items()}
        segment_ids: np.ndarray = np.zeros(L, np.int32)
        positions: np.ndarray = np.zeros(L, np.int32)
        end = 0
        for number, (document, start, length) in enumerate(parts, 1):
            place = slice(end, end := end + length)
            for name, array in documents[document].items():
                if len(array) < start + length:
                    raise ConfigError(
                        "config.data",
                        f"document {document} has {len(array)} {name}, and had at least "
                        f"{start + length} when the rows were planned; restore the data, or start "
                        "a new run",
                    )
                row[name][place] = array[start : start + length]
            segment_ids[place] = number
            positions[place] = np.arange(length)
        return {**row, "segment_ids": segment_ids, "positions": positions}

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
