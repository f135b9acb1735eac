"""The seal of a step: a second manifest, of the files that the commit itself writes or changes.

The first manifest is written before the commit, as a part of it. Orbax changes a file or two until
then, and no restore needs them; a bit that flips in them is noticed all the same, by `verify`. A
step without a seal was committed just before its run was killed, and is as good as any.
"""

from __future__ import annotations

from trainer import checksums, storage
from trainer.checkpoint_directory import MANIFEST, META, SEAL, STATE
from trainer.checkpoints.places import reader_of
from trainer.storage import Path


def write(step: Path) -> None:
    """Seal a committed step. Lead process only."""
    if storage.is_remote(step):
        files: checksums.Digests = {
            name: {"bytes": found.bytes, "crc32c": found.crc32c}
            for name, found in storage.objects_below(step).items()
            if _is_of_commit(name)
        }
        storage.write_text(step / SEAL, checksums.manifest_text(files))
        return
    names = [path.name for path in sorted(step.iterdir()) if path.is_file()]
    files = checksums.digest_files(step, [name for name in names if _is_of_commit(name)])
    checksums.write_manifest(step / SEAL, files)


def problem(step: Path) -> str | None:
    """What is wrong with the sealed files, in words; None if nothing is, or there is no seal."""
    reader = reader_of(step)
    try:
        if not _is_there(step / SEAL):
            return None
        reader.verify(step, reader.read_manifest(step / SEAL))
    except checksums.DamagedError as error:
        return f"{error}; no restore needs it"
    return None


def _is_there(path: Path) -> bool:
    try:
        storage.read_text(path)
    except FileNotFoundError:
        return False
    except UnicodeDecodeError:
        return True
    return True


def _is_of_commit(name: str) -> bool:
    return not name.startswith((f"{STATE}/", f"{META}/")) and name not in (MANIFEST, SEAL)
