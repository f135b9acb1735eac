"""Indices of data: computed once for all processes, and kept where the run is.

A filter's survivors and a packing's rows follow from all examples at once. They are found by one
pass over the data, chunk by chunk. The processes of a gang share that pass without a word: each
takes the chunks in a random order of its own, and whoever has done one leaves it in the index
directory for all. Any process may do any chunk, and all would find the same, so there is nobody to
wait for. In the end there is one file per index, which is mapped, not read: a resume costs its
checksum.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
import random
import secrets
import shutil
from collections.abc import Callable, Mapping, Sequence
from typing import Any, BinaryIO

import numpy as np

from launch.spec import ConfigError

Arrays = Mapping[str, np.ndarray]

_MAGIC = b"MUSTERIX"
_ALIGN = 64  # Bytes between which arrays begin in a file.


@dataclasses.dataclass
class _Keeping:
    directory: pathlib.Path | None = None
    alive: Callable[[], None] = lambda: None


_keeping = _Keeping()


def keep_in(
    directory: str | os.PathLike[str] | None, alive: Callable[[], None] = lambda: None
) -> None:
    """Say where indices are kept from now on.

    Args:
      directory: shared by the run's processes; None for memory alone, each process its own.
      alive: called at each chunk, which takes seconds.
    """
    _keeping.directory = None if directory is None else pathlib.Path(directory)
    _keeping.alive = alive


@dataclasses.dataclass(frozen=True)
class Index:
    """Arrays that say where examples are.

    Attributes:
      arrays: name -> [N] integers, read-only.
      digest: hex, of names, dtypes and contents.
    """

    arrays: Arrays
    digest: str


def make_index(
    what: str,
    key: Mapping[str, Any],
    num_chunks: int,
    make: Callable[[int], Arrays],
) -> Index:
    """The arrays of all chunks, one chunk's behind another's.

    Args:
      what: a word for its file's name, e.g. 'filter'.
      key: JSON; whatever the index depends on. An index kept under the same key is taken.
      num_chunks: how many there are.
      make: chunk number -> its arrays, of the same names and dtypes for each; depends on nothing
        but the key.

    Raises:
      ConfigError: the index directory cannot be written.
    """
    if _keeping.directory is None:
        chunks = []
        for number in range(num_chunks):
            _keeping.alive()
            chunks.append(make(number))
        joined = _join(chunks)
        return Index(joined, digest_of(joined))
    text = json.dumps(key, sort_keys=True)
    file = _keeping.directory / f"{what}-{hashlib.sha256(text.encode()).hexdigest()[:16]}.index"
    try:
        return _read_or_make(file, num_chunks, make)
    except OSError as error:
        rule = f"an index of the data cannot be kept there: {error}; free or mend it"
        raise ConfigError("workdir", rule, str(file.parent)) from None


def digest_of(arrays: Arrays) -> str:
    """Hex of what arrays are called, hold and are made of."""
    digest = hashlib.sha256()
    for name, array in sorted(arrays.items()):
        digest.update(f"{name} {array.dtype.str} {len(array)};".encode())
        digest.update(np.ascontiguousarray(array).view(np.uint8))
    return digest.hexdigest()[:32]


def _read_or_make(file: pathlib.Path, num_chunks: int, make: Callable[[int], Arrays]) -> Index:
    parts = file.with_suffix(".parts")
    while (index := _read(file)) is None:
        parts.mkdir(parents=True, exist_ok=True)
        for number in random.SystemRandom().sample(range(num_chunks), num_chunks):
            _keeping.alive()
            part = parts / str(number)
            if not part.exists() and not file.exists():
                with contextlib.suppress(FileNotFoundError):  # All is done, and this tidied away.
                    _write(part, make(number))
        chunks = [_read(parts / str(number)) for number in range(num_chunks)]
        if None not in chunks:  # Else another has put them together, or one was damaged.
            _write(file, _join([chunk.arrays for chunk in chunks if chunk is not None]))
    if parts.exists():
        shutil.rmtree(parts, ignore_errors=True)
    return index


def _join(chunks: Sequence[Arrays]) -> dict[str, np.ndarray]:
    joined = {name: np.concatenate([chunk[name] for chunk in chunks]) for name in chunks[0]}
    for array in joined.values():
        array.flags.writeable = False
    return joined


def _write(file: pathlib.Path, arrays: Arrays) -> None:
    """A file of arrays, there whole or not at all."""
    header: dict[str, Any] = {"digest": digest_of(arrays), "arrays": {}}
    offset = 0
    for name, array in arrays.items():
        header["arrays"][name] = [array.dtype.str, len(array), offset]
        offset += array.nbytes + -array.nbytes % _ALIGN
    text = json.dumps(header).encode()
    text += b" " * (-(len(text) + 16) % _ALIGN)
    temporary = file.with_name(f"{file.name}.{secrets.token_hex(6)}.tmp")
    try:
        with open(temporary, "xb") as out:
            out.write(_MAGIC + len(text).to_bytes(8, "little") + text)
            for array in arrays.values():
                out.write(np.ascontiguousarray(array).view(np.uint8))
                out.write(bytes(-array.nbytes % _ALIGN))
            out.flush()
            os.fsync(out.fileno())
        os.replace(temporary, file)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)


def _read(file: pathlib.Path) -> Index | None:
    """The arrays of a file, mapped; None where there is none. A damaged one is deleted."""
    try:
        with open(file, "rb") as opened:
            index = _map_all(opened)
    except FileNotFoundError:
        return None
    if index is None:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(file)  # It is made again.
    return index


def _map_all(opened: BinaryIO) -> Index | None:
    """The arrays of an open file; None if it is damaged. By now it may have been unlinked."""
    magic, size = opened.read(8), int.from_bytes(opened.read(8), "little")
    if magic != _MAGIC:
        return None
    with contextlib.suppress(ValueError, KeyError, TypeError):  # Cut short, or garbled.
        header = json.loads(opened.read(min(size, 1 << 20)))
        arrays = {
            name: _map(opened, dtype, length, 16 + size + offset)
            for name, (dtype, length, offset) in header["arrays"].items()
        }
        if digest_of(arrays) == header["digest"]:
            return Index(arrays, header["digest"])
    return None


def _map(opened: BinaryIO, dtype: str, length: int, offset: int) -> np.ndarray:
    if length == 0:
        return np.empty(0, dtype)  # Nothing to map.
    return np.memmap(opened, dtype, mode="r", offset=offset, shape=(length,))
