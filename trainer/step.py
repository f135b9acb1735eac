"""One optimizer update, from the state's leaves to the state's leaves, compiled ahead of time.

Modules are put together from the leaves and taken apart again while the step is traced. What is
called in the loop is a compiled function over a flat list of arrays, which costs the host nothing
more than XLA's own call (`nnx.jit`: 69 ms a step more for a model of 32 layers).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.flatten_util import ravel_pytree
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from launch.spec import BATCH_AXES
from trainer import compile_cache, target
from trainer.task import Batch, Loss, Task
from trainer.transforms import SkipState, find_state

if TYPE_CHECKING:
    from trainer.state import StateLayout

Metrics = dict[str, jax.Array]
TrainStep = Callable[[Sequence[jax.Array], Batch], tuple[list[jax.Array], Metrics]]
PureLoss = Callable[[Any, Any, Batch], tuple[jax.Array, tuple[jax.Array, Any]]]

_BATCHES = P(None, BATCH_AXES)  # Of arrays [M, B / M, ...]: each microbatch is split as the batch.


def make_train_step(
    task: Task,
    layout: StateLayout,
    *,
    num_microbatches: int = 1,
    one_all_reduce: bool | None = None,
) -> TrainStep:
    """Make the function (leaves, batch) -> (leaves, metrics) of one update; not yet compiled.

    The gradient is that of the mean loss over the global batch, however it is split.

    Args:
      task: whose loss to descend.
      layout: how the leaves make up the model and the optimizer.
      num_microbatches: parts the batch is run in, one after the other, to save memory. Each is
        split over the mesh like the whole batch, whose size it must divide.
      one_all_reduce: reduce all gradients in one flat vector; see `_mean_reduced_at_once`. None:
        where it is possible and was measured to be quicker.

    Returns:
      The step. Its metrics are scalars: `loss`, the mean before the update, and `grad_norm`, the
      global norm before clipping, float32; where the optimizer skips bad steps also the int32
      counters `skipped_nonfinite`, `skipped_spikes` and `skipped_in_a_row`.
    """

    def step(leaves: Sequence[jax.Array], batch: Batch) -> tuple[list[jax.Array], Metrics]:
        model, optimizer = layout.merge(leaves)
        model.train()
        loss = _pure_loss(task, model, optimizer.wrt)
        _, params, rest = nnx.split(model, optimizer.wrt, ...)
        at_once = one_all_reduce
        if at_once is None:
            devices = list(layout.mesh.devices.flat)
            processes = len({device.process_index for device in devices})
            at_once = reduces_at_once(layout, devices[0].platform, processes)
        elif at_once and jax.tree.leaves(rest):
            raise ValueError("one_all_reduce: the model has state besides its parameters")
        batches = _microbatches(batch, num_microbatches)
        batches = jax.lax.with_sharding_constraint(batches, NamedSharding(layout.mesh, _BATCHES))
        if at_once:
            mean, new_rest = _mean_reduced_at_once(loss, params, rest, batches, layout.mesh), rest
        else:
            shardings = jax.tree.unflatten(jax.tree.structure(params), layout.gradients)
            mean, new_rest = _mean(loss, params, rest, batches, shardings=shardings)
        metrics = {
            "loss": mean.loss,
            "grad_norm": optax.tree.norm(mean.grads).astype(jnp.float32),
        }

        def loss_of(params: Any) -> jax.Array:
            return _mean_loss(loss, params, rest, batches)

        # What some transformations want besides the gradients; it costs the others nothing.
        optimizer.update(model, mean.grads, value=mean.loss, grad=mean.grads, value_fn=loss_of)
        skipping = find_state(nnx.as_pure(optimizer.opt_state), SkipState)
        if skipping is not None:
            new_rest = _unless(skipping.in_a_row > 0, rest, new_rest)
            metrics |= {
                "skipped_nonfinite": skipping.nonfinite,
                "skipped_spikes": skipping.spikes,
                "skipped_in_a_row": skipping.in_a_row,
            }
        nnx.update(model, new_rest)
        return layout.leaves_of(model, optimizer), metrics

    return step


def compile_train_step(
    step: TrainStep,
    layout: StateLayout,
    batch: Mapping[str, jax.ShapeDtypeStruct],
    check: Callable[[jax.stages.Lowered], None] = lambda lowered: None,
    compiler_options: Mapping[str, Any] | None = None,
) -> jax.stages.Compiled:
    """Compile a train step for one shape of batch. It donates its leaves.

    What comes out is laid out as what went in, by decree: left to itself XLA moves small leaves
    about, and the second step would be another program.

    Args:
      step: from `make_train_step`.
      layout: of the leaves; its mesh may be of devices that are not there.
      batch: abstract arrays with their shardings, `P(BATCH_AXES)` on the first dim.
      check: sees the program before it is compiled.
      compiler_options: XLA's, beside those of the environment.
    """
    out_shardings = (list(layout.shardings), NamedSharding(layout.mesh, P()))
    return compile_step(
        step,
        layout,
        batch,
        out_shardings,
        check=check,
        compiler_options=compiler_options,
        donate_argnums=0,
    )


def compile_step(
    step: Callable,
    layout: StateLayout,
    batch: Any,
    out_shardings: Any,
    *,
    check: Callable[[jax.stages.Lowered], None] = lambda lowered: None,
    compiler_options: Mapping[str, Any] | None = None,
    **jit_options: Any,
) -> jax.stages.Compiled:
    """Compile a function (leaves, batch) -> anything, ahead of time, on the layout's mesh.

    `check` sees the program before it is compiled.
    """
    jitted = jax.jit(step, out_shardings=out_shardings, **jit_options)
    # The mesh in context is for models that pin their activations. It must not make NNX shard
    # variables on its own account while modules are put together.
    with (
        nnx.use_eager_sharding(False),
        jax.sharding.use_abstract_mesh(layout.mesh.abstract_mesh),
        target.tracing_for(layout.mesh, layout.rules),
    ):
        lowered = jitted.lower(list(layout.abstract), batch)
    check(lowered)
    with compile_cache.written_by_all():
        return lowered.compile(compiler_options)


class _Mean(NamedTuple):
    """The mean over a batch, or what a part of the batch adds to it.

    Attributes:
      grads: gradient of the mean loss, a State like the trained parameters.
      loss: scalar float32.
    """

    grads: Any
    loss: jax.Array


def _pure_loss(task: Task, model: Any, wrt: Any) -> PureLoss:
    """The task's loss as a function (params, rest, batch) -> (total, (weight, rest after)).

    `params` is what `wrt` selects of the model's state; `rest` is what else there is: streams of
    random numbers, batch statistics.
    """
    graphdef, _, _ = nnx.split(model, wrt, ...)

    def loss(params: Any, rest: Any, batch: Batch) -> tuple[jax.Array, tuple[jax.Array, Any]]:
        # Variables of this trace's own: others may not be written to here (Dropout's RNG count).
        model = nnx.merge(graphdef, params, rest, copy=True)
        total, weight = as_loss(task, task.loss(model, batch), batch)
        nnx.pop(model, nnx.Intermediate)  # What modules have sown is not part of the state.
        _, _, rest = nnx.split(model, wrt, ...)
        return total, (weight, rest)

    return loss


def as_loss(task: Task, value: Loss | jax.Array, batch: Batch) -> Loss:
    """What a task's loss returned as a float32 Loss; a scalar is the mean over B examples."""
    if not isinstance(value, Loss):
        if jnp.shape(value) != ():
            raise TypeError(
                f"{type(task).__name__}.loss returned shape {jnp.shape(value)}; it must return a "
                "scalar (the mean over the batch's examples) or trainer.task.Loss(total, weight)"
            )
        num_examples = jax.tree.leaves(batch)[0].shape[0]
        value = Loss(value * num_examples, num_examples)
    total, weight = (jnp.asarray(part, jnp.float32) for part in value)
    return Loss(total, jax.lax.stop_gradient(weight))


