"""The functions for what lies in a checkpoint directory, by where that is."""

from __future__ import annotations

from typing import Any

from trainer import checkpoint_directory, checkpoint_gcs, checksums, storage


def files_of(directory: storage.Path) -> Any:
    """The module with `steps_in`, `remove`, `set_aside`, ... for a checkpoint directory."""
    return checkpoint_gcs if storage.is_remote(directory) else checkpoint_directory


def reader_of(step: storage.Path) -> Any:
    """The module with `read_manifest` and `verify` for a step."""
    return checkpoint_gcs if storage.is_remote(step) else checksums
