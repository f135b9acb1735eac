"""Checkpoints through Orbax: state, data position and config in one atomic step.

Orbax's `AsyncCheckpointer` writes and commits. We do not use its `CheckpointManager`: that takes
any empty directory with a number for the newest step, returns False instead of saving when it has
seen a later one, and asks JAX's preemption service for the step from a thread of its own, which
can make the processes of a gang disagree on where to stop (orbax-checkpoint 0.12.8).
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import logging
import os
import pathlib
import secrets
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import orbax.checkpoint as ocp

from launch.spec import CheckpointSpec, ConfigError
from trainer import checkpoint_directory, checkpoint_format, checksums, distributed
from trainer.checkpoint_format import (
    MANIFEST,
    META,
    STATE,
    StateHandler,
    StateRestore,
    StateSave,
    compare,
    describe,
)
from trainer.snapshot import Snapshot

log = logging.getLogger(__name__)

State = Mapping[str, jax.Array]


class CheckpointError(RuntimeError):
    """A checkpoint could not be written, or none of those that exist can be read."""


@dataclasses.dataclass(frozen=True)
class Restored:
    """A checkpoint read back.

    Attributes:
      step: completed updates.
      state: dotted name -> array, in the shardings asked for.
      data_position: the JSON value given to `save`.
      config: the resolved config of the run that saved it.
    """

    step: int
    state: dict[str, jax.Array]
    data_position: Any
    config: Mapping[str, Any]


class Checkpointer:
    """Saves and restores the steps of one run. One save at a time is on its way.

    Collective: every process must make one, and must call every method alike, except where a
    method says otherwise.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        spec: CheckpointSpec,
        *,
        config: Mapping[str, Any],
        clock: Callable[[], float] = time.monotonic,
        save_timeout_seconds: int = 600,
    ):
        """See that the directory can be written from every process.

        Args:
          directory: on a file system that all processes share; made if missing.
          spec: when to save and what to keep.
          config: the resolved config, JSON; kept in every step.
          clock: seconds; only the lead's counts.
          save_timeout_seconds: a save that takes longer has failed.

        Raises:
          ConfigError: the directory cannot be written, or is not the same on all processes.
        """
        self.directory = pathlib.Path(directory).absolute()
        self._spec = spec
        self._config = config
        self._clock = clock
        self._last_time = clock()
        self.last_save_seconds: float | None = None  # From its start until it was on the disk.
        self._newest: int | None = None  # the newest step saved, restored or on its way
        self._good: int | None = None  # the newest step known to be committed
        self._saving: int | None = None
        self._deletion: threading.Thread | None = None
        self._snapshot = Snapshot() if jax.default_backend() == "cpu" else None
        self._probe()
        self._handler = StateHandler(use_ocdbt=True, use_compression=False)
        self._orbax = ocp.AsyncCheckpointer(
            ocp.CompositeCheckpointHandler(
                **{STATE: self._handler, META: ocp.JsonCheckpointHandler()}
            ),
            async_options=ocp.AsyncOptions(
                timeout_secs=save_timeout_seconds,
                post_finalization_callback=self._write_manifest,
            ),
        )

    def _probe(self) -> None:
        lead = distributed.is_lead()
        token = secrets.token_hex(8)
        problem = checkpoint_directory.write_probe(self.directory, token) if lead else None
        token, problem = distributed.broadcast("checkpoint/probe", (token, problem))
        process = jax.process_index()
        if not problem and not lead:
            problem = checkpoint_directory.read_probe(self.directory, token, process)
        problems = distributed.gather("checkpoint/probe", problem)
        if lead and not problems[0]:
            checkpoint_directory.remove_probe(self.directory)
        for process, problem in enumerate(problems):
            if problem:
                raise ConfigError(
                    "checkpoint directory",
                    f"{problem} (process {process}); choose another --workdir",
                    str(self.directory),
                )

    # ---- When to save ----

    def due(self, step: int, *, logging_step: bool = True) -> bool:
        """Is this a step to save? Collective where `every_seconds` is set and it is a logging step.

        Args:
          step: completed updates.
          logging_step: may the lead's clock be asked at this step?
        """
        if step == self._newest:
            return False
        if self._spec.every_steps and step % self._spec.every_steps == 0:
            return True
        if not (self._spec.every_seconds and logging_step):
            return False
        passed = self._clock() - self._last_time
        return distributed.broadcast("checkpoint/due", passed >= self._spec.every_seconds)

    # ---- Saving ----

    def save(self, step: int, state: State, data_position: Any, *, final: bool = False) -> float:
        """Start to save a step; the state may be donated as soon as this returns.

        Waits for the save before it, should that still be on its way. Saving the newest step once
        more does nothing: it is the same state.

        Args:
          step: completed updates; not below the newest step.
          state: dotted name -> array, typed PRNG keys included; every process's part of it.
          data_position: JSON, the same on every process.
          final: also wait until it is on the disk.

        Returns:
          Seconds for which the caller was held up.

        Raises:
          CheckpointError: this save or the one before it failed.
          ValueError: a later step is there already.
        """
        start = time.perf_counter()
        if self._newest is not None and step < self._newest:
            raise ValueError(f"step {step} cannot be saved: step {self._newest} is there already")
        if step != self._newest:
            self.wait()
            self._start(step, state, data_position)
        if final:
            self.wait()
        return time.perf_counter() - start

    def _start(self, step: int, state: State, data_position: Any) -> None:
        state = dict(state) if self._snapshot is None else self._snapshot.take(state)
        meta = {
            "schema": 1,
            "step": step,
            "data_position": data_position,
            "config": self._config,
            "leaves": {name: describe(array) for name, array in state.items()},
            "versions": {
                name: importlib.metadata.version(name) for name in ("jax", "flax", "optax")
            },
        }
        self._saving = self._newest = step
        self._last_time = self._clock()
        try:
            self._orbax.save(
                self._path(step),
                args=ocp.args.Composite(**{STATE: StateSave(state), META: ocp.args.JsonSave(meta)}),
            )
        except Exception as error:
            raise self._failed(error) from error

    def _write_manifest(self) -> None:
        path = self._path(self._saving)
        checkpoint_format.complete_manifest(
            path.with_name(path.name + checkpoint_directory.TEMPORARY_SUFFIX)
        )

    @property
    def saving(self) -> bool:
        """Is a save on its way, as far as `check` and `wait` have seen?"""
        return self._saving is not None

    def check(self) -> bool:
        """Raise what went wrong with the save on its way, if anything. Cheap, and not collective.

        Returns:
          Whether a save was found to have come to its end.

        Raises:
          CheckpointError: the save failed; the steps before it are untouched.
        """
        if self._saving is None:
            return False
        try:
            self._orbax.check_for_errors()
        except Exception as error:
            raise self._failed(error) from error
        if not self._path(self._saving).exists():
            return False
        self._committed()
        return True

    def wait(self) -> None:
        """Wait until the save on its way is on the disk.

        Raises:
          CheckpointError: it failed.
        """
        if self._saving is not None:
            try:
                self._orbax.wait_until_finished()
            except Exception as error:
                raise self._failed(error) from error
            self._committed()
        if self._deletion is not None:
            self._deletion.join()
            self._deletion = None

    def _committed(self) -> None:
        """Let retention do its work, now that the newest step is safe."""
        self._good, self._saving = self._saving, None
        self.last_save_seconds = self._clock() - self._last_time
        if not distributed.is_lead():
            return
        drop = checkpoint_directory.steps_to_drop(
            checkpoint_directory.steps_in(self.directory),
            self._spec.keep_last,
            self._spec.keep_every_steps,
        )
        if drop:
            self._deletion = threading.Thread(
                target=checkpoint_directory.remove_all,
                args=([self._path(step) for step in drop],),
                name="checkpoint_deletion",
            )
            self._deletion.start()

    def _failed(self, error: Exception) -> CheckpointError:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        kept = (
            "there is none before it" if self._good is None else f"step {self._good} is untouched"
        )
        return CheckpointError(
            f"saving step {self._saving} in {self.directory} failed on process "
            f"{jax.process_index()}: {lines[0][:500]}; {kept}"
        )

    def close(self) -> None:
        """Wait for everything, then let go of Orbax's threads."""
        self.wait()
        self._orbax.close()

    # ---- Restoring ----

    def restore(self, abstract: Mapping[str, jax.ShapeDtypeStruct]) -> Restored | None:
        """Read the newest step that can be used; set those aside that cannot.

        Args:
          abstract: dotted name -> shape, dtype and sharding wanted; any mesh, any number of
            processes.

        Returns:
          The checkpoint, or None if the run has never saved one.

        Raises:
          CheckpointError: there are steps, and none can be used.
          ConfigError: the step's leaves are not those wanted; the text lists them.
        """
        step = self._newest_usable()
        if step is None:
            return None
        path = self._path(step)
        meta = ocp.Checkpointer(ocp.JsonCheckpointHandler()).restore(
            path / META, args=ocp.args.JsonRestore()
        )
        compare(meta["leaves"], abstract, path)
        wanted = dict(abstract)
        state = ocp.Checkpointer(self._handler).restore(
            path / STATE,
            args=StateRestore(
                wanted, restore_args=ocp.checkpoint_utils.construct_restore_args(wanted)
            ),
        )
        self._newest = self._good = step
        self._last_time = self._clock()
        return Restored(step, state, meta["data_position"], meta["config"])

    def _newest_usable(self) -> int | None:
        """The newest step whose checksums hold, the same on all processes."""
        lead = distributed.is_lead()
        steps: list[int] = []
        had_damaged = False
        if lead:
            checkpoint_directory.remove_unfinished(self.directory)
            steps = checkpoint_directory.steps_in(self.directory)
            had_damaged = checkpoint_directory.has_damaged(self.directory)
        steps, had_damaged = distributed.broadcast("checkpoint/steps", (steps, had_damaged))
        for step in steps:
            problems = distributed.gather("checkpoint/verify", self._problem(step), 3600.0)
            why = next((problem for problem in problems if problem), None)
            if why is None:
                return step
            if lead:
                checkpoint_directory.set_aside(self.directory, step, why)
        distributed.barrier("checkpoint/set_aside")
        if steps or had_damaged:
            raise CheckpointError(
                f"none of the checkpoints in {self.directory} can be used; those set aside are in "
                f"{checkpoint_directory.DAMAGED}/. To start this run anew, give another --workdir "
                "or move that directory away"
            )
        return None

    def _problem(self, step: int) -> str | None:
        """What this process finds wrong with its share of a step's files, or None."""
        path = self._path(step)
        try:
            files = checksums.read_manifest(path / MANIFEST)
            checksums.verify(path, files, jax.process_index(), jax.process_count())
        except checksums.DamagedError as error:
            return str(error)
        return None

    def _path(self, step: int | None) -> pathlib.Path:
        return self.directory / str(step)
