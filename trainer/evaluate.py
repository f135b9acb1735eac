"""The held-out loss: of the trained params, or of others that the optimizer keeps."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from launch.spec import TrainSpec
from trainer.data.feed import Feed
from trainer.preemption import Stopped, StopSignal
from trainer.state import Leaves, StateLayout
from trainer.step import as_loss, compile_step
from trainer.task import Batch, Loss, Task
from trainer.transforms import eval_params

EvalStep = Callable[[Sequence[jax.Array], Batch], Loss]


def make_evaluate(
    spec: TrainSpec,
    task: Task,
    layout: StateLayout,
    stop: StopSignal,
    through: Callable[[Iterator[Batch]], Iterator[Batch]] = iter,
) -> Callable[[Leaves], float] | None:
    """Mean loss over the first `eval.num_batches` held-out batches; None without any.

    The evaluation step is compiled at its first use. What is returned raises Stopped, on all
    processes alike, where `stop` says so before a batch. The batches go `through` a function.
    """
    dataset = task.eval_data() if spec.eval.every_steps else None
    if dataset is None:
        return None
    compiled: list[Any] = []

    def evaluate(leaves: Leaves) -> float:
        feed = Feed(dataset, spec.global_batch_size, layout.mesh, "held-out data", endless=False)
        try:
            if not compiled:
                step = make_eval_step(task, layout, spec.eval.params)
                compiled.append(compile_eval_step(step, layout, feed.abstract()))
            batches = itertools.islice(until_stopped(feed, stop), spec.eval.num_batches)
            return mean_loss(compiled[0], leaves, through(batches))
        finally:
            feed.close()

    return evaluate


def until_stopped(batches: Iterator[Any], stop: StopSignal) -> Iterator[Any]:
    """The batches, each begun as a unit of its own; raises Stopped."""
    while True:
        with stop.waiting():
            batch = next(batches, None)
        if batch is None:
            return
        if stop.begin():
            raise Stopped
        yield batch


def make_eval_step(task: Task, layout: StateLayout, params: str = "params") -> EvalStep:
    """Make the function (leaves, batch) -> Loss of the model in evaluation mode; not compiled.

    Args:
      task: whose loss to compute.
      layout: how the leaves make up the model and the optimizer.
      params: whose, as in `config.eval.params`.
    """

    def step(leaves: Sequence[jax.Array], batch: Batch) -> Loss:
        model = model_for_eval(layout, leaves, params)
        return as_loss(task, task.loss(model, batch), batch)

    return step


def model_for_eval(layout: StateLayout, leaves: Sequence[Any], params: str) -> Any:
    """The model in evaluation mode with the params asked for; meant for use under jit.

    Raises:
      ConfigError: the optimizer keeps no such params.
    """
    model, optimizer = layout.merge(leaves)
    if params != "params":
        trained = nnx.as_pure(nnx.state(model, optimizer.wrt))
        nnx.update(model, eval_params(params, trained, nnx.as_pure(optimizer.opt_state)))
    model.eval()
    return model


def compile_eval_step(
    step: EvalStep, layout: StateLayout, batch: Mapping[str, jax.ShapeDtypeStruct]
) -> jax.stages.Compiled:
    """Compile an evaluation step for one shape of batch. It leaves its leaves alone."""
    return compile_step(step, layout, batch, NamedSharding(layout.mesh, P()))


def mean_loss(
    eval_step: Callable[[Leaves, Any], tuple[jax.Array, jax.Array]],
    leaves: Leaves,
    batches: Iterator[Any],
) -> float:
    """Mean loss over some batches: sum of totals over sum of weights, read once at the end."""
    sums = [eval_step(leaves, batch) for batch in batches]
    totals, weights = zip(*jax.device_get(sums), strict=True)
    return float(sum(totals) / sum(weights))
