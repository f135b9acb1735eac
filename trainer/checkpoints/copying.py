"""A step copied to another place: verified, and there whole or not at all."""

from __future__ import annotations

import os
import shutil
from typing import Any

from launch import contract
from launch.spec import ConfigError
from trainer import storage
from trainer.checkpoint_directory import TEMPORARY_SUFFIX
from trainer.checkpoint_gcs import COMMIT_FILE
from trainer.checkpoints import verify
from trainer.checkpoints.places import files_of
from trainer.checkpoints.steps import Step, files_below
from trainer.storage import Path


def copy(directory: Path, step: Step, target: str) -> dict[str, Any]:
    """Copy a step into `TARGET/checkpoints/STEP`, of which a run can resume or start.

    Args:
      directory: of the checkpoints.
      step: a good one.
      target: a directory, here or on gs://.

    Returns:
      A report, as JSON.

    Raises:
      ConfigError: the step is damaged, or the target has that step already.
    """
    source = directory / step.name
    found = verify.find(source)
    if not found.usable:
        raise ConfigError("", f"step {step.name} is damaged and not copied: {found.problem}")
    folder = storage.path(storage.run_directory(target)) / contract.CHECKPOINTS
    place = folder / str(step.step)
    remote = storage.is_remote(place)
    if (place / COMMIT_FILE if remote else place).exists():
        raise ConfigError("", f"{place} is there already; nothing was copied")
    files = [name for name in files_below(source) if not name.endswith("/")]
    written = place if remote else place.with_name(place.name + TEMPORARY_SUFFIX)
    try:
        _remove(written)  # What a copy that was cut off left behind.
        # On GCS a step is one as soon as its commit file is there: that goes last.
        late = [name for name in files if name == COMMIT_FILE and remote]
        for name in files:
            if name not in late:
                _copy_file(source / name, written / name)
        # Not what was read is compared, but what has been written.
        after = verify.find(written, name_leaves=False)
        if not after.usable:
            raise OSError(f"the copy differs from the step: {after.problem}")
        if not remote:
            _commit(written, place)
        elif late:
            _copy_file(source / COMMIT_FILE, place / COMMIT_FILE)
        else:
            storage.write_text(place / COMMIT_FILE, "")
    except OSError as error:
        _remove(written)
        raise ConfigError("", f"{place} cannot be written: {error}") from None
    except BaseException:
        _remove(written)
        raise
    return {"step": step.step, "copied_to": os.fspath(place), "bytes": step.bytes}


def _copy_file(source: Path, target: Path) -> None:
    if not storage.is_remote(target):
        target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    if storage.is_remote(source) and storage.is_remote(target):
        storage.filesystem().cp_file(os.fspath(source), os.fspath(target))
    elif storage.is_remote(target):
        storage.filesystem().put_file(os.fspath(source), os.fspath(target))
    elif storage.is_remote(source):
        storage.filesystem().get_file(os.fspath(source), os.fspath(target))
    else:
        shutil.copyfile(source, target)
    if not storage.is_remote(target):
        with open(target, "rb") as written:
            os.fsync(written.fileno())


def _commit(written: Path, place: Path) -> None:
    """The local copy under its own name, all at once."""
    os.rename(written, place)
    for folder in (place, place.parent):
        fd = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def _remove(place: Path) -> None:
    if place.exists():
        files_of(place).remove(place)
