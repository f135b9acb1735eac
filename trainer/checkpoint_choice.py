"""Is the checkpoint directory fit for use, and which of its steps is to be restored?"""

from __future__ import annotations

import contextlib
import secrets

import jax

from launch.spec import ConfigError
from trainer import checksums, distributed, storage
from trainer.checkpoint_directory import DAMAGED, MANIFEST
from trainer.checkpoints import verified
from trainer.checkpoints.leaves import damaged_leaves
from trainer.checkpoints.places import files_of, reader_of
from trainer.checkpoints.steps import files_below
from trainer.checkpoints.verify import leaves_in_words

_MOST_BYTES = 4 * 2**30  # Of a step whose arrays the lead reads, only to name what is damaged.


class CheckpointError(RuntimeError):
    """A checkpoint could not be written, or none of those that exist can be read."""


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
    error: Exception = ConfigError("checkpoint directory", rule, str(directory))
    if distributed.broadcast("checkpoint/steps", lead and bool(_steps_seen(directory))):
        # It could be written once. A disk that is full or read-only for a while is no wrong config.
        error = CheckpointError(f"{directory} holds steps, and cannot be written now: {rule}")
    elif storage.is_remote(directory):
        rule += ", or see to the bucket and to who may write it"
        error = ConfigError("--workdir", rule, str(directory.parent))
    # A lead that leaves before all have heard it would be the reason for the others' end.
    distributed.fail_together(error, accuses=seen)


def _steps_seen(directory: storage.Path) -> list[int]:
    try:
        return files_of(directory).steps_in(directory)
    except Exception:  # What cannot be written may not be read either.
        return []


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
        why = problem_of(directory / str(step))
        if why is None:
            return step
        set_aside(directory, step, why, name_leaves=True)
    distributed.barrier("checkpoint/set_aside")
    if steps or had_damaged:
        raise CheckpointError(
            f"none of the checkpoints in {directory} can be used; those set aside are in "
            f"{DAMAGED}/. To start this run anew, give another --workdir or move that directory "
            "away"
        )
    return None


def newest_usable_of_another(directory: storage.Path, step: int | None) -> int:
    """The newest step of another run whose checksums hold. Collective. Nothing is changed there.

    Args:
      directory: of its checkpoints.
      step: the only one that will do; None for the newest.

    Raises:
      ConfigError: there is none.
    """
    field, where = "config.init_from", str(directory)
    steps: list[int] = []
    if distributed.is_lead():
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            steps = files_of(directory).steps_in(directory)
    steps = distributed.broadcast("checkpoint/steps_of_another", steps)
    if not steps:
        raise ConfigError(field, "holds no complete checkpoint", where)
    if step is not None and step not in steps:
        rule = f"has no step {step}; it has {', '.join(map(str, sorted(steps)))}"
        raise ConfigError(field, rule, where)
    wanted = steps if step is None else [step]
    problems = []
    for number in wanted:
        why = problem_of(directory / str(number), noted=False)
        if why is None:
            return number
        problems.append(f"step {number}: {why}")
        distributed.say(f"warning: {field}: {problems[-1]}")
    raise ConfigError(field, f"none of its steps can be used: {'; '.join(problems[:3])}", where)


def problem_of(step: storage.Path, *, noted: bool = True) -> str | None:
    """What is wrong with a step's files, or None. Collective; each process reads its share.

    Args:
      step: its directory.
      noted: whether to note beside it that it was verified.
    """
    problems = distributed.gather("checkpoint/verify", _problem(step), 3600.0)
    why = next((problem for problem in problems if problem), None)
    if why is None and noted and distributed.is_lead():
        verified.note(step.parent, step.name, verified.manifest_of(step), None)
    return why


def set_aside(directory: storage.Path, step: int, why: str, *, name_leaves: bool = False) -> None:
    """Have the lead move a step that cannot be used out of the way. Collective.

    Args:
      directory: of the checkpoints.
      step: its number.
      why: what is wrong with it.
      name_leaves: whether to look for the leaves that it hits, if that does not take long.
    """
    if distributed.is_lead():
        place = directory / str(step)
        if name_leaves and sum(file.bytes for file in files_below(place).values()) < _MOST_BYTES:
            why = "; ".join(filter(None, [why, leaves_in_words(damaged_leaves(place))]))
        target = files_of(directory).set_aside(directory, step, why)
        verified.note(directory, f"{DAMAGED}/{target.name}", verified.manifest_of(target), why)
    distributed.barrier("checkpoint/set_aside")


def _problem(step: storage.Path) -> str | None:
    """What this process finds wrong with its share of a step's files, or None."""
    reader = reader_of(step)
    try:
        files = reader.read_manifest(step / MANIFEST)
        reader.verify(step, files, jax.process_index(), jax.process_count())
    except checksums.DamagedError as error:
        return str(error)
    return None
