"""Stands between a training and its parts while `muster certify` runs it.

It shortens the run, records what goes through it, and interrupts it where the plan says. The parts
themselves are those of any other run: what is wrapped is called with what it would be called with.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
import platform
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax

from launch import contract
from launch.spec import TrainSpec
from trainer import checkpoint_choice
from trainer.certify import recorder
from trainer.certify.faults import EXCEPTION, KILL, Fault, Faults, faults_of, wait_for
from trainer.certify.recorder import Recorder
from trainer.checkpoint import Checkpointer
from trainer.checkpoint_directory import TEMPORARY_SUFFIX
from trainer.data.feed import Feed
from trainer.optimizer import Optimizer
from trainer.report import updates_before
from trainer.state import Leaves, StateLayout
from trainer.step import TrainStep
from trainer.task import Task

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
# A save or a commit is waited for no longer than this; then the fault has missed it.
_SAVE_SECONDS = 120.0
_KEEP_ALL = 1 << 30


def make_probe(path: str) -> Probe:
    """The probe of this process. `jax.distributed` must be up."""
    plan = json.loads(Path(path).read_bytes())
    return Probe(
        plan,
        process_id=jax.process_index(),
        num_processes=jax.process_count(),
        attempt=int(os.environ.get(contract.ATTEMPT, "0")),
    )


class Probe:
    """What `muster certify` puts between the parts of a training.

    Args:
      plan: of the run, as `launch.certify` writes it.
      process_id, num_processes: this process's place.
      attempt: of the run.
    """

    def __init__(
        self, plan: Mapping[str, Any], *, process_id: int, num_processes: int, attempt: int
    ):
        self._plan = plan
        directory = Path(plan["directory"])
        self._recorder = Recorder(directory, attempt, process_id)
        self._faults = Faults(
            faults_of(plan),
            directory,
            process_id=process_id,
            num_processes=num_processes,
            attempt=attempt,
        )
        self._lead = process_id == 0
        self._step = 0
        self._saved: Path | None = None  # The step that was handed to the saver last.
        self._final = False

    def shortened(self, spec: TrainSpec) -> TrainSpec:
        """The same training, to be left after fewer steps, with saves and evaluations on the way.

        Schedules and all other fields stay: they were made of the user's own number of steps.
        """
        wanted = self._plan["spec"]
        keep = _KEEP_ALL if wanted["keep_all"] else spec.checkpoint.keep_last
        return dataclasses.replace(
            spec,
            num_steps=wanted["num_steps"],
            log_every_steps=1,
            checkpoint=dataclasses.replace(
                spec.checkpoint,
                every_steps=wanted["save_every_steps"],
                every_seconds=0.0,
                keep_last=keep,
            ),
            eval=dataclasses.replace(spec.eval, every_steps=wanted["eval_every_steps"]),
        )

    def restoring(self, saver: Checkpointer, feed: Feed) -> None:
        """Watch the restore: from where it begins to where the data is told its position."""
        restore, go_on = saver.restore, feed.restore

        def watched(*wanted: Any) -> Any:
            if checkpoint_choice.files_of(saver.directory).steps_in(saver.directory):
                self._faults.later("restore", None, "while the checkpoint was read")
            return restore(*wanted)

        def positioned(position: Any, **options: Any) -> Any:
            self._faults.befall("restore", None, "the state was read, the data not yet positioned")
            return go_on(position, **options)

        saver.restore = watched  # type: ignore[method-assign,assignment]
        feed.restore = positioned

    def restored(
        self, step: int, leaves: Leaves, layout: StateLayout, optimizer: Optimizer, task: Task
    ) -> None:
        """Record what the attempt starts with.

        Args:
          step: 0 for a fresh state.
          leaves: the state there.
          layout: of the state.
          optimizer: whose learning rate is recorded.
          task: of the run.
        """
        self._step = step
        self._layout = layout
        self._rate = optimizer.learning_rate
        self._every_step = recorder.local_bytes(layout) <= recorder.EVERY_STEP_BYTES
        facts = {}
        if self._lead:
            facts = {
                "kinds": recorder.kinds_of(layout),
                "versions": versions(),
                "mesh": {str(axis): size for axis, size in layout.mesh.shape.items()},
                "devices": f"{jax.device_count()} {jax.devices()[0].device_kind}",
                "compute_dtype": task.compute_dtype(),
            }
        num_processes = jax.process_count()
        self._recorder.write("start", step=step, num_processes=num_processes, **facts)
        self._recorder.state("restored" if step else "initial", step, layout, leaves)

    def compiling(self, check: Callable[[Any], None]) -> Callable[[Any], None]:
        """`check` of `trainer.step.compile_train_step`, with the fault before it."""

        def checked(lowered: Any) -> None:
            self._faults.befall("compile", self._step, "the step was traced, not yet compiled")
            check(lowered)

        return checked

    def evaluating(self, batches: Iterable[Any]) -> Iterator[Any]:
        """The batches of an evaluation, with the fault between two of them, or behind the only."""
        for number, batch in enumerate(batches):
            if number == 1:
                self._faults.befall("eval", self._step, "after the first batch of an evaluation")
            yield batch
        self._faults.befall("eval", self._step, "after the batch of an evaluation, before its sum")

    def looping(self, train_step: TrainStep | None, feed: Feed, saver: Checkpointer) -> Any:
        """The training step with its records; from here on saves are watched as well."""
        self._watch_saves(saver)
        if train_step is None:
            return None

        def step(leaves: Any, batch: Any) -> Any:
            leaves, metrics = train_step(leaves, batch)
            self._step += 1
            # Reading the numbers waits for the step; it changes none of them.
            with jax.transfer_guard("allow"):
                self._record(leaves, batch, metrics, feed.position())
            if self._faults.due("step", self._step) and self._saved is not None:
                # What interrupts a save is a fault of its own.
                wait_for(self._saved.exists, _SAVE_SECONDS)
            self._faults.befall("step", self._step, "after the update")
            return leaves, metrics

        return step

    def _record(self, leaves: Leaves, batch: Any, metrics: Any, position: Any) -> None:
        step = self._step
        numbers = {name: float(value) for name, value in jax.device_get(metrics).items()}
        rate = None if self._rate is None else float(self._rate(updates_before(step, numbers)))
        self._recorder.write(
            "step",
            step=step,
            rows=recorder.rows_of(batch),
            metrics=numbers,
            learning_rate=rate,
            position=position,
        )
        every = self._plan["spec"]["save_every_steps"]
        # The saved steps, those after them, and the last.
        if self._every_step or step % every < 2 or step == self._plan["spec"]["num_steps"]:
            self._recorder.state("after", step, self._layout, leaves)

    def _watch_saves(self, saver: Checkpointer) -> None:
        save, before_commit = saver.save, saver.before_commit

        def watched(step: int, state: Any, data_position: Any, *, final: bool = False) -> float:
            saver.wait()  # As `save` does: only then the next commit is this step's.
            directory = Path(saver.directory)
            self._saved, self._final = directory / str(step), final
            fault = self._faults.due("save", step)
            if fault is not None and fault.kind != EXCEPTION:
                threading.Thread(
                    target=self._befall_in_save,
                    args=(directory, step, fault.delay_seconds),
                    name="certify_fault",
                    daemon=True,
                ).start()
            seconds = save(step, state, data_position, final=final)
            if fault is not None and fault.kind == EXCEPTION and not self._saved.exists():
                self._faults.befall("save", step, f"while step {step} was being written")
            return seconds

        def committing() -> None:
            if before_commit is not None:
                before_commit()
            if self._held is not None:
                self._hold(self._held)

        saver.save = watched  # type: ignore[method-assign]
        saver.before_commit = committing if self._lead else before_commit

    @property
    def _held(self) -> Fault | None:
        """The fault that the commit of the save on its way has to wait for."""
        fault = self._faults.fault
        if fault is None or fault.phase != "save" or self._saved is None:
            return None
        if fault.kind == EXCEPTION and self._final:
            return None  # The main thread waits for this very commit, and could not raise.
        return fault if int(self._saved.name) >= (fault.step or 0) else None

    def _hold(self, fault: Fault) -> None:
        """Let the save not be over before the fault has come. Lead process only, Orbax's thread."""
        wait_for(lambda: self._faults.marked(fault), _SAVE_SECONDS)
        if fault.kind in (KILL, EXCEPTION) and self._faults.marked(fault):
            wait_for(lambda: False, _SAVE_SECONDS)  # Death comes, by its own hand or another's.

    def _befall_in_save(self, directory: Path, step: int, delay_seconds: float) -> None:
        temporary = directory / f"{step}{TEMPORARY_SUFFIX}"
        if not wait_for(temporary.exists, _SAVE_SECONDS):
            return
        wait_for(lambda: False, delay_seconds)
        if temporary.exists() and not (directory / str(step)).exists():
            where = f"step {step} was being written, in {temporary.name}"
            self._faults.befall("save", step, where)


def versions() -> dict[str, str]:
    """Of what computes the steps."""
    found = {name: importlib.metadata.version(name) for name in _PACKAGES}
    return {"python": platform.python_version(), **found}
