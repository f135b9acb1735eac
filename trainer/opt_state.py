"""The optimizer's state, laid out after the params it belongs to.

`nnx.Optimizer` copies a param's metadata onto every variable of the state that has the param's
place in the tree. That is right for Adam's moments only: Adafactor keeps rows and columns, others
counters, placeholders and vectors of their own. Here every variable gets the layout of its own
shape, and `nnx.get_partition_spec` is right for all of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from trainer.param_paths import param_path
from trainer.sharding import MeshAxes, as_tuple, mesh_axes_of, partition_specs, spec_of_names


class ParamLayout(NamedTuple):
    """A param's shape, and the PartitionSpec of state that has this shape."""

    shape: tuple[int, ...]
    spec: P


class StateRules(NamedTuple):
    """How to lay the optimizer's state out.

    Attributes:
      mesh: only its shape is used.
      rules: logical axis -> mesh axis, of the params.
      axes: mesh axes to split state over besides those of its params (ZeRO-1).
    """

    mesh: Mesh
    rules: Mapping[str, MeshAxes]
    axes: tuple[str, ...] = ()


class ShardedOptimizer(nnx.Optimizer):
    """An `nnx.Optimizer` whose state names its own layout, one variable per array.

    Args:
      model: with annotated params (`trainer.sharding.annotate`).
      tx: the transformation.
      wrt: which variables of the model are trained.
      how: rules of the layout.
    """

    def __init__(self, model: Any, tx: optax.GradientTransformation, wrt: Any, how: StateRules):
        params = nnx.state(model, wrt)
        layouts = param_layouts(params, how)

        def variable(path: Sequence[Any], leaf: Any) -> nnx.optimizer.OptState:
            leaf = jnp.asarray(leaf)
            owner = owner_of(param_path(path), layouts)
            spec = spec_of_state(leaf, layouts[owner] if owner else None, param_path(path), how)
            kind = nnx.optimizer.OptVariable if owner else nnx.optimizer.OptArray
            return kind(leaf, out_sharding=tuple(spec))

        self.graph = None
        self.step = nnx.optimizer.OptState(jnp.zeros((), jnp.uint32))
        self.tx = tx
        self.wrt = wrt
        # Plain arrays: Optax's masks would otherwise leave variables around their MaskedNodes.
        opt_state = jax.tree_util.tree_map_with_path(variable, tx.init(nnx.as_pure(params)))
        self.opt_state = nnx.data(opt_state)


def param_layouts(params: nnx.State, how: StateRules) -> dict[str, ParamLayout]:
    """Path -> layout of state of the param's shape.

    A param's `optimizer_sharding` (logical axis names) takes the place of its own names; then every
    axis of `how.axes` splits what it still can.
    """
    variables = jax.tree_util.tree_leaves_with_path(
        params, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable)
    )
    layouts = {}
    specs = partition_specs(params, how.rules)
    for (path, variable), own in zip(variables, specs, strict=True):
        names = variable.get_metadata().get("optimizer_sharding")
        spec = spec_of_names(names, how.rules) if names else own
        shape = tuple(variable.get_value().shape)
        layouts[param_path(path)] = ParamLayout(shape, split_more(shape, spec, how.axes, how.mesh))
    return layouts


def split_more(shape: Sequence[int], spec: P, axes: Iterable[str], mesh: Mesh) -> P:
    """Split over further mesh axes, each along the dim with the longest shard that it divides.

    An axis that divides none, or that splits the array already, is left out.
    """
    entries = [as_tuple(entry) for entry in spec]
    entries += [()] * (len(shape) - len(entries))
    for axis in axes:
        size = mesh.shape[axis]
        if size == 1 or any(axis in entry for entry in entries):
            continue
        local = [
            length // math.prod(mesh.shape[used] for used in entry)
            for length, entry in zip(shape, entries, strict=True)
        ]
        fitting = [dim for dim, length in enumerate(local) if length and length % size == 0]
        if fitting:
            dim = max(fitting, key=lambda dim: local[dim])
            entries[dim] = (*entries[dim], axis)
    return P(*[entry if len(entry) > 1 else (entry[0] if entry else None) for entry in entries])


def spec_of_state(leaf: Any, param: ParamLayout | None, path: str, how: StateRules) -> P:
    """Lay out one array of the state.

    Args:
      leaf: it has a shape and a dtype.
      param: whom it belongs to; None for nobody.
      path: of the leaf, for a hint which of two equal dims was left out.
      how: rules of the layout.
    """
    shape = tuple(leaf.shape)
    if leaf.size <= 1 or not jnp.issubdtype(leaf.dtype, jnp.inexact):
        return P()  # Counters, placeholders, and keys of random numbers.
    if param is None:
        return split_more(shape, P(), ("fsdp", *how.axes), how.mesh)
    if shape == param.shape:
        return param.spec
    dims = aligned(shape, param.shape, from_end="v_col" in path.split("."))
    spec = [*param.spec, *[None] * (len(param.shape) - len(param.spec))]
    kept = P(*[None if dim is None else spec[dim] for dim in dims])
    # An axis whose dim is not there may split another one.
    return split_more(shape, kept, sorted(mesh_axes_of(param.spec)), how.mesh)


def aligned(
    shape: Sequence[int], param_shape: Sequence[int], from_end: bool = False
) -> list[int | None]:
    """For every dim of the state, the dim of the param that it is; None for a dim of its own.

    Args:
      shape: of the state, e.g. [rows] of a factored moment, or [history, rows, columns].
      param_shape: of the param.
      from_end: of dims of equal length, take the last that fits: Adafactor's `v_col` of a square
        param has the columns, its `v_row` the rows.
    """
    n, m = len(shape), len(param_shape)
    if n == m:  # GaLore: one dim of the param's length, the other of its rank.
        return [d if shape[d] == param_shape[d] and shape[d] > 1 else None for d in range(n)]
    if n > m and tuple(shape[n - m :]) == tuple(param_shape):  # L-BFGS: a history of params.
        return [None] * (n - m) + list(range(m))
    if from_end:
        back = aligned(shape[::-1], param_shape[::-1])
        return [None if dim is None else m - 1 - dim for dim in back[::-1]]
    # The longest common subsequence of lengths: dims are left out or added, never turned about.
    length = [[0] * (m + 1) for _ in range(n + 1)]
    for i in reversed(range(n)):
        for j in reversed(range(m)):
            same = shape[i] == param_shape[j] and shape[i] > 1
            skipped = max(length[i + 1][j], length[i][j + 1])
            length[i][j] = max(skipped, 1 + length[i + 1][j + 1] if same else 0)
    dims: list[int | None] = []
    j = 0
    while len(dims) < n:
        i = len(dims)
        if length[i][j] == length[i + 1][j]:  # Nothing is lost without it.
            dims.append(None)
        elif shape[i] == param_shape[j] and length[i][j] == 1 + length[i + 1][j + 1]:
            dims.append(j)
            j += 1
        else:
            j += 1
    return dims


def owner_of(path: str, params: Iterable[str]) -> str | None:
    """The param with the longest path that lies in the path of a leaf of the state, if any."""
    params = frozenset(params)
    keys = path.split(".")
    for length in range(len(keys), 0, -1):
        for start in range(len(keys) - length, -1, -1):
            found = ".".join(keys[start : start + length])
            if found in params:
                return found
    return None
