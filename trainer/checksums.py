"""Checksums of a checkpoint's files: Orbax does not notice a byte that has changed on the disk.

A manifest lists every file below a directory with its size and one XXH3 digest per chunk, so that
one large file can be read by many threads and processes. A step that was written to Google Cloud
Storage has the CRC32C of each whole file instead, which is known there; see `checkpoint_gcs`.
Either kind can be copied to the other place.
"""

from __future__ import annotations

import base64
import concurrent.futures
import dataclasses
import json
import os
import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import xxhash

from launch.spec import ConfigError

CHUNK_BYTES = 64 * 2**20
_BUFFER_BYTES = 2**18  # stays in the processor's cache between read and digest

# Relative path -> {"bytes": int, "xxh3_64": [hex, ...]}, or with "crc32c": base64 for the latter.
Digests = dict[str, dict[str, Any]]


class DamagedError(Exception):
    """A directory is not what its manifest says; the text is a phrase with the first reason."""


@dataclasses.dataclass(frozen=True)
class _Chunk:
    path: pathlib.Path
    start: int
    length: int
    make: Callable[[], Any] = xxhash.xxh3_64


def _digest(chunk: _Chunk) -> str:
    hasher = chunk.make()
    buffer = memoryview(bytearray(min(_BUFFER_BYTES, max(1, chunk.length))))
    left = chunk.length
    with open(chunk.path, "rb", buffering=0) as file:
        file.seek(chunk.start)
        while left:
            count = file.readinto(buffer[: min(left, len(buffer))])
            if not count:
                break
            hasher.update(buffer[:count])
            left -= count
    return hasher.hexdigest()


class Crc32c:
    """The checksum that Google Cloud Storage has of every object; used like xxhash's.

    Raises:
      ConfigError: the package for it is missing.
    """

    def __init__(self) -> None:
        try:
            import google_crc32c
        except ImportError:
            raise ConfigError(
                "",
                "verifying a checkpoint from Google Cloud Storage needs the package google-crc32c; "
                "pip install google-crc32c",
            ) from None
        self._extend = google_crc32c.extend
        self._value = 0

    def update(self, data: bytes | memoryview) -> None:
        """Take more bytes."""
        self._value = self._extend(self._value, bytes(data))  # It takes nothing but bytes.

    def hexdigest(self) -> str:
        """In base64 for all its name: so Google says it."""
        return base64.b64encode(self._value.to_bytes(4, "big")).decode()


def _chunks(path: pathlib.Path, size: int) -> list[_Chunk]:
    starts = range(0, max(size, 1), CHUNK_BYTES)
    return [_Chunk(path, start, min(CHUNK_BYTES, size - start)) for start in starts]


def digest_files(root: pathlib.Path, names: Iterable[str]) -> Digests:
    """Digest files, one after the other: this runs beside training and must not get in its way."""
    digests = {}
    for name in names:
        path = root / name
        size = path.stat().st_size
        digests[name] = {"bytes": size, "xxh3_64": [_digest(part) for part in _chunks(path, size)]}
    return digests


def files_below(root: pathlib.Path) -> list[str]:
    """Relative paths of all files below a directory, sorted."""
    return sorted(
        str(pathlib.Path(folder, name).relative_to(root))
        for folder, _, names in os.walk(root)
        for name in names
    )


def manifest_text(files: Digests) -> str:
    """A manifest as it is written."""
    own = own_checksum(files)
    return json.dumps({"schema": 1, "chunk_bytes": CHUNK_BYTES, "files": files, "own": own})


def write_manifest(path: pathlib.Path, files: Digests) -> None:
    """Write a manifest and see it on the disk."""
    with open(path, "w", encoding="utf-8") as file:
        file.write(manifest_text(files))
        file.flush()
        os.fsync(file.fileno())


def read_manifest(path: pathlib.Path) -> Digests:
    """The files that a manifest lists.

    Raises:
      DamagedError: it is not there, or has changed.
    """
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        raise DamagedError(f"{path.name} is missing") from None
    except OSError as error:
        raise DamagedError(f"{path.name} cannot be read: {error}") from None
    return parse_manifest(text, path.name)


def parse_manifest(text: bytes, name: str) -> Digests:
    """The files that a manifest's text lists.

    Raises:
      DamagedError: it has changed.
    """
    try:
        record = json.loads(text)
        files = record["files"]
        if record["own"] != own_checksum(files) or record["chunk_bytes"] != CHUNK_BYTES:
            raise ValueError("its own checksum differs")
        if text != manifest_text(files).encode():  # Whatever byte has changed in it.
            raise ValueError("it is not as it was written")
    except (ValueError, KeyError, TypeError) as error:
        raise DamagedError(f"{name} cannot be read: {error}") from None
    return files


def own_checksum(files: Mapping[str, Any]) -> str:
    """The checksum of a manifest itself."""
    return xxhash.xxh3_64_hexdigest(json.dumps(files, sort_keys=True).encode())


def verify(root: pathlib.Path, files: Digests, part: int = 0, parts: int = 1) -> None:
    """Compare this process's share of the files with their digests.

    Args:
      root: the directory that the manifest speaks of.
      files: from `read_manifest`.
      part, parts: every `parts`-th chunk, from number `part` on.

    Raises:
      DamagedError: a file is missing, has another size, or other bytes.
    """
    chunks: list[tuple[_Chunk, str]] = []
    for name, wanted in sorted(files.items()):
        path = root / name
        try:
            size = path.stat().st_size
        except OSError as error:
            raise DamagedError(f"{name}: {error.strerror}") from None
        if size != wanted["bytes"]:
            raise DamagedError(f"{name} has {size} bytes instead of {wanted['bytes']}")
        if "crc32c" in wanted:  # Of the whole file, as it was on Google Cloud Storage.
            chunks.append((_Chunk(path, 0, size, Crc32c), wanted["crc32c"]))
        else:
            chunks += zip(_chunks(path, size), wanted["xxh3_64"], strict=True)
    _verify_chunks(root, chunks[part::parts])


def _verify_chunks(root: pathlib.Path, chunks: Sequence[tuple[_Chunk, str]]) -> None:
    threads = min(8, os.cpu_count() or 1)
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        for (chunk, wanted), found in zip(
            chunks, pool.map(_digest, (chunk for chunk, _ in chunks)), strict=True
        ):
            if found != wanted:
                end = chunk.start + chunk.length
                raise DamagedError(
                    f"{chunk.path.relative_to(root)}: bytes {chunk.start} to {end} have changed "
                    f"since they were written"
                )
