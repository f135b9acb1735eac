"""Is the checkpoint directory fit for use, and which of its steps is to be restored?"""

from __future__ import annotations

import secrets
from typing import Any

import jax

from launch.spec import ConfigError
from trainer import checkpoint_directory, checkpoint_gcs, checksums, distributed, storage
from trainer.checkpoint_directory import DAMAGED
from trainer.checkpoint_format import MANIFEST


class CheckpointError(RuntimeError):
    """A checkpoint could not be written, or none of those that exist can be read."""


def files_of(directory: storage.Path) -> Any:
    """The functions for what lies in a checkpoint directory, by where it is."""
    return checkpoint_gcs if storage.is_remote(directory) else checkpoint_directory


def probe(directory: storage.Path) -> None:
    """See that the directory can be written from every process. Collective.

    Raises:
      ConfigError: it cannot, or is not the same one on all processes.
    """
    files = files_of(directory)
    lead = distributed.is_lead()
    token = secrets.token_hex(8)
    problem = files.write_probe(directory, token) if lead else None
    token, problem = distributed.broadcast("checkpoint/probe", (token, problem))
    process = jax.process_index()
    if not problem and not lead:
        problem = files.read_probe(directory, token, process)
    problems = distributed.gather("checkpoint/probe", problem)
    if lead and not problems[0]:
        files.remove_probe(directory)
    seen = [process for process, problem in enumerate(problems) if problem]
    if not seen:
        return
    rule = f"{problems[seen[0]]} (process {seen[0]}); choose another --workdir"
    error = ConfigError("checkpoint directory", rule, str(directory))
    if storage.is_remote(directory):
        rule += ", or see to the bucket and to who may write it"
        error = ConfigError("--workdir", rule, str(directory.parent))
    # A lead that leaves before all have heard it would be the reason for the others' end.
    distributed.fail_together(error, accuses=seen)


def newest_usable(directory: storage.Path) -> int | None:
    """The newest step whose checksums hold, the same on all processes. Collective.

    Steps that cannot be used are set aside.

    Returns:
      The step, or None if there has never been one.

    Raises:
      CheckpointError: there are steps, and none can be used.
    """
    files = files_of(directory)
    lead = distributed.is_lead()
    steps: list[int] = []
    had_damaged = False
    if lead:
        files.remove_unfinished(directory)
        steps = files.steps_in(directory)
        had_damaged = files.has_damaged(directory)
    steps, had_damaged = distributed.broadcast("checkpoint/steps", (steps, had_damaged))
    for step in steps:
        problems = distributed.gather("checkpoint/verify", _problem(directory / str(step)), 3600.0)
        why = next((problem for problem in problems if problem), None)
        if why is None:
            return step
        if lead:
            files.set_aside(directory, step, why)
    distributed.barrier("checkpoint/set_aside")
    if steps or had_damaged:
        raise CheckpointError(
            f"none of the checkpoints in {directory} can be used; those set aside are in "
            f"{DAMAGED}/. To start this run anew, give another --workdir or move that directory "
            "away"
        )
    return None


def _problem(step: storage.Path) -> str | None:
    """What this process finds wrong with its share of a step's files, or None."""
    reader: Any = checkpoint_gcs if storage.is_remote(step) else checksums
    try:
        files = reader.read_manifest(step / MANIFEST)
        reader.verify(step, files, jax.process_index(), jax.process_count())
    except checksums.DamagedError as error:
        return str(error)
    return None
