"""A disk of the run's own, which can be full, and whose checkpoints can be read-only.

Mounts need a mount namespace of this process's own: `private` starts a command in one. They are
seen by nobody else, and gone with the last process in it, however that ends.
"""

from __future__ import annotations

import contextlib
import errno
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

PRIVATE = "CHAOS_PRIVATE_MOUNTS"  # Set in the environment of what `private` starts.
_BYTES = 256 << 20
_FILLER = ".filler"


def private(command: Sequence[str]) -> list[str]:
    """The command in a mount namespace of its own, as root of it; as it is where that cannot be."""
    for words in (("--mount",), ("--mount", "--map-root-user")):
        prefix = ["unshare", *words, "--propagation=private", "env", f"{PRIVATE}=1"]
        # Mounting is tried as well: some containers allow the one and not the other.
        attempt = [*prefix, "mount", "-t", "tmpfs", "tmpfs", "/mnt"]
        with contextlib.suppress(OSError):
            if subprocess.run(attempt, capture_output=True, check=False).returncode == 0:
                return [*prefix, *command]
    return list(command)


def may_mount() -> bool:
    """Whether this process was started by `private`, and that could be."""
    return bool(os.environ.get(PRIVATE))


class Disk:
    """A small file system at `path`; a plain directory where nothing may be mounted."""

    def __init__(self, path: Path):
        path.mkdir(mode=0o700)
        self.path = path
        self._read_only: Path | None = None
        if may_mount():
            _run("mount", "-t", "tmpfs", "-o", f"size={_BYTES},mode=700", "tmpfs", str(path))

    def fill(self) -> None:
        """Take all the room that is left.

        Raises:
          AssertionError: there is still some.
        """
        fd = os.open(self.path / _FILLER, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        try:
            for size in (1 << 20, 1 << 12):  # tmpfs gives whole pages.
                with contextlib.suppress(_FullError):
                    while True:
                        _write(fd, bytes(size))
            with contextlib.suppress(_FullError):
                _write(fd, bytes(1 << 12))
                raise AssertionError("the disk is not full")
        finally:
            os.close(fd)

    def empty(self) -> None:
        """Give the room back."""
        (self.path / _FILLER).unlink(missing_ok=True)

    def make_read_only(self, folder: Path) -> None:
        """Let nobody write below a folder, root included."""
        folder.mkdir(parents=True, exist_ok=True)
        _run("mount", "--bind", str(folder), str(folder))
        self._read_only = folder
        _run("mount", "-o", "remount,bind,ro", str(folder))
        with contextlib.suppress(OSError):
            (folder / ".try").touch()
            raise AssertionError(f"{folder} is not read-only")

    def make_writable(self) -> None:
        """Undo `make_read_only`; what is open in it may stay so."""
        if self._read_only is not None:
            _run("umount", "--lazy", str(self._read_only))
            self._read_only = None

    def close(self) -> None:
        """Take the file system away, with what is on it."""
        self.make_writable()
        if may_mount():
            _run("umount", "--lazy", str(self.path))


class _FullError(Exception):
    """No space is left."""


def _write(fd: int, data: bytes) -> None:
    try:
        written = os.write(fd, data)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise _FullError from None
    if written < len(data):
        raise _FullError


def _run(*words: str) -> None:
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(words)}: {done.stderr}"
