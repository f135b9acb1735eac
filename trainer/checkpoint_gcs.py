"""`checkpoint_directory` and its checksums for a directory on Google Cloud Storage.

    checkpoints/20/                     a committed step: it holds commit_success.txt
    checkpoints/30/                     without that: a save that was going on, or was cut off, or
                                        a step that was being deleted
    checkpoints/damaged/20-0/           set aside: never used, never deleted by us

Nothing can be renamed as a tree here, so Orbax writes a step under its own name and then the commit
file. That is written last and deleted first, so that half a step never passes for one.

A manifest holds GCS's own CRC32C of every object. GCS computes it of the bytes that came and says
it in a listing, so that nothing has to be read back at a save; at a restore the processes read all
bytes and compare, as locally.

All functions here are the lead process's alone, except where they say so.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import logging
import os
from collections.abc import Iterable
from typing import Any

import xxhash

from trainer import checksums, storage
from trainer.checkpoint_directory import DAMAGED, PROBE, damaged_target, step_numbers
from trainer.checksums import DamagedError, Digests
from trainer.storage import Path

log = logging.getLogger(__name__)

COMMIT_FILE = "commit_success.txt"  # Orbax's


def steps_in(directory: Path) -> list[int]:
    """Committed steps, newest first. One request, and one for each step."""
    return [step for step in step_numbers(_entries(directory)) if _committed(directory / str(step))]


def _entries(directory: Path) -> list[str]:
    """Names right below a path."""
    try:
        found = storage.filesystem().ls(os.fspath(directory), detail=False)
    except FileNotFoundError:
        return []
    own = os.fspath(directory).removeprefix(storage.REMOTE)
    # The console's "create folder" leaves an object that is listed as the directory itself.
    return [name.rpartition("/")[2] for name in found if name.rstrip("/") != own]


def _committed(step: Path) -> bool:
    # Not `exists`, which some of fsspec's filesystems answer with no when they could not ask: an
    # outage must not make a step look unfinished.
    try:
        storage.filesystem().info(os.fspath(step / COMMIT_FILE))
    except FileNotFoundError:
        return False
    return True


def written_path(step: Path) -> Path:
    """Where a step is while it is written: in its own place."""
    return step


def remove_unfinished(directory: Path) -> None:
    """Delete what a save that never finished left behind: nothing in it can be used."""
    for step in step_numbers(_entries(directory)):
        path = directory / str(step)
        if not _committed(path):
            log.warning("checkpoint %s was never finished; deleting it", path)
            remove(path)


def set_aside(directory: Path, step: int, why: str) -> Path:
    """Move a step that cannot be used out of the way, object by object, and say so."""
    source = directory / str(step)
    target = damaged_target(directory / DAMAGED, step, set(_entries(directory / DAMAGED)))
    names = list(storage.objects_below(source))
    commit = [name for name in names if name == COMMIT_FILE]
    # The commit file goes last: until then the rest is still a step, found damaged again and set
    # aside by the next start, should this one be cut off. Without it, it would be deleted.
    for group in ([name for name in names if name != COMMIT_FILE], commit):
        if group:
            storage.filesystem().mv(
                [os.fspath(source / name) for name in group],
                [os.fspath(target / name) for name in group],
            )
    log.warning("checkpoint step %d cannot be used: %s; set aside as %s", step, why, target)
    return target


def has_damaged(directory: Path) -> bool:
    """Was a step set aside here, now or in an earlier attempt?"""
    return bool(_entries(directory / DAMAGED))


def remove(path: Path) -> None:
    """Delete a step; a failure is said and not fatal."""
    files = storage.filesystem()
    try:
        with contextlib.suppress(FileNotFoundError):
            files.rm_file(os.fspath(path / COMMIT_FILE))
        with contextlib.suppress(FileNotFoundError):
            files.rm(os.fspath(path), recursive=True)
    except Exception as error:  # gcsfs's own errors have nothing in common.
        log.warning("cannot delete %s: %s", path, storage.reason(error))


def remove_all(paths: Iterable[Path]) -> None:
    """Delete steps, one after the other."""
    for path in paths:
        remove(path)


def write_probe(directory: Path, token: str) -> str | None:
    """Write into the bucket; the problem in words, or None."""
    return _try_to_write(directory / PROBE, token)


def read_probe(directory: Path, token: str, process: int) -> str | None:
    """On every other process: is it the lead's bucket, and can it be written from here too?"""
    try:
        found = storage.filesystem().cat_file(os.fspath(directory / PROBE)).decode()
    except FileNotFoundError:
        found = ""
    except Exception as error:
        if not storage.is_refusal(error):
            raise
        return f"cannot be read: {storage.reason(error)}"
    if found != token:
        return "is not the same on the lead process; is it the same storage?"
    own = directory / f"{PROBE}-{process}"
    problem = _try_to_write(own, token)
    if problem is None:
        storage.filesystem().rm_file(os.fspath(own))
    return problem


