"""One training, from top to bottom: mesh, state, data, restore, compile, loop, finish."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax

from launch import contract
from launch.spec import TrainSpec
from launch.topology import peak_flops
from trainer import certify, distributed, fingerprint, storage
from trainer.checkpoint import Checkpointer
from trainer.data.feed import Feed
from trainer.data.index import keep_in
from trainer.data.refusals import training_data
from trainer.data.same import check_gang
from trainer.distributed import say
from trainer.evaluate import make_evaluate
from trainer.finish import finish
from trainer.local_checkpoints import LocalCheckpoints
from trainer.local_resume import begin_locally
from trainer.loop import Loop
from trainer.mesh import make_mesh
from trainer.metrics import Throughput
from trainer.optimizer import Optimizer
from trainer.preemption import StopSignal
from trainer.prepare import prepare
from trainer.replicas import ReplicaCheck
from trainer.report import Output, Reporter
from trainer.resume import OPTIMIZER_BEGAN, Resume
from trainer.schedules import remarks
from trainer.state import StateLayout
from trainer.step import compile_train_step, make_train_step
from trainer.task import Task
from trainer.unison import check_program


def train(
    spec: TrainSpec, task: Task, workdir: str, config: dict[str, Any], stop: StopSignal
) -> int:
    """Train until `spec.num_steps` or until told to stop; resumes what `workdir` holds.

    Collective: every process of the gang must call this, after `distributed.initialize`.

    Args:
      spec: resolved for the number of devices.
      task: the model, its loss and its data.
      workdir: the run directory, on a file system that all processes share or on GCS.
      config: the resolved config as plain JSON, for the records.
      stop: that this process has joined its gang with.

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
    index = None if storage.is_remote(workdir) else os.path.join(workdir, contract.DATA_INDEX)
    keep_in(index, alive=lambda: contract.report_progress(0, "init"))
    feed = Feed(training_data(task, spec.seed), spec.global_batch_size, mesh, "training data")
    evaluate = make_evaluate(spec, task, layout, stop, probe.evaluating if probe else iter)
    contract.report_progress(0, "init")
    check_gang(feed.identity)
    if distributed.is_lead() and (text := task.describe()):
        say(text)

    # ------------------------------------------------------------------ records
    # First: where nothing can be written, all processes say so together.
    software = {"code": fingerprint.of_task(task), "versions": fingerprint.versions()}
    saver = Checkpointer(
        os.path.join(workdir, contract.CHECKPOINTS),
        spec.checkpoint,
        config=config,
        record={**software, "params": sorted(layout.params)},
    )
    if distributed.is_lead():
        _write_json(workdir, contract.LEDGER_RECORD, ledger.as_record())

    # ------------------------------------------------------------------ restore, or a fresh state
    contract.report_progress(0, "restore")
    if probe:
        probe.restoring(saver, feed)
    record = {"config": config, **software}
    local = None
    if spec.checkpoint.local_dir:
        local = LocalCheckpoints(spec.checkpoint, workdir, record)
    beginning = begin_locally(local, saver, layout) if local else None
    beginning = beginning or Resume(spec, workdir, record, layout).begin(saver)
    if local:
        local.keep(**{OPTIMIZER_BEGAN: beginning.optimizer_began})
    step, leaves = beginning.step, beginning.leaves
    if beginning.data_position is not None:
        other_data = allows_other_data(spec.restore.allow_change)
        for line in feed.restore(beginning.data_position, other_data=other_data):
            say(line)
    if distributed.is_lead():  # Not before: a config that is refused must leave no trace.
        _write_json(workdir, contract.CONFIG_RECORD, {"schema": contract.SCHEMA, **config})
    stop.step = step
    stop.standing = lambda: standing(saver, local, stop.step)
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
    if local:
        local.before_save = saver.before_commit
    reporter = make_reporter(spec, task, layout, optimizer, output, began=beginning.optimizer_began)
    if probe:
        train_step = probe.looping(train_step, feed, saver)
    with output or contextlib.nullcontext():
        loop = Loop(
            layout=layout,
            num_steps=spec.num_steps,
            log_every_steps=spec.log_every_steps,
            eval_every_steps=spec.eval.every_steps,
            train_step=train_step,
            batches=feed,
            saver=saver,
            local=local,
            reporter=reporter,
            replicas=ReplicaCheck(layout, spec.check_replicas_every_steps),
            stop=stop,
            evaluate=evaluate,
        )
        ended = loop.run(leaves, step)

    # ------------------------------------------------------------------ finish
    contract.report_progress(ended.step, "eval")
    if ended.stopped:
        kept = standing(saver, local, ended.step)
        say(f"told to stop: {kept}; the same command goes on from there")
    else:
        loss = reporter.last_eval_loss
        say(f"done at step {ended.step}" + (f": {task.verdict(loss)}" if loss is not None else ""))
        if not probe:  # What is shown at the end proves nothing.
            finish(task, layout, ended.leaves, spec.eval.params, spec.seed)
    say(f"checkpoints: {saver.directory}" + (f" ({saver.cost})" if saver.cost else ""))
    say(f"metrics and TensorBoard events: {workdir}")
    contract.report_progress(ended.step, "save")
    saver.close()  # Waits for what is still being written.
    if local:
        local.close(saver.good_step)
    stop.saved()
    feed.close()
    return contract.EXIT_RESUMABLE if ended.stopped else contract.EXIT_DONE


def allows_other_data(allow_change: Sequence[str]) -> bool:
    """Whether the user has named something that may make other examples, or put them in another
    order."""
    groups = {name.partition(".")[0] for name in allow_change}
    return bool(groups & {"data", "seed", "task", "code", "versions"})


def standing(saver: Checkpointer, local: LocalCheckpoints | None, step: int) -> str:
    """What is kept of a run that ends at `step`, and what is lost."""
    kept, where = saver.good_step, ""
    if local and local.kept and (kept is None or local.kept[0] > kept):
        kept, where = local.kept[0], " on the hosts' own storage"
    if kept is None:
        return f"nothing is saved yet, {step} steps are lost" if step else "nothing is lost"
    if kept >= step:
        return f"step {kept} is saved{where}"
    lost = step - kept
    return f"step {kept} is kept{where}, {lost} step{'s are' if lost > 1 else ' is'} lost"


def make_reporter(
    spec: TrainSpec,
    task: Task,
    layout: StateLayout,
    optimizer: Optimizer,
    output: Output | None,
    *,
    began: int,
) -> Reporter:
    """A Reporter for this run; it writes where there is an output.

    The optimizer's schedules count from the step at which it `began`.
    """

    def of_step(rate: Callable[[int], Any]) -> Callable[[int], Any]:
        return lambda count: rate(count - began)

    rate, rates = optimizer.learning_rate, optimizer.learning_rates
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
        learning_rate=of_step(rate) if rate else None,
        group_rates={name: of_step(rates[name]) for name in rates if name},
        max_skipped=optimizer.skip.max_in_a_row if optimizer.skip else None,
    )


def _write_json(workdir: str, name: str, record: dict[str, Any]) -> None:
    text = json.dumps(record, indent=2, sort_keys=True)
    storage.write_text(os.path.join(workdir, name), text + "\n")
