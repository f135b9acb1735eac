"""Checkpoints through Orbax: state, data position and config in one atomic step.

Orbax's `AsyncCheckpointer` writes and commits. We do not use its `CheckpointManager`: that takes
any empty directory with a number for the newest step, returns False instead of saving when it has
seen a later one, and asks JAX's preemption service for the step from a thread of its own, which
can make the processes of a gang disagree on where to stop (orbax-checkpoint 0.12.8).
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import jax
import orbax.checkpoint as ocp

from launch.spec import CheckpointSpec
from trainer import (
    checkpoint_choice,
    checkpoint_directory,
    checkpoint_format,
    checkpoint_seal,
    device_digest,
    distributed,
    storage,
)
from trainer.checkpoint_choice import CheckpointError
from trainer.checkpoint_directory import META, STATE
from trainer.checkpoint_format import (
    StateHandler,
    StateSave,
    describe,
)
from trainer.checkpoint_read import Plan, Restored, read_step
from trainer.checkpoints import steps
from trainer.checkpoints.places import files_of
from trainer.checksums import DamagedError
from trainer.save_watch import SaveWatch
from trainer.snapshot import Snapshot

log = logging.getLogger(__name__)

State = Mapping[str, jax.Array]

# For Orbax's limits, which a clock that is set would reach at once; SaveWatch has the real one.
_NEVER_SECONDS = 10 * 365 * 24 * 3600


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
        record: Mapping[str, Any] = MappingProxyType({}),
        clock: Callable[[], float] = time.monotonic,
        save_timeout_seconds: float = 600.0,
    ):
        """See that the directory can be written from every process.

        Args:
          directory: on a file system that all processes share, made if missing; or on GCS.
          spec: when to save and what to keep.
          config: the resolved config, JSON; kept in every step.
          record: more that is kept in every step, JSON: `code`, `versions`, `params`.
          clock: seconds; only the lead's counts.
          save_timeout_seconds: a save that takes longer has failed.

        Raises:
          ConfigError: the directory cannot be written, or is not the same on all processes.
        """
        self.directory = storage.path(directory)
        self._files = files_of(self.directory)
        self._spec = spec
        self._record = {"config": config, **record}
        self._clock = clock
        self._last_time = clock()
        self.last_save_seconds: float | None = None  # From its start until it was on the disk.
        self._digest_seconds: list[float] = []  # Of every save, waited for the leaves' digests.
        self._newest: int | None = None  # the newest step saved, restored or on its way
        self._good: int | None = None  # the newest step known to be committed
        self._saving: int | None = None
        self._watch: SaveWatch | None = None  # of the save on its way
        self._save_timeout_seconds = save_timeout_seconds
        self._deletion: threading.Thread | None = None
        # Called on the lead just before each commit, on a thread of Orbax's.
        self.before_commit: Callable[[], None] | None = None
        self._snapshot = Snapshot() if jax.default_backend() == "cpu" else None
        checkpoint_choice.probe(self.directory)
        self._handler = StateHandler(use_ocdbt=True, use_compression=False)
        self._orbax = ocp.AsyncCheckpointer(
            ocp.CompositeCheckpointHandler(
                **{STATE: self._handler, META: ocp.JsonCheckpointHandler()}
            ),
            async_options=ocp.AsyncOptions(
                timeout_secs=_NEVER_SECONDS,
                post_finalization_callback=self._write_manifest,
            ),
        )

    def keep(self, **record: Any) -> None:
        """Keep more in every step from now on, JSON; the same on every process."""
        self._record |= record

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
        began = time.perf_counter()
        digests = device_digest.digests(state)
        self._digest_seconds.append(time.perf_counter() - began)
        state = dict(state) if self._snapshot is None else self._snapshot.take(state)
        meta = {
            "schema": 1,
            "step": step,
            "data_position": data_position,
            "leaves": {name: describe(array) for name, array in state.items()},
            "digests": digests,
            **self._record,
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
        self._watch = SaveWatch(self._orbax.wait_until_finished, self._save_timeout_seconds)

    def _write_manifest(self) -> None:
        if self.before_commit is not None:
            self.before_commit()
        checkpoint_format.complete_manifest(self._files.written_path(self._path(self._saving)))

    @property
    def good_step(self) -> int | None:
        """The newest step known to be on the disk, whole; it looks, from whatever thread."""
        saving = self._saving
        if saving is None or storage.is_remote(self.directory):
            return self._good
        return saving if self._path(saving).exists() else self._good

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
        if self._watch is None or not self._watch.ended:
            return False
        self._await()
        return True

    def wait(self) -> None:
        """Wait until the save on its way is on the disk.

        Raises:
          CheckpointError: it failed.
        """
        self._await()
        if self._deletion is not None:
            self._deletion.join()
            self._deletion = None

    def _await(self) -> None:
        if self._watch is None:
            return
        watch, self._watch = self._watch, None
        try:
            watch.join()
        except Exception as error:
            raise self._failed(error) from error
        self._committed()

    def _committed(self) -> None:
        """Let retention do its work, now that the newest step is safe."""
        self._good, self._saving = self._saving, None
        self.last_save_seconds = self._clock() - self._last_time
        if not distributed.is_lead():
            return
        self._deletion = threading.Thread(target=self._retain, name="checkpoint_deletion")
        self._deletion.start()

    def _retain(self) -> None:
        try:
            checkpoint_seal.write(self._path(self._good))
            # Only good ones count: damaged or unfinished ones must not push out the last good one.
            drop = checkpoint_directory.steps_to_drop(
                steps.good_steps(self.directory),
                self._spec.keep_last,
                self._spec.keep_every_steps,
            )
            self._files.remove_all(self._path(step) for step in drop)
        except Exception as error:  # The next save tries again.
            log.warning("old checkpoints in %s are not deleted: %s", self.directory, error)

    def _failed(self, error: Exception) -> CheckpointError:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        kept = (
            "there is none before it" if self._good is None else f"step {self._good} is untouched"
        )
        return CheckpointError(
            f"saving step {self._saving} in {self.directory} failed on process "
            f"{jax.process_index()}: {lines[0][:500]}; {kept}"
        )

    @property
    def cost(self) -> str:
        """What the checks have cost this process, in words; "" before the first save."""
        if not self._digest_seconds:
            return ""
        number = len(self._digest_seconds)
        beside = self._handler.digest_seconds
        return (
            f"{number} saved; the loop waited {sum(self._digest_seconds):.2f} s for the leaves' "
            f"digests, files' checksums took {beside:.2f} s beside it"
        )

    def close(self) -> None:
        """Wait for everything, then let go of Orbax's threads."""
        self.wait()
        self._orbax.close()

    # ---- Restoring ----

    def restore(
        self, abstract: Mapping[str, jax.ShapeDtypeStruct], plan: Plan | None = None
    ) -> Restored | None:
        """Read the newest step that can be used; set those aside that cannot.

        Args:
          abstract: dotted name -> shape, dtype and sharding wanted; any mesh, any number of
            processes.
          plan: which leaves to take from a step; by default all, under their own names.

        Returns:
          The checkpoint, or None if the run has never saved one.

        Raises:
          CheckpointError: there are steps, and none can be used.
          ConfigError: the step's leaves are not those wanted; the text lists them.
        """
        began = time.perf_counter()
        while (step := checkpoint_choice.newest_usable(self.directory)) is not None:
            try:
                restored = read_step(self._path(step), abstract, plan, began)
            except DamagedError as error:
                checkpoint_choice.set_aside(self.directory, step, str(error))
                continue
            self._newest = self._good = step
            self._last_time = self._clock()
            return restored
        return None

    def _path(self, step: int | None) -> storage.Path:
        return self.directory / str(step)
