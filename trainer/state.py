"""The train state: a model and its optimizer, abstract and real, as a flat list of arrays.

NNX objects describe the state and are merged from it while a step is traced; between steps only
the flat list lives, because the Python cost of an NNX object per step grows with its leaves.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from trainer import compile_cache, sharding
from trainer.opt_state import ShardedOptimizer, StateRules, param_layouts
from trainer.task import Task

Leaves = list[jax.Array]


@dataclasses.dataclass(frozen=True)
class StateLayout:
    """Everything about the train state except its numbers. Lists have one entry per leaf.

    Attributes:
      mesh: what the shardings lie on.
      graphdef: static structure of the tuple (model, optimizer).
      treedef: of the nnx.State that belongs to it.
      names: dotted paths, `model.layers.0.mlp.kernel`, `optimizer.opt_state.1.0.mu...`.
      abstract: ShapeDtypeStructs with their shardings.
      params: names of the trained leaves of the model.
      gradients: the shardings that gradients are reduced to, one per trained leaf of the model:
        those of optimizer state of their shape.
      optimizer_axes: mesh axes that split the optimizer's state besides those of its params.
      rules: logical axis -> mesh axis, of the params.
      create: makes (model, optimizer) anew; only to be traced.
    """

    mesh: Mesh
    graphdef: Any
    treedef: Any
    names: list[str]
    abstract: list[jax.ShapeDtypeStruct]
    params: frozenset[str]
    gradients: list[NamedSharding]
    optimizer_axes: tuple[str, ...]
    rules: Mapping[str, sharding.MeshAxes]
    create: Callable[[], tuple[nnx.Module, nnx.Optimizer]]

    @property
    def shardings(self) -> list[NamedSharding]:
        """The sharding of every leaf."""
        return [leaf.sharding for leaf in self.abstract]

    def merge(self, leaves: Sequence[Any]) -> tuple[Any, nnx.Optimizer]:
        """(model, optimizer) around these arrays; meant for use under jit."""
        state = jax.tree.unflatten(self.treedef, leaves)
        return nnx.merge(self.graphdef, state, copy=True)

    def leaves_of(self, model: Any, optimizer: nnx.Optimizer) -> list[Any]:
        """The arrays of (model, optimizer), in this layout's order."""
        return jax.tree.leaves(nnx.state((model, optimizer)))

    def as_dict(self, leaves: Sequence[Any]) -> dict[str, Any]:
        """Leaves by name, as a checkpoint keeps them: Orbax takes no array without elements."""
        return {name: leaf for name, leaf in zip(self.names, leaves, strict=True) if leaf.size > 0}

    def from_dict(self, leaves: Mapping[str, Any]) -> list[Any]:
        """Leaves in order, from a dict by name as `as_dict` gives it."""
        return [
            leaves[name] if leaf.size else _empty(leaf)
            for name, leaf in zip(self.names, self.abstract, strict=True)
        ]


def make_layout(
    task: Task,
    tx: optax.GradientTransformation,
    mesh: Mesh,
    rules: Mapping[str, sharding.MeshAxes],
    seed: int,
    *,
    optimizer_axes: tuple[str, ...] = (),
) -> StateLayout:
    """Find shapes, dtypes and shardings of the train state without making any array.

    Args:
      task: makes the model.
      tx: the optimizer.
      mesh: only its shape is used.
      rules: logical axis -> mesh axis.
      seed: of the model's initial numbers.
      optimizer_axes: mesh axes that split the optimizer's state besides those of its params.

    Raises:
      ConfigError: a parameter cannot be laid out on this mesh, or has no group in the optimizer.
    """
    how = StateRules(mesh, rules, optimizer_axes)

    def create() -> tuple[nnx.Module, nnx.Optimizer]:
        # Eager sharding would want a mesh context at every Param; the layout is ours to apply.
        with nnx.use_eager_sharding(False):
            model = task.make_model(nnx.Rngs(seed))
            sharding.annotate(model, mesh, rules)
            return model, ShardedOptimizer(model, tx, nnx.Param, how)

    model, optimizer = nnx.eval_shape(create)
    graphdef, state = nnx.split((model, optimizer))
    paths, treedef = jax.tree_util.tree_flatten_with_path(state)
    shardings = sharding.named_shardings(state, mesh, rules)
    of_params = param_layouts(nnx.state(model, nnx.Param), how)
    if len(shardings) != len(paths):
        raise AssertionError(f"{len(shardings)} specs for {len(paths)} leaves of the train state")
    return StateLayout(
        mesh=mesh,
        graphdef=graphdef,
        treedef=treedef,
        names=[_leaf_name(path) for path, _ in paths],
        abstract=[
            jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)
            for (_, leaf), where in zip(paths, shardings, strict=True)
        ],
        params=frozenset(f"model.{path}" for path in of_params),
        gradients=[NamedSharding(mesh, layout.spec) for layout in of_params.values()],
        optimizer_axes=optimizer_axes,
        rules=rules,
        create=create,
    )


def init_state(layout: StateLayout, only: Collection[str] | None = None) -> Leaves:
    """Make the initial state, every leaf born in its sharding; none is ever whole on one device.

    The numbers depend on the seed alone, not on the mesh. Collective: every process must call this.

    Args:
      layout: of the state.
      only: names of the leaves that are wanted; None for all. In the place of the others is None.
    """

    def init() -> list[jax.Array]:
        model, optimizer = layout.create()
        constrain(model, nnx.Param, layout)
        constrain(optimizer, nnx.optimizer.OptState, layout)
        return keep(layout.leaves_of(model, optimizer))

    def keep(leaves: list[Any]) -> list[Any]:
        if only is None:
            return leaves
        named = zip(layout.names, leaves, strict=True)
        return [leaf if name in only else None for name, leaf in named]

    with compile_cache.written_by_all():
        made = jax.jit(init, out_shardings=keep(layout.shardings)).lower().compile()
    return made()


def constrain(module: Any, kind: type[nnx.Variable], layout: StateLayout) -> None:
    """Constrain, under jit, the variables of one kind to the layout's shardings, in place."""
    root = "optimizer" if isinstance(module, nnx.Optimizer) else "model"
    by_name = dict(zip(layout.names, layout.shardings, strict=True))
    state = nnx.state(module, kind)
    paths, treedef = jax.tree_util.tree_flatten_with_path(state)
    shardings = treedef.unflatten([by_name[_leaf_name(path, root)] for path, _ in paths])
    nnx.update(module, jax.lax.with_sharding_constraint(state, shardings))


def _empty(leaf: jax.ShapeDtypeStruct) -> jax.Array:
    """An array without elements, in its sharding."""
    return jax.make_array_from_callback(
        leaf.shape, leaf.sharding, lambda index: np.empty(leaf.shape, leaf.dtype)
    )


def _leaf_name(path: Sequence[Any], root: str | None = None) -> str:
    """The dotted name of a leaf of nnx.state((model, optimizer)), or of one of the two."""
    keys = sharding.dotted(path).split(".")
    if root is None:
        root, keys = ("model", "optimizer")[int(keys[0])], keys[1:]
    # A Variable holds its array under `value`, which says nothing.
    return ".".join([root, *(keys[:-1] if keys[-1] == "value" else keys)])
