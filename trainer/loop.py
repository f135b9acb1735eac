"""The training loop. It dispatches a step, and reads the metrics of the one before."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import jax

from launch.contract import report_progress
from trainer.checkpoint import Checkpointer
from trainer.data.feed import Feed
from trainer.distributed import broadcast, say
from trainer.local_checkpoints import LocalCheckpoints
from trainer.preemption import Stopped, StopSignal
from trainer.replicas import ReplicaCheck, ReplicaError
from trainer.report import Reporter
from trainer.state import Leaves, StateLayout

_SLOWER = 1.25  # A save may take so much longer than the one before it.


@dataclasses.dataclass(frozen=True)
class Loop:
    """The parts of a loop.

    Attributes:
      layout: of the train state.
      num_steps: where to stop.
      log_every_steps: at these the lead's clock may ask for a checkpoint.
      eval_every_steps: 0 for never.
      train_step: (leaves, batch) -> (leaves, metrics), compiled; it donates the leaves. None
        when there is nothing left to train.
      batches: this process's part of every global batch, as global arrays.
      saver: checkpoints.
      local: checkpoints on the hosts' own storage; None without.
      reporter: metrics.
      replicas: looks for silent corruption.
      stop: whether all processes stop here.
      evaluate: leaves -> mean held-out loss, or raises Stopped; None without held-out data.
        Collective.
    """

    layout: StateLayout
    num_steps: int
    log_every_steps: int
    eval_every_steps: int
    train_step: Callable[[Leaves, Any], tuple[Leaves, Any]] | None
    batches: Feed
    saver: Checkpointer
    local: LocalCheckpoints | None
    reporter: Reporter
    replicas: ReplicaCheck
    stop: StopSignal
    evaluate: Callable[[Leaves], float] | None

    def run(self, leaves: Leaves, step: int) -> Ended:
        """Train from `step` to `num_steps`, or until a stop is agreed.

        Collective: every process must call this, with the same step.

        Returns:
          The state after the last step, which is saved if there was time for it.
        """
        if self.train_step is None:
            return Ended(leaves, step, stopped=False)
        self.stop.enter_loop()
        first, position, cut = step, None, False
        batch = self._next_batch(step)
        # Any transfer that nobody asked for by name would stall the queue of dispatched steps.
        with jax.transfer_guard("disallow"):
            while step < self.num_steps and batch is not None and not self.stop.begin():
                leaves, metrics = self.train_step(leaves, batch)
                step += 1
                self.stop.step = step
                # What a resume needs: the position behind this step's batch, read before the next
                # batch is fetched while the device is busy.
                position = self.batches.position()
                if step < self.num_steps:
                    batch = self._next_batch(step)
                self.reporter.add(step, metrics, self.batches.wait_seconds)
                # A process whose data was not worth waiting for does all of this as the others do.
                ended = step == self.num_steps
                if self.replicas.due(step):  # Before a save, which must hold nothing corrupted.
                    self._check_replicas(step, leaves)
                if ended or self.saver.due(step, logging_step=step % self.log_every_steps == 0):
                    self._save(leaves, step, position, final=ended)
                elif self.local and self.local.due(step):
                    self._save_locally(self.local, leaves, step, position)
                if self.evaluate and self._eval_due(step):
                    cut = not self._evaluate(leaves, step, self.evaluate)
                if self.saver.check():
                    # The launcher asks for a stop so early that another save fits.
                    report_progress(step, "step", save_seconds=self.saver.last_save_seconds)
                    if self.local:
                        self.local.committed(self.saver.good_step)
            stopped = step < self.num_steps
            if stopped and step > first:
                self._save_in_time(leaves, step, position)
        return Ended(leaves, step, stopped or cut)

    def _next_batch(self, step: int) -> Any:
        """The next batch; None if it came to a stop while it was waited for."""
        report_progress(step, "data")
        try:
            with self.stop.waiting():
                batch = next(self.batches)
        except Stopped:
            batch = None
        report_progress(step, "step")
        return batch

    def _save_in_time(self, leaves: Leaves, step: int, position: Any) -> None:
        """The last save of a stopped run, unless it would not be done before the process is killed.

        The time that the save before took is what is known; without one it is tried. What may not
        be done in time goes to the hosts' own storage, where that is to be had.
        """
        left, takes = self.stop.seconds_left(), self.saver.last_save_seconds
        # One that is on its way is waited for first.
        needed = (takes or 0.0) * _SLOWER * (2 if self.saver.saving else 1)
        fits = left is None or takes is None or needed < left
        certain = left is None or (takes is not None and fits)
        fits, certain = broadcast("stop/save", (fits, certain))
        if not fits:
            say(
                f"told to stop with {left or 0:.0f} s left, and the last save took "
                f"{takes or 0:.1f} s: no other is begun"
            )
        if self.local and not certain:
            self._save_locally(self.local, leaves, step, position)
        if fits:
            self._save(leaves, step, position, final=True)
            return
        self.reporter.flush()
        self.saver.wait()

    def _save(self, leaves: Leaves, step: int, position: dict, final: bool) -> None:
        # A state whose loss is not finite must never become the newest checkpoint.
        self.reporter.flush()
        report_progress(step, "save")
        state = self.layout.as_dict(leaves)
        self.reporter.spent_saving(self.saver.save(step, state, position, final=final))
        report_progress(step, "step")

    def _check_replicas(self, step: int, leaves: Leaves) -> None:
        try:
            self.replicas.check(step, leaves)
        except ReplicaError:
            if self.local:
                self.local.distrust()  # The next attempt would begin with it.
            raise

    def _save_locally(
        self, local: LocalCheckpoints, leaves: Leaves, step: int, position: Any
    ) -> None:
        self.reporter.flush()
        report_progress(step, "save")
        began = time.perf_counter()
        local.save(step, self.layout.as_dict(leaves), position)
        self.reporter.spent_saving(time.perf_counter() - began)
        report_progress(step, "step")

    def _eval_due(self, step: int) -> bool:
        every = self.eval_every_steps
        return every > 0 and (step % every == 0 or step == self.num_steps)

    def _evaluate(self, leaves: Leaves, step: int, evaluate: Callable[[Leaves], float]) -> bool:
        """Whether it came to its end."""
        self.reporter.flush()
        report_progress(step, "eval")
        try:
            with self.reporter.not_stepping():
                self.reporter.evaluated(step, evaluate(leaves))
        except Stopped:
            return False
        report_progress(step, "step")
        return True


@dataclasses.dataclass(frozen=True)
class Ended:
    """How a loop ended: the state, the step it is at, and whether it was told to stop early."""

    leaves: Leaves
    step: int
    stopped: bool
