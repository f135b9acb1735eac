"""The training loop. It dispatches a step, and reads the metrics of the one before."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from launch.contract import report_progress
from trainer.checkpoint import Checkpointer
from trainer.data.feed import Feed
from trainer.report import Reporter
from trainer.state import Leaves, StateLayout


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
      reporter: metrics.
      stop_agreed: whether all processes stop after this step. Collective.
      evaluate: leaves -> mean held-out loss; None without held-out data. Collective.
    """

    layout: StateLayout
    num_steps: int
    log_every_steps: int
    eval_every_steps: int
    train_step: Callable[[Leaves, Any], tuple[Leaves, Any]] | None
    batches: Feed
    saver: Checkpointer
    reporter: Reporter
    stop_agreed: Callable[[int], bool]
    evaluate: Callable[[Leaves], float] | None

    def run(self, leaves: Leaves, step: int) -> Ended:
        """Train from `step` to `num_steps`, or until a stop is agreed.

        Collective: every process must call this, with the same step.

        Returns:
          The state after the last step, which has been handed to the saver.
        """
        if self.train_step is None:
            return Ended(leaves, step, stopped=False)
        batch, stopped = self._next_batch(step), False
        # Any transfer that nobody asked for by name would stall the queue of dispatched steps.
        with jax.transfer_guard("disallow"):
            while step < self.num_steps and not stopped:
                leaves, metrics = self.train_step(leaves, batch)
                step += 1
                # What a resume needs: the position behind this step's batch, read before the next
                # batch is fetched while the device is busy.
                position = self.batches.position()
                if step < self.num_steps:
                    batch = self._next_batch(step)
                self.reporter.add(step, metrics, self.batches.wait_seconds)
                stopped = self.stop_agreed(step)
                ended = stopped or step == self.num_steps
                if ended or self.saver.due(step, logging_step=step % self.log_every_steps == 0):
                    self._save(leaves, step, position, final=ended)
                if self.evaluate and self._eval_due(step) and not stopped:
                    self._evaluate(leaves, step, self.evaluate)
                if self.saver.check():
                    # The launcher asks for a stop so early that another save fits.
                    report_progress(step, "step", save_seconds=self.saver.last_save_seconds)
        return Ended(leaves, step, stopped)

    def _next_batch(self, step: int) -> Any:
        report_progress(step, "data")
        batch = next(self.batches)
        report_progress(step, "step")
        return batch

    def _save(self, leaves: Leaves, step: int, position: dict, final: bool) -> None:
        # A state whose loss is not finite must never become the newest checkpoint.
        self.reporter.flush()
        report_progress(step, "save")
        state = self.layout.as_dict(leaves)
        self.reporter.spent_saving(self.saver.save(step, state, position, final=final))
        report_progress(step, "step")

    def _eval_due(self, step: int) -> bool:
        every = self.eval_every_steps
        return every > 0 and (step % every == 0 or step == self.num_steps)

    def _evaluate(self, leaves: Leaves, step: int, evaluate: Callable[[Leaves], float]) -> None:
        self.reporter.flush()
        report_progress(step, "eval")
        with self.reporter.not_stepping():
            self.reporter.evaluated(step, evaluate(leaves))
        report_progress(step, "step")


@dataclasses.dataclass(frozen=True)
class Ended:
    """How a loop ended: the state, the step it is at, and whether it was told to stop early."""

    leaves: Leaves
    step: int
    stopped: bool
