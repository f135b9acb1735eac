"""Where `config.init_from` points to: `RUN[@STEP]`."""

from __future__ import annotations

import os
from typing import NamedTuple

from launch import contract
from launch.spec import ConfigError
from trainer import storage
from trainer.checkpoint_directory import META, STATE
from trainer.checkpoints.places import files_of


class Source(NamedTuple):
    """A directory of checkpoints, and the step that was asked for; None for the newest."""

    directory: str
    step: int | None


def find_source(text: str) -> Source:
    """Find the checkpoints. Lead process only.

    Args:
      text: a run directory, a directory of checkpoints or a step's own directory, here or on
        gs://; maybe `@STEP` behind it.

    Raises:
      ConfigError: there are none.
    """
    where, at, number = text.rpartition("@")
    if not at or not number.isdigit():
        where, number = text, ""
    step = int(number) if number else None
    place = storage.path(os.path.expanduser(where.rstrip("/")))
    for directory in (place / contract.CHECKPOINTS, place):
        try:
            if files_of(directory).steps_in(directory):
                return Source(os.fspath(directory), step)
        except (FileNotFoundError, NotADirectoryError):
            continue
    if place.name.isdigit() and (place / META).exists() and (place / STATE).exists():
        return Source(os.fspath(place.parent), int(place.name))
    raise ConfigError(
        "config.init_from",
        "holds no checkpoints; give a run directory, one of checkpoints, or one of its steps",
        text,
    )
