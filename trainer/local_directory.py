"""The files of local checkpoints on one host, and the rules by which they come and go.

    LOCAL_DIR/<run>/           a run's own, 0700; its name is a random number that the run was given
      .identity                a random number: processes that read the same one share a directory
      25-3-<attempt>/          step 25 as process 3 of one attempt has written it
        data                   the bytes of its pieces, one behind the other
        index.json             what they are, with a checksum of each; the index has one of its own

A step's directory is written under another name and renamed when all of it is on the disk.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import errno
import fcntl
import json
import logging
import os
import pathlib
import re
import secrets
import shutil
import stat
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import xxhash

from trainer.checksums import DamagedError

log = logging.getLogger(__name__)

LEFT_OVER_DAYS = 7.0
_IDENTITY = ".identity"
_DATA, _INDEX = "data", "index.json"
_RUN_NAME = re.compile(r"[0-9a-f]{32}")
_ENTRY_NAME = re.compile(r"(\d+)-(\d+)-([0-9a-f]{16})")
_THREADS = 4
_WRITE_BYTES = 2**24


class Entry(NamedTuple):
    """What one process has written of one step: its name says it.

    Attributes:
      step: completed updates.
      process: its number in the gang that wrote it.
      attempt: the token of that gang; entries of two gangs are never put together.
    """

    step: int
    process: int
    attempt: str

    @property
    def name(self) -> str:
        """Of its directory."""
        return f"{self.step}-{self.process}-{self.attempt}"


class LocalDirectory:
    """A run's directory on this host, made if missing.

    Args:
      parent: where local checkpoints of all runs are; made if missing.
      run: the run's random number, 32 hexadecimal digits.

    Raises:
      OSError: it cannot be made or written, or is not this user's alone.
    """

    def __init__(self, parent: str, run: str):
        self.path = pathlib.Path(parent, run)
        _make_parent(pathlib.Path(parent))
        self.path.mkdir(mode=0o700, exist_ok=True)
        found = os.lstat(self.path)
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
            raise PermissionError(13, "belongs to somebody else", str(self.path))
        os.chmod(self.path, 0o700)
        self.identity = self._identify()
        # Held until this process ends: who looks for what dead runs have left sees that it lives.
        self._lock: int | None = os.open(self.path / _IDENTITY, os.O_RDONLY | os.O_CLOEXEC)
        fcntl.flock(self._lock, fcntl.LOCK_SH)

    def _identify(self) -> str:
        own = self.path / f"{_IDENTITY}-{secrets.token_hex(8)}"
        with _private(own) as file:
            file.write(secrets.token_hex(16).encode())
        try:
            os.link(own, self.path / _IDENTITY)  # The first one wins, and is whole at once.
        except FileExistsError:
            os.utime(self.path / _IDENTITY)
        finally:
            own.unlink()
        return (self.path / _IDENTITY).read_text()

    def entries(self) -> list[Entry]:
        """Everything that is whole, newest step first."""
        found = [_ENTRY_NAME.fullmatch(name) for name in os.listdir(self.path)]
        return sorted(
            (Entry(int(m[1]), int(m[2]), m[3]) for m in found if m is not None), reverse=True
        )

    def write(self, entry: Entry, arrays: Sequence[np.ndarray], record: Mapping[str, Any]) -> None:
        """Write a step as a whole or not at all, and see it on the disk.

        Args:
          entry: says its name; what has the same name is replaced.
          arrays: the pieces, of any dtype and shape.
          record: JSON, kept in the index.

        Raises:
          OSError: it could not be written; nothing of it is left.
        """
        target = self.path / entry.name
        temporary = self.path / f"{entry.name}.{secrets.token_hex(4)}.tmp"
        views = [np.ascontiguousarray(array).reshape(-1).view(np.uint8) for array in arrays]
        offsets = [0, *np.cumsum([view.size for view in views], dtype=np.int64).tolist()]
        try:
            temporary.mkdir(mode=0o700)
            with _private(temporary / _DATA) as file:
                _require_room(file.fileno(), offsets[-1])
                with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
                    digests = list(
                        pool.map(
                            lambda part: _write_piece(file.fileno(), *part),
                            zip(views, offsets, strict=False),
                        )
                    )
                os.fsync(file.fileno())
            pieces = [
                [offset, view.size, digest]
                for view, offset, digest in zip(views, offsets, digests, strict=False)
            ]
            body = {**record, "schema": 1, "pieces": pieces}
            own = xxhash.xxh3_64_hexdigest(json.dumps(body, sort_keys=True).encode())
            with _private(temporary / _INDEX) as file:
                file.write(json.dumps({"own": own, "body": body}).encode())
                file.flush()
                os.fsync(file.fileno())
            _sync_directory(temporary)
            if target.exists():
                _remove(target)
            temporary.rename(target)
            _sync_directory(self.path)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise

    def index(self, entry: Entry) -> dict[str, Any]:
        """The record that an entry was written with; `pieces` are [offset, bytes, checksum].

        Raises:
          DamagedError: it is not what was written.
        """
        try:
            record = json.loads((self.path / entry.name / _INDEX).read_bytes())
            body = record["body"]
            text = json.dumps(body, sort_keys=True)
            if xxhash.xxh3_64_hexdigest(text.encode()) != record["own"]:
                raise ValueError("its own checksum differs")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DamagedError(f"{self.path / entry.name / _INDEX}: {error}") from None
        return body

    def read(self, entry: Entry, piece: Sequence[Any]) -> np.ndarray:
        """The bytes of a piece, verified.

        Args:
          entry: what to read from.
          piece: [offset, bytes, checksum], from its index.

        Returns:
          [bytes] uint8

        Raises:
          DamagedError: they are not what was written.
        """
        offset, size, digest = piece
        path = self.path / entry.name / _DATA
        data = np.empty(size, np.uint8)
        try:
            with open(path, "rb", buffering=0) as file:
                file.seek(offset)
                left = memoryview(data)
                while left and (count := file.readinto(left)):
                    left = left[count:]
        except OSError as error:
            raise DamagedError(f"{path}: {error.strerror}") from None
        if left:
            raise DamagedError(f"{path} ends before byte {offset + size}")
        if xxhash.xxh3_64_hexdigest(data) != digest:
            raise DamagedError(
                f"{path}: bytes {offset} to {offset + size} have changed since they were written"
            )
        return data

    def remove(self, entries: Iterable[Entry]) -> None:
        """Delete entries; a failure is said and not fatal."""
        for entry in entries:
            _remove(self.path / entry.name)

    def remove_unfinished(self) -> None:
        """Delete what a save that never finished, or a deletion, left behind."""
        for name in os.listdir(self.path):
            if name.endswith(".tmp"):
                _remove(self.path / name)

    def close(self) -> None:
        """Let go of it, and delete it if nothing is in it and nobody else uses it."""
        if self._lock is None:
            return
        if not self.entries():
            with contextlib.suppress(OSError):  # Others still use it, or were quicker.
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(self.path)
        os.close(self._lock)
        self._lock = None

    def remove_left_over(self, days: float = LEFT_OVER_DAYS) -> list[pathlib.Path]:
        """Delete what runs of this user have left here that nobody has touched for so long.

        Returns:
          The directories deleted.
        """
        gone = []
        for path in self.path.parent.iterdir():
            if path == self.path or not _RUN_NAME.fullmatch(path.name):
                continue
            with contextlib.suppress(OSError):  # Somebody else's, alive, or just deleted.
                found = os.lstat(path)
                if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
                    continue
                newest = max(entry.stat().st_mtime for entry in [path, *path.iterdir()])
                if newest > time.time() - days * 86400:
                    continue
                lock = os.open(path / _IDENTITY, os.O_RDONLY | os.O_CLOEXEC)
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(path)
                    gone.append(path)
                finally:
                    os.close(lock)
        return gone


def _make_parent(path: pathlib.Path) -> None:
    """Make the directory of all runs: in a place that is open to everybody, open to everybody."""
    if path.is_dir():
        return
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    if path.parent.stat().st_mode & stat.S_ISVTX:
        with contextlib.suppress(PermissionError):  # Somebody else has made it meanwhile.
            os.chmod(path, 0o1777)


def _private(path: pathlib.Path) -> Any:
    """A new file of this user's alone, open for writing."""
    return open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb")


def _require_room(fd: int, size: int) -> None:
    """Find out before anything is written. Allocating it would cost a quarter of the write."""
    found = os.fstatvfs(fd)
    if size > (room := found.f_bavail * found.f_frsize):
        raise OSError(errno.ENOSPC, f"{size:,} bytes are needed and {room:,} are free")


def _write_piece(fd: int, view: np.ndarray, offset: int) -> str:
    hasher = xxhash.xxh3_64()
    for start in range(0, view.size, _WRITE_BYTES):
        part = memoryview(view[start : start + _WRITE_BYTES].data)
        hasher.update(part)
        while part:
            count = os.pwrite(fd, part, offset)
            part, offset = part[count:], offset + count
    return hasher.hexdigest()


def _sync_directory(path: pathlib.Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _remove(path: pathlib.Path) -> None:
    try:
        # Out of the list of entries at once: half deleted it must not pass for one.
        if not path.name.endswith(".tmp"):
            path = path.rename(path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp"))
        shutil.rmtree(path)
    except FileNotFoundError:
        return  # Another process of this host was quicker.
    except OSError as error:
        log.warning("cannot delete %s: %s", path, error)
