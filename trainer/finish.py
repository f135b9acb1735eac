"""What a finished run shows of its model."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from flax import nnx

from trainer import distributed
from trainer.evaluate import model_for_eval
from trainer.ledger import make_ledger
from trainer.mesh import replicated
from trainer.state import Leaves, StateLayout
from trainer.task import Task

# A larger model is not gathered onto one device for `Task.finish`.
FINISH_BYTES = 1 << 30


def finish(task: Task, layout: StateLayout, leaves: Leaves, params: str, seed: int) -> None:
    """Show what the task wants to show of the trained model. Collective.

    One device does it: in a loop that samples tokens, a sharded model would be gathered from all
    processes for every one of them.

    Args:
      task: shows it.
      layout: of the leaves.
      leaves: the state after the last step.
      params: whose, as in `config.eval.params`.
      seed: of the random numbers that the task may draw.
    """
    if type(task).finish is Task.finish:
        return
    groups = make_ledger(layout).group_bytes()
    model_bytes = sum(total for name, (total, _) in groups.items() if name != "optimizer")
    if model_bytes > FINISH_BYTES:
        distributed.say(
            f"no sample: the model has {model_bytes} bytes, more than {FINISH_BYTES} on one device"
        )
    else:
        model = gather_model(layout, leaves, params)
        if distributed.is_lead():
            show_results(task, layout, model, seed)
    # Whoever left before the lead is done would wait for it in JAX's own, shorter, barrier.
    distributed.barrier("finish", timeout_seconds=600.0)


def gather_model(layout: StateLayout, leaves: Leaves, params: str) -> list[Any]:
    """The model's leaves whole, on one device of each process. Collective.

    Returns:
      As many leaves as the layout has; the optimizer's are abstract.
    """

    def model_leaves(leaves: Leaves) -> list[Any]:
        return jax.tree.leaves(nnx.state(model_for_eval(layout, leaves, params)))

    with nnx.use_eager_sharding(False):
        whole = jax.jit(model_leaves, out_shardings=replicated(layout.mesh))(leaves)
    here = iter([leaf.addressable_data(0) for leaf in whole])
    own = [name.startswith("model.") for name in layout.names]
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
