"""Everything about a training that is known before any array is made."""

from __future__ import annotations

from typing import NamedTuple

import jax
from flax import nnx
from jax.sharding import Mesh

from launch.spec import TrainSpec
from trainer.evaluate import model_for_eval
from trainer.ledger import Ledger, check_replication, make_ledger
from trainer.optimizer import Optimizer, check_update, make_optimizer
from trainer.param_paths import param_path
from trainer.sharding import make_rules
from trainer.state import StateLayout, make_layout
from trainer.task import Task


class Prepared(NamedTuple):
    """The optimizer, the layout of the train state, what the state costs, and lines to remark."""

    optimizer: Optimizer
    layout: StateLayout
    ledger: Ledger
    remarks: list[str]


def prepare(spec: TrainSpec, task: Task, mesh: Mesh) -> Prepared:
    """Lay out the train state, and find what does not fit together in it.

    Args:
      spec: resolved for the mesh.
      task: makes the model.
      mesh: only its shape is used: an AbstractMesh will do where nothing is to be computed.

    Raises:
      ConfigError: a parameter that cannot be laid out or has no group, expressions that match
        nothing, an update that fails, `eval.params` that nothing keeps, or too much replication.
    """
    rules = make_rules(spec.sharding.rules, mesh)
    optimizer = make_optimizer(spec.optimizer)
    axes = spec.sharding.optimizer_axes
    layout = make_layout(task, optimizer.tx, mesh, rules, spec.seed, optimizer_axes=axes)
    remarks = check_optimizer(optimizer, layout)
    if spec.eval.every_steps:
        which = spec.eval.params
        jax.eval_shape(
            lambda leaves: nnx.state(model_for_eval(layout, leaves, which)), layout.abstract
        )
    ledger = make_ledger(layout)
    check_replication(ledger, spec.sharding.max_replicated_bytes)
    return Prepared(optimizer, layout, ledger, remarks)


def check_optimizer(optimizer: Optimizer, layout: StateLayout) -> list[str]:
    """Find what is wrong between an optimizer and a model.

    Returns:
      Remarks about what is allowed and looks like a mistake.

    Raises:
      ConfigError: expressions that match nothing, parameters without a group, or an update that
        fails.
    """
    model, state = layout.merge(layout.abstract)
    params = nnx.as_pure(nnx.state(model, state.wrt))
    leaves = jax.tree_util.tree_leaves_with_path(params)
    remarks = optimizer.facts.check({param_path(path): leaf.ndim for path, leaf in leaves})
    check_update(optimizer.tx, params)
    return remarks
