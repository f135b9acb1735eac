"""What a loss takes forward and backward, read off its traces; nothing is compiled or computed."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from jax.interpreters import partial_eval
from jax.sharding import AxisType, Mesh

from launch.spec import AXES, MeshSpec, TrainSpec
from trainer import target
from trainer.prepare import prepare
from trainer.sharding import as_tuple
from trainer.state import StateLayout
from trainer.step import as_loss
from trainer.task import Task

_ROW = 64  # Elements that make up a row, at the least.
_CALLS = ("pjit", "jit", "custom_jvp_call", "closed_call", "core_call")
_NOT_POINTWISE = (
    *("dot_general", "conv_general_dilated", "gather", "scatter", "scatter-add", "sort"),
    *("cumsum", "cumprod", "cummax", "custom_call", "ragged_dot", "fft", "while"),
)


class Amount(NamedTuple):
    """Bytes or FLOPs, by whether `tensor` splits them."""

    split: float
    whole: float

    def over(self, tensor: int) -> float:
        """On each of so many devices."""
        return self.split / tensor + self.whole


class Trace(NamedTuple):
    """What the loss of one example takes, forward and backward.

    Attributes:
      kept: bytes from the forward pass for the backward.
      widest: bytes of the largest array, once.
      flops: of matmuls and convolutions, with what is computed again.
    """

    kept: Amount
    widest: Amount
    flops: Amount


NOTHING = Trace(Amount(0.0, 0.0), Amount(0.0, 0.0), Amount(0.0, 0.0))


class _Figures(NamedTuple):
    """Of one device, as in a Trace."""

    kept: float
    widest: float
    flops: float


def layout_on(device: Any, spec: TrainSpec, task: Task) -> StateLayout:
    """The layout of the train state on one device, which need not be here."""
    grid = np.asarray([device]).reshape((1,) * len(AXES))
    mesh = Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))
    alone = dataclasses.replace(spec, mesh=MeshSpec(1, 1, 1))
    return prepare(alone, task, mesh).layout


def trace(task: Task, layout: StateLayout) -> Trace:
    """Trace a task's loss and its gradient. Its model says what it keeps and computes again.

    Once more with all dims halved that `tensor` splits, as one of two devices has them: what is
    then smaller is what `tensor` splits. Of a model that does not go by its arrays' shapes all
    counts as whole.

    Args:
      task: the model and its loss.
      layout: of the state, on one device: whatever splits an array over a mesh is left to XLA or
        said by the model, and may hide what is kept.
    """
    one = _per_example(task, layout, halved=False)
    try:
        two = _per_example(task, layout, halved=True)
    except Exception:  # Whatever a model makes of shapes that it has not asked for.
        two = one
    return Trace(*(_apart(alone, half) for alone, half in zip(one, two, strict=True)))


def _apart(alone: float, half: float) -> Amount:
    split = min(alone, max(0.0, 2 * (alone - half)))
    return Amount(split, alone - split)


def _per_example(task: Task, layout: StateLayout, halved: bool) -> _Figures:
    """What grows with the number of examples; the rest is made of weights, and counted there."""
    one, two = (_traced(task, layout, number, halved) for number in (1, 2))
    return _Figures(two.kept - one.kept, two.widest / 2, two.flops - one.flops)


def _traced(task: Task, layout: StateLayout, number: int, halved: bool) -> _Figures:
    """What `number` examples take."""
    model, optimizer = layout.merge(layout.abstract)
    model.train()
    graphdef, params, rest = nnx.split(model, optimizer.wrt, ...)
    if halved:
        params = jax.tree.map(_half, params)
    batch = {
        name: jax.ShapeDtypeStruct((number, *one.shape), one.dtype)
        for name, one in task.example_spec().items()
    }

    def pull_back(params: Any, rest: Any, batch: Any) -> Any:
        def loss(params: Any) -> jax.Array:
            model = nnx.merge(graphdef, params, rest, copy=True)
            return as_loss(task, task.loss(model, batch), batch).total

        return jax.vjp(loss, params)[1]

    def gradient(params: Any, rest: Any, batch: Any) -> Any:
        return pull_back(params, rest, batch)(np.float32(1.0))

    # As `trainer.step.compile_step` has it.
    with (
        nnx.use_eager_sharding(False),
        jax.sharding.use_abstract_mesh(layout.mesh.abstract_mesh),
        target.tracing_for(layout.mesh, layout.rules),
    ):
        forward = jax.make_jaxpr(pull_back)(params, rest, batch).jaxpr
        whole = jax.make_jaxpr(gradient)(params, rest, batch).jaxpr
    # Without what nothing needs, as XLA compiles it (`trainer.models.layer_loop` leaves some).
    whole, _ = partial_eval.dce_jaxpr(whole, [True] * len(whole.outvars))
    # Weights' gradients, whole or a layer's, are counted with the weights.
    shapes = [tuple(leaf.shape) for leaf in jax.tree.leaves(params)]
    weights = {tuple(sorted(dims)) for shape in shapes for dims in (shape, shape[1:])}
    return _Figures(
        sum(_bytes(aval) for aval in _kept(forward)),
        max((_bytes(aval) for aval in _made(whole) if _dims(aval) not in weights), default=0.0),
        sum(times * _flops(equation) for equation, times in _equations(whole)),
    )


def _half(leaf: Any) -> Any:
    """A parameter as one of two devices along `tensor` has it."""
    entries = [as_tuple(entry) for entry in leaf.sharding.spec]
    entries += [()] * (len(leaf.shape) - len(entries))
    pairs = zip(leaf.shape, entries, strict=True)
    shape = [length // 2 if "tensor" in axes else length for length, axes in pairs]
    return jax.ShapeDtypeStruct(shape, leaf.dtype)


def _kept(forward: Any) -> list[Any]:
    """What XLA has to keep to have the residuals that a forward pass returns.

    Not arguments; and of several arrays that follow, element by element, from the same product
    (logits, their exponentials and a mask of them) that product alone: the others are computed
    again as part of what uses them.
    """
    made_by = {out: equation for equation in forward.eqns for out in equation.outvars}
    wanted = {out for out in forward.outvars if not _is_literal(out) and out in made_by}
    kept: dict[Any, None] = {}
    there = {*forward.invars, *forward.constvars}

    def roots(variable: Any, least: int, found: dict[Any, None]) -> None:
        """What is not there and cannot be computed element by element from what is."""
        if _is_literal(variable) or variable in there or variable in kept:
            return  # At hand.
        if variable.aval.size < least:
            return  # No more than the sums of rows.
        equation = made_by[variable]
        if not _is_pointwise(equation):
            found[variable] = None
            return
        for operand in equation.invars:
            roots(operand, least, found)

    for equation in forward.eqns:
        for out in equation.outvars:
            if out in wanted:
                found: dict[Any, None] = {}
                roots(out, out.aval.size // _ROW, found)
                cheaper = sum(_bytes(root.aval) for root in found) <= _bytes(out.aval)
                kept.update(found if cheaper else {out: None})
    return [variable.aval for variable in kept]


def _is_literal(variable: Any) -> bool:
    return hasattr(variable, "val")


def _bytes(aval: Any) -> float:
    if not hasattr(aval, "dtype") or jax.dtypes.issubdtype(aval.dtype, jax.dtypes.prng_key):
        return 0.0
    return float(math.prod(aval.shape) * aval.dtype.itemsize)


def _dims(aval: Any) -> tuple[int, ...]:
    """Lengths, in whatever order."""
    return tuple(sorted(getattr(aval, "shape", ())))


def _is_pointwise(equation: Any) -> bool:
    """Whether what an equation makes can be computed element by element, where it is used."""
    inner = list(_inner(equation))
    if inner:
        called = equation.primitive.name in _CALLS
        return called and all(_is_pointwise(one) for jaxpr in inner for one in jaxpr.eqns)
    most = max((math.prod(one.aval.shape) for one in equation.invars), default=0)
    makes = math.prod(equation.outvars[0].aval.shape)
    return makes >= most and equation.primitive.name not in _NOT_POINTWISE


def _equations(jaxpr: Any, times: float = 1.0) -> Iterator[tuple[Any, float]]:
    """The equations of a jaxpr and of those inside of it, and how often each runs."""
    for equation in jaxpr.eqns:
        yield equation, times
        repeated = times * equation.params.get("length", 1) if _is_scan(equation) else times
        for inner in () if equation.primitive.name == "pallas_call" else _inner(equation):
            yield from _equations(inner, repeated)


def _is_scan(equation: Any) -> bool:
    return equation.primitive.name == "scan"


def _inner(equation: Any) -> Iterator[Any]:
    """The jaxprs in an equation's parameters."""
    for value in equation.params.values():
        for one in value if isinstance(value, (tuple, list)) else (value,):
            jaxpr = getattr(one, "jaxpr", one)
            if hasattr(jaxpr, "eqns"):
                yield jaxpr


def _made(jaxpr: Any) -> Iterator[Any]:
    """What equations make; of a scan, what is inside of it: what it stacks is kept, and counted."""
    for equation, _ in _equations(jaxpr):
        if not _is_scan(equation):
            yield from (out.aval for out in equation.outvars)


def _flops(equation: Any) -> float:
    """Of a matmul or convolution, two for each product; of a kernel what it says of itself."""
    if equation.primitive.name == "pallas_call":
        return float(getattr(equation.params.get("cost_estimate"), "flops", 0.0))
    if equation.primitive.name == "dot_general":
        (contracted, _), _ = equation.params["dimension_numbers"]
        left = equation.invars[0].aval.shape
        return (
            2.0
            * math.prod(equation.outvars[0].aval.shape)
            * math.prod(left[dim] for dim in contracted)
        )
    if equation.primitive.name == "conv_general_dilated":
        kernel = equation.invars[1].aval.shape
        out_dim = equation.params["dimension_numbers"].rhs_spec[0]
        return 2.0 * math.prod(equation.outvars[0].aval.shape) * math.prod(kernel) / kernel[out_dim]
    return 0.0
