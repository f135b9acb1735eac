"""One training, from top to bottom: mesh, state, data, restore, compile, loop, finish."""

from __future__ import annotations

import itertools
import json
import os
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from launch import contract
from launch.spec import TrainSpec
from launch.topology import peak_flops
from trainer import distributed
from trainer.checkpoint import Checkpointer
from trainer.data.feed import Feed
from trainer.ledger import check_replication, make_ledger
from trainer.loop import Ended, Loop, mean_loss
from trainer.mesh import make_mesh, replicated
from trainer.metrics import Throughput
from trainer.optimizer import Optimizer, make_optimizer
from trainer.preemption import StopSignal
from trainer.report import Output, Reporter
from trainer.sharding import make_rules
from trainer.state import Leaves, StateLayout, init_state, make_layout
from trainer.step import (
    compile_eval_step,
    compile_train_step,
    make_eval_step,
    make_train_step,
)
from trainer.task import Task

# A larger model is not gathered onto one device for `Task.finish`.
FINISH_BYTES = 1 << 30


def train(spec: TrainSpec, task: Task, workdir: str, config: dict[str, Any]) -> int:
    """Train until `spec.num_steps` or until told to stop; resumes what `workdir` holds.

    Collective: every process of the gang must call this, after `distributed.initialize`.

    Args:
      spec: resolved for the number of devices.
      task: the model, its loss and its data.
      workdir: the run directory, on a file system that all processes share.
      config: the resolved config as plain JSON, for the records.

    Returns:
      The exit code: EXIT_DONE, or EXIT_RESUMABLE when stopped early with a checkpoint.
    """
    # ------------------------------------------------------------------ mesh and state's layout
    contract.report_progress(0, "init")
    mesh = make_mesh(spec.mesh)
    rules = make_rules(spec.sharding.rules, mesh)
    optimizer = make_optimizer(spec.optimizer)
    layout = make_layout(task, optimizer.tx, mesh, rules, spec.seed)
    ledger = make_ledger(layout)
    check_replication(ledger, spec.sharding.max_replicated_bytes)
    say(ledger.as_text())

    # ------------------------------------------------------------------ data
    feed = Feed(task.train_data(spec.seed), spec.global_batch_size, mesh, "training data")
    if distributed.is_lead() and (text := task.describe()):
        say(text)

    # ------------------------------------------------------------------ records
    if distributed.is_lead():
        os.makedirs(workdir, exist_ok=True)
        _write_json(workdir, contract.CONFIG_RECORD, {"schema": contract.SCHEMA, **config})
        _write_json(workdir, contract.LEDGER_RECORD, ledger.as_record())

    # ------------------------------------------------------------------ restore, or a fresh state
    saver = Checkpointer(
        os.path.join(workdir, contract.CHECKPOINTS), spec.checkpoint, config=config
    )
    step, leaves = restore_or_init(saver, layout, feed)

    # ------------------------------------------------------------------ compile
    contract.report_progress(step, "compile")
    train_step = None
    if step < spec.num_steps:
        began = time.monotonic()
        update = make_train_step(task, layout, num_microbatches=spec.num_microbatches)
        train_step = compile_train_step(update, layout, feed.abstract())
        say(f"compiled the training step in {time.monotonic() - began:.1f} s")
    else:
        say(f"already at step {step}: --config.num_steps={2 * step}, say, trains on")

    # ------------------------------------------------------------------ loop
    output = Output(workdir, step) if distributed.is_lead() else None
    reporter = make_reporter(spec, task, layout, optimizer, output)
    evaluate = make_evaluate(spec, task, layout)
    with StopSignal() as stop:
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
    if output:
        output.close()

    # ------------------------------------------------------------------ finish
    if ended.stopped:
        say(f"told to stop: step {ended.step} is saved, the same command resumes from it")
    else:
        finish(task, layout, ended, reporter, spec.seed)
    say(f"checkpoints: {saver.directory}")
    say(f"metrics and TensorBoard events: {workdir}")
    saver.close()
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
    )


def make_evaluate(
    spec: TrainSpec, task: Task, layout: StateLayout
) -> Callable[[Leaves], float] | None:
    """Mean loss over the first `eval.num_batches` held-out batches; None without any.

    The evaluation step is compiled at its first use.
    """
    dataset = task.eval_data() if spec.eval.every_steps else None
    if dataset is None:
        return None
    compiled: list[Any] = []

    def evaluate(leaves: Leaves) -> float:
        feed = Feed(dataset, spec.global_batch_size, layout.mesh, "held-out data", endless=False)
        try:
            if not compiled:
                step = make_eval_step(task, layout)
                compiled.append(compile_eval_step(step, layout, feed.abstract()))
            batches = itertools.islice(feed, spec.eval.num_batches)
            return mean_loss(compiled[0], leaves, batches)
        finally:
            feed.close()

    return evaluate


def finish(task: Task, layout: StateLayout, ended: Ended, reporter: Reporter, seed: int) -> None:
    """Show what the task wants to show of the trained model. Collective.

    One device does it: in a loop that samples tokens, a sharded model would be gathered from all
    processes for every one of them.
    """
    if reporter.last_eval_loss is not None:
        say(f"done at step {ended.step}: {task.verdict(reporter.last_eval_loss)}")
    else:
        say(f"done at step {ended.step}")

    if type(task).finish is Task.finish:
        return
    model_bytes, _ = make_ledger(layout).group_bytes()["params"]
    if model_bytes > FINISH_BYTES:
        say(f"no sample: the model has {model_bytes} bytes, more than {FINISH_BYTES} on one device")
    else:
        model = gather_model(layout, ended.leaves)
        if distributed.is_lead():
            show_results(task, layout, model, seed)
    # Whoever left before the lead is done would wait for it in JAX's own, shorter, barrier.
    distributed.barrier("finish", timeout_seconds=600.0)


def gather_model(layout: StateLayout, leaves: Leaves) -> list[Any]:
    """The model's leaves whole, on one device of each process. Collective."""
    own = [name.startswith("model.") for name in layout.names]
    chosen = [leaf for leaf, keep in zip(leaves, own, strict=True) if keep]
    whole = jax.jit(list, out_shardings=replicated(layout.mesh))(chosen)
    here = iter([leaf.addressable_data(0) for leaf in whole])
    return [next(here) if keep else leaf for leaf, keep in zip(layout.abstract, own, strict=True)]


def show_results(task: Task, layout: StateLayout, leaves: list[Any], seed: int) -> None:
    """Let the task compute something with the model, on one device, and print it. Lead only.

    Args:
      leaves: from `gather_model`; the optimizer's are abstract.
    """
    arrays = {i: leaf for i, leaf in enumerate(leaves) if isinstance(leaf, jax.Array)}

    def run(arrays: dict[int, jax.Array], key: jax.Array) -> Any:
        model, _ = layout.merge([arrays.get(i, leaf) for i, leaf in enumerate(leaves)])
        model.eval()
        return task.finish(model, key)

    results = jax.jit(run)(arrays, jax.random.key(seed))
    if results is not None:
        print(task.show({name: np.asarray(value) for name, value in results.items()}), flush=True)


def say(text: str) -> None:
    """Print on the lead process only."""
    if distributed.is_lead():
        print(text, flush=True)


def _write_json(workdir: str, name: str, record: dict[str, Any]) -> None:
    text = json.dumps(record, indent=2, sort_keys=True)
    contract.write_atomically(os.path.join(workdir, name), text + "\n")
