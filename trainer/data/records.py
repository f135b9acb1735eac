"""Tokens in ArrayRecord files: rows of one length, or documents of any."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterable, Sequence
from typing import SupportsIndex

import grain
import numpy as np

from launch.spec import ConfigError, require
from trainer.data.sources import Example


class TokenDocuments:
    """Documents of tokens from ArrayRecord files, of any length: `{'tokens': [n]}` of `dtype`.

    Args:
      files: a file, a directory of `*.array_record`, a glob, or several. Each record is the raw
        little-endian bytes of one document, as `write_token_records` writes them. Every process
        asks each file for its number of records, and then opens those that it reads from: there
        may be fewer files than processes, or more.
      dtype: of a token: uint8, uint16, int32, uint32 or int64.
      field: how messages call `files`.

    Raises:
      ConfigError: no file, a damaged file, or no record.
    """

    def __init__(
        self, files: str | Sequence[str], dtype: str = "uint16", field: str = "config.data.path"
    ):
        self._dtype = _token_dtype(dtype)
        self._field = field
        paths = _record_files(files, field)
        try:
            self._records = grain.sources.ArrayRecordDataSource(paths)
        except (OSError, ValueError, RuntimeError, IndexError) as error:
            reason = " ".join(str(error).split())
            raise ConfigError(field, f"cannot be read as ArrayRecord: {reason}", files) from None
        require(len(self._records) > 0, field, files, f"its {len(paths)} files hold no record")
        self.num_files = len(paths)
        # What an index of these files is kept under: they may be mounted elsewhere another time.
        sizes = [[os.path.basename(path), os.path.getsize(path)] for path in paths]
        self.key = [type(self).__name__, len(self._records), dtype, sizes]

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: SupportsIndex) -> Example:
        return self._getitems([int(index)])[0]

    def _getitems(self, indices: Sequence[int]) -> list[Example]:
        records = self._records.__getitems__(indices)
        return [self._row(record, index) for record, index in zip(records, indices, strict=True)]

    def _row(self, record: bytes, index: int) -> Example:
        size = self._dtype.itemsize
        if len(record) % size:
            raise ConfigError(
                self._field,
                f"record {index} has {len(record)} bytes, which are no whole number of "
                f"{self._dtype.name} tokens; set config.data.dtype to what was written",
            )
        return {"tokens": np.frombuffer(record, self._dtype)}

    def __repr__(self) -> str:
        return f"{type(self).__name__}({len(self)} of {self._dtype.name})"


class TokenRecords(TokenDocuments):
    """Rows of tokens, all of one length: `{'tokens': [seq_len + 1]}` of `dtype`.

    Args:
      files: as of `TokenDocuments`.
      seq_len: tokens to predict per example; a row has one more.
      dtype: of a token: uint8, uint16, int32, uint32 or int64.
      field: how messages call `files`.

    Raises:
      ConfigError: no file, a damaged file, no record, or a first record of another length.
    """

    def __init__(
        self,
        files: str | Sequence[str],
        seq_len: int,
        dtype: str = "uint16",
        field: str = "config.data.path",
    ):
        require(seq_len >= 1, "config.data.seq_len", seq_len, "must be at least 1")
        self._seq_len = seq_len
        super().__init__(files, dtype, field)
        self._getitems([0])

    def _row(self, record: bytes, index: int) -> Example:
        wanted = (self._seq_len + 1) * self._dtype.itemsize
        if len(record) != wanted:
            raise ConfigError(
                self._field,
                f"record {index} has {len(record)} bytes, but seq_len={self._seq_len} needs rows "
                f"of {self._seq_len + 1} {self._dtype.name} tokens = {wanted} bytes; set config."
                "data.seq_len and dtype to what was written, pack documents of any length by "
                "config.data.packing, or write the records anew",
            )
        return {"tokens": np.frombuffer(record, self._dtype)}

    def __repr__(self) -> str:
        return f"TokenRecords({len(self)} rows of {self._seq_len + 1} {self._dtype.name})"


def write_token_records(
    path: str, rows: Iterable[np.ndarray], dtype: str = "uint16", *, any_length: bool = False
) -> int:
    """Write rows of tokens that `TokenRecords` reads, or documents for `TokenDocuments`.

    Args:
      path: the file; by custom it ends in `.array_record`.
      rows: each [seq_len + 1] integers, all of one length.
      dtype: of a token in the file.
      any_length: they are documents, whose lengths may differ.

    Returns:
      The number of rows written.

    Raises:
      ValueError: rows of different lengths, or a token that `dtype` cannot hold.
    """
    from array_record.python.array_record_module import ArrayRecordWriter

    kind = _token_dtype(dtype)
    limits = np.iinfo(kind)
    # One record per chunk: records are read singly, in shuffled order.
    writer = ArrayRecordWriter(path, "group_size:1")
    num_rows, length = 0, None
    try:
        for row in map(np.asarray, rows):
            length = len(row) if length is None or any_length else length
            if row.shape != (length,):
                raise ValueError(f"row {num_rows} is shaped {row.shape}, those before ({length},)")
            if row.size and (row.min() < limits.min or row.max() > limits.max):
                raise ValueError(f"row {num_rows} has a token that is no {kind.name}")
            writer.write(row.astype(kind).tobytes())
            num_rows += 1
    finally:
        writer.close()
    return num_rows


def _token_dtype(name: str) -> np.dtype:
    known = ("uint8", "uint16", "int32", "uint32", "int64")
    require(name in known, "config.data.dtype", name, f"must be one of {', '.join(known)}")
    return np.dtype(name).newbyteorder("<")


def _record_files(files: str | Sequence[str], field: str) -> list[str]:
    """The files that paths, directories and globs stand for, each in sorted order."""
    found: list[str] = []
    for item in [files] if isinstance(files, str) else files:
        pattern = os.path.expanduser(item)
        if os.path.isdir(pattern):
            pattern = os.path.join(glob.escape(pattern), "*.array_record")
        # A name is taken as it stands where there is such a file, even with glob characters in it.
        matches = [pattern] if os.path.exists(pattern) else sorted(glob.glob(pattern))
        if not matches:
            raise ConfigError(field, "no such file, and no file matches it", item)
        found.extend(matches)
    return found