def _microbatches(batch: Batch, num: int) -> Batch:
    """[B, ...] as [num, B / num, ...]; microbatch m has rows m, m + num, m + 2 num, ...

    So every device has its share of each microbatch already: none of its rows move.
    """

    def split(x: jax.Array) -> jax.Array:
        return jnp.swapaxes(x.reshape(x.shape[0] // num, num, *x.shape[1:]), 0, 1)

    return jax.tree.map(split, batch)


def _mean(
    loss: PureLoss,
    params: Any,
    rest: Any,
    batches: Batch,
    *,
    shardings: Any = None,
    over_mesh: Callable[[jax.Array], jax.Array] = lambda weight: weight,
) -> tuple[_Mean, Any]:
    """The mean loss over all microbatches and its gradient, and the rest of the model after them.

    Args:
      loss: from `_pure_loss`.
      params, rest: its arguments; `rest` passes from one microbatch to the next.
      batches: arrays [M, B / M, ...].
      shardings: of the gradients, like `params`; None leaves them to XLA.
      over_mesh: makes the weight of these examples that of the whole batch, where these are only
        a part of it; the result is then what they add to the whole batch's mean.
    """

    def pin(grads: Any) -> Any:
        return grads if shardings is None else jax.lax.with_sharding_constraint(grads, shardings)

    if jax.tree.leaves(batches)[0].shape[0] == 1:
        batch = jax.tree.map(lambda x: x[0], batches)
        total, pull_back, (weight, rest) = jax.vjp(
            lambda params: loss(params, rest, batch), params, has_aux=True
        )
        weight = over_mesh(weight)
        # Dividing here costs nothing. Dividing the gradients is a pass over as much memory as the
        # parameters take, 3% of a step on CPU.
        (grads,) = pull_back(1.0 / weight)
        return _Mean(pin(grads), total / weight), rest

    def add(carry: tuple[Any, ...], batch: Batch) -> tuple[tuple[Any, ...], None]:
        so_far, rest = carry
        (total, (weight, rest)), grads = jax.value_and_grad(loss, has_aux=True)(params, rest, batch)
        more = (pin(grads), total, weight)
        return (jax.tree.map(lambda a, b: a + b.astype(a.dtype), so_far, more), rest), None

    def zeros(p: jax.Array) -> jax.Array:
        return jnp.zeros(p.shape, jnp.promote_types(p.dtype, jnp.float32))

    zero = jnp.zeros((), jnp.float32)
    sums = (pin(jax.tree.map(zeros, params)), zero, zero)
    ((grads, total, weight), rest), _ = jax.lax.scan(add, (sums, rest), batches)
    weight = over_mesh(weight)
    grads = jax.tree.map(lambda g, p: (g / weight).astype(p.dtype), grads, params)
    return _Mean(grads, total / weight), rest


def _mean_loss(loss: PureLoss, params: Any, rest: Any, batches: Batch) -> jax.Array:
    """The mean loss over all microbatches with other params, scalar float32."""

    def add(carry: tuple[jax.Array, ...], batch: Batch) -> tuple[tuple[jax.Array, ...], None]:
        total, (weight, _) = loss(params, rest, batch)
        return (carry[0] + total, carry[1] + weight), None

    zero = jnp.zeros((), jnp.float32)
    (total, weight), _ = jax.lax.scan(add, (zero, zero), batches)
    return total / weight


def _unless(skipped: jax.Array, old: Any, new: Any) -> Any:
    """The model's other state after a step: what a skipped one wrote could hold a NaN.

    Counters and streams of random numbers move on all the same.
    """

    def choose(old: jax.Array, new: jax.Array) -> jax.Array:
        floats = jnp.issubdtype(new.dtype, jnp.inexact)
        return jnp.where(skipped, old, new) if floats else new

    return jax.tree.map(choose, old, new)


def reduces_at_once(layout: StateLayout, platform: str, num_processes: int) -> bool:
    """Whether `_mean_reduced_at_once` works for a gang of so many processes, and pays."""
    if platform != "cpu" or num_processes == 1:
        return False
    rest = any(name.startswith("model.") and name not in layout.params for name in layout.names)
    return not rest and all(where.is_fully_replicated for where in layout.shardings)


def _mean_reduced_at_once(
    loss: PureLoss, params: Any, rest: Any, batches: Batch, mesh: Mesh
) -> _Mean:
    """`_mean` of a replicated model, reduced over the mesh as one flat vector.

    XLA's CPU backend reduces each gradient on its own, one call through gloo after the other: two
    processes were 1.61 times as fast as one that way, and 1.88 times with a single all-reduce.

    Not for a model with other state than parameters: each shard would draw the same dropout masks
    and keep batch statistics of its own.
    """

    def local(params: Any, batches: Batch) -> _Mean:
        mean, _ = _mean(loss, params, rest, batches, over_mesh=reduce)
        flat, unravel = ravel_pytree(mean)
        return unravel(reduce(flat))

    def reduce(x: jax.Array) -> jax.Array:
        return jax.lax.psum(x, BATCH_AXES)

    # check_vma=False: tracking what varies over the mesh would reduce each gradient where it is
    # made (the parameters do not vary), and would refuse many a scan in users' models.
    return jax.shard_map(
        local, mesh=mesh, in_specs=(P(), _BATCHES), out_specs=P(), check_vma=False
    )(params, batches)
