"""One training, from top to bottom: mesh, state, data, restore, compile, loop, finish."""

from __future__ import annotations

import contextlib
import json
import os
import time
from typing import Any

import jax

from launch import contract
from launch.spec import TrainSpec
from launch.topology import peak_flops
from trainer import certify, distributed, storage
from trainer.checkpoint import Checkpointer
from trainer.data.feed import Feed
from trainer.distributed import say
from trainer.evaluate import make_evaluate
from trainer.finish import finish
from trainer.loop import Loop
from trainer.mesh import make_mesh
from trainer.metrics import Throughput
from trainer.optimizer import Optimizer
from trainer.preemption import StopSignal
from trainer.prepare import prepare
from trainer.report import Output, Reporter
from trainer.schedules import remarks
from trainer.state import Leaves, StateLayout, init_state
from trainer.step import compile_train_step, make_train_step
from trainer.task import Task
from trainer.unison import check_program


def train(spec: TrainSpec, task: Task, workdir: str, config: dict[str, Any]) -> int:
    """Train until `spec.num_steps` or until told to stop; resumes what `workdir` holds.

    Collective: every process of the gang must call this, after `distributed.initialize`.

    Args:
      spec: resolved for the number of devices.
      task: the model, its loss and its data.
      workdir: the run directory, on a file system that all processes share or on GCS.
      config: the resolved config as plain JSON, for the records.

    Returns:
      The exit code: EXIT_DONE, or EXIT_RESUMABLE when stopped early with a checkpoint.
    """
    probe = certify.asked_for()  # None, unless `muster certify` runs this.
    if probe:
        spec = probe.shortened(spec)

    # ------------------------------------------------------------------ mesh and state's layout
    mesh = make_mesh(spec.mesh)
    optimizer, layout, ledger, notes = prepare(spec, task, mesh)
    say(ledger.as_text())
    if distributed.is_lead():
        for line in [*notes, *remarks(optimizer.schedules, spec.num_steps)]:
            say(line)

    # ------------------------------------------------------------------ data
    feed = Feed(task.train_data(spec.seed), spec.global_batch_size, mesh, "training data")
    if distributed.is_lead() and (text := task.describe()):
        say(text)

    # ------------------------------------------------------------------ records
    # First: where nothing can be written, all processes say so together.
    saver = Checkpointer(
        os.path.join(workdir, contract.CHECKPOINTS), spec.checkpoint, config=config
    )
    if distributed.is_lead():
        _write_json(workdir, contract.CONFIG_RECORD, {"schema": contract.SCHEMA, **config})
        _write_json(workdir, contract.LEDGER_RECORD, ledger.as_record())

    # ------------------------------------------------------------------ restore, or a fresh state
    if probe:
        probe.restoring(saver, feed)
    step, leaves = restore_or_init(saver, layout, feed)
    if probe:
        probe.restored(step, leaves, layout, optimizer, task)

    # ------------------------------------------------------------------ compile
    contract.report_progress(step, "compile")
    train_step = None
    if step < spec.num_steps:
        began = time.monotonic()
        update = make_train_step(task, layout, num_microbatches=spec.num_microbatches)
        check = probe.compiling(check_program) if probe else check_program
        train_step = compile_train_step(update, layout, feed.abstract(), check=check)
        say(f"compiled the training step in {time.monotonic() - began:.1f} s")
    else:
        say(f"already at step {step}: --config.num_steps={2 * step}, say, trains on")

    # ------------------------------------------------------------------ loop
    output = Output(workdir, step) if distributed.is_lead() else None
    # What is logged up to a step must not be lost when that step is resumed from.
    saver.before_commit = output.flush if output else None
    reporter = make_reporter(spec, task, layout, optimizer, output)
    evaluate = make_evaluate(spec, task, layout, probe.evaluating if probe else iter)
    if probe:
        train_step = probe.looping(train_step, feed, saver)
    with StopSignal() as stop, output or contextlib.nullcontext():
        loop = Loop(
            layout=layout,
            num_steps=spec.num_steps,
            log_every_steps=spec.log_every_steps,
            eval_every_steps=spec.eval.every_steps,
            train_step=train_step,
            batches=feed,
            saver=saver,
            reporter=reporter,
            stop_agreed=stop.agreed,
            evaluate=evaluate,
        )
        ended = loop.run(leaves, step)

    # ------------------------------------------------------------------ finish
    contract.report_progress(ended.step, "eval")
    if ended.stopped:
        say(f"told to stop: step {ended.step} is saved, the same command resumes from it")
    else:
        loss = reporter.last_eval_loss
        say(f"done at step {ended.step}" + (f": {task.verdict(loss)}" if loss is not None else ""))
        if not probe:  # What is shown at the end proves nothing.
            finish(task, layout, ended.leaves, spec.eval.params, spec.seed)
    say(f"checkpoints: {saver.directory}")
    say(f"metrics and TensorBoard events: {workdir}")
    contract.report_progress(ended.step, "save")
    saver.close()  # Waits for what is still being written.
    feed.close()
    return contract.EXIT_RESUMABLE if ended.stopped else contract.EXIT_DONE


def restore_or_init(saver: Checkpointer, layout: StateLayout, feed: Feed) -> tuple[int, Leaves]:
    """The newest usable checkpoint, or a fresh state where the run has none. Collective."""
    contract.report_progress(0, "restore")
    restored = saver.restore(layout.as_dict(layout.abstract))
    if restored is None:
        return 0, init_state(layout)
    feed.restore(restored.data_position)
    say(f"resumed from step {restored.step} ({saver.directory / str(restored.step)})")
    return restored.step, layout.from_dict(restored.state)


def make_reporter(
    spec: TrainSpec, task: Task, layout: StateLayout, optimizer: Optimizer, output: Output | None
) -> Reporter:
    """A Reporter for this run; it writes where there is an output."""
    model, _ = layout.merge(layout.abstract)
    flops = task.flops_per_example(model)
    throughput = Throughput(
        num_steps=spec.num_steps,
        tokens_per_step=spec.global_batch_size * task.tokens_per_example(),
        flops_per_step=flops * spec.global_batch_size if flops else None,
        peak_flops_per_device=peak_flops(jax.devices()[0].device_kind),
        num_devices=layout.mesh.devices.size,
    )
    return Reporter(
        output,
        throughput,
        log_every_steps=spec.log_every_steps,
        num_steps=spec.num_steps,
        learning_rate=optimizer.learning_rate,
        group_rates={name: rate for name, rate in optimizer.learning_rates.items() if name},
        max_skipped=optimizer.skip.max_in_a_row if optimizer.skip else None,
    )


def _write_json(workdir: str, name: str, record: dict[str, Any]) -> None:
    text = json.dumps(record, indent=2, sort_keys=True)
    storage.write_text(os.path.join(workdir, name), text + "\n")