def _try_to_write(path: Path, text: str) -> str | None:
    try:
        storage.write_text(path, text)
    except Exception as error:
        # An outage is no mistake of the user's: it must end in a failure, which is retried.
        if not storage.is_refusal(error):
            raise
        return f"cannot be written: {storage.reason(error)}"
    return None


def remove_probe(directory: Path) -> None:
    """Delete what `write_probe` wrote."""
    storage.filesystem().rm_file(os.fspath(directory / PROBE))


def complete_manifest(step: Path, items: tuple[str, ...], manifest: str) -> None:
    """Write down GCS's checksums of what all processes wrote, just before the commit.

    Args:
      step: its directory; nobody writes its items any more.
      items: its subdirectories that a restore reads.
      manifest: the file's name.
    """
    files: Digests = {
        name: {"bytes": found.bytes, "crc32c": found.crc32c}
        for name, found in storage.objects_below(step).items()
        if name.startswith(tuple(f"{item}/" for item in items))
    }
    storage.write_text(step / manifest, checksums.manifest_text(files))


def read_manifest(path: Path) -> Digests:
    """The objects that a manifest lists. Any process.

    Raises:
      DamagedError: it is not there, or has changed.
    """
    try:
        text = storage.read_bytes(path)
    except FileNotFoundError:
        raise DamagedError(f"{path.name} is missing") from None
    return checksums.parse_manifest(text, path.name)


def verify(step: Path, files: Digests, part: int = 0, parts: int = 1) -> None:
    """Compare this process's share of a step's objects with their digests. Any process.

    What cannot be read for another reason than that it is not there is no damage, and raised as
    it comes.

    Args:
      step: the directory that the manifest speaks of.
      files: from `read_manifest`.
      part, parts: every `parts`-th object, from number `part` on; a CRC32C is of a whole one.

    Raises:
      DamagedError: an object is missing, has another size, or other bytes.
    """
    found = storage.objects_below(step)  # Of a missing or shorter one, before anything is read.
    for name, wanted in sorted(files.items()):
        if name not in found:
            raise DamagedError(f"{name}: no such object")
        if found[name].bytes != wanted["bytes"]:
            raise DamagedError(f"{name} has {found[name].bytes} bytes instead of {wanted['bytes']}")
    share = sorted(files)[part::parts]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        intact = pool.map(lambda name: _is_intact(step / name, files[name]), share)
        for name, same in zip(share, intact, strict=True):
            if not same:
                raise DamagedError(f"{name}: its bytes have changed since they were written")


def _is_intact(path: Path, wanted: dict[str, Any]) -> bool:
    whole = checksums.Crc32c() if "crc32c" in wanted else None
    chunks = []  # of a local checkpoint that somebody copied here
    for start in range(0, max(wanted["bytes"], 1), checksums.CHUNK_BYTES):
        end = min(start + checksums.CHUNK_BYTES, wanted["bytes"])
        try:
            data = storage.read_bytes(path, start, end) if end else b""
        except FileNotFoundError:
            return False
        if whole:
            whole.update(data)
        else:
            chunks.append(xxhash.xxh3_64_hexdigest(data))
    return whole.hexdigest() == wanted["crc32c"] if whole else chunks == wanted["xxh3_64"]
