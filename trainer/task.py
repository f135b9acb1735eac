"""What a user brings: a model, its loss and its data."""

from __future__ import annotations

import abc
from collections.abc import Mapping
from typing import Any, NamedTuple

import grain
import jax
import numpy as np
from flax import nnx

from trainer.import_path import import_path

Batch = Mapping[str, jax.Array]


class Loss(NamedTuple):
    """A loss whose mean over the global batch is `total / weight`, exactly, however it is split.

    Attributes:
      total: scalar float32, the sum over examples (or tokens) of this part of the batch.
      weight: scalar float32, over how many examples (or tokens) `total` was summed.
    """

    total: jax.Array
    weight: jax.Array


class Task(abc.ABC):
    """A model, its loss and its data; a config names the class by its import path.

    The trainer makes one `Task(model=config.model, data=config.data)` on every process, before
    `jax.distributed` is set up: check the sections there, and raise
    `launch.spec.ConfigError` for what is wrong in them.
    """

    def __init__(self, model: Mapping[str, Any], data: Mapping[str, Any]):
        self.model_config = model
        self.data_config = data

    @abc.abstractmethod
    def make_model(self, rngs: nnx.Rngs) -> nnx.Module:
        """Make the model. Traced under jit: every array is born in its own sharding."""

    @abc.abstractmethod
    def loss(self, model: Any, batch: Batch) -> Loss | jax.Array:
        """The loss of a batch, arrays [B, ...]. A scalar is taken as the mean over B examples."""

    @abc.abstractmethod
    def train_data(self, seed: int) -> grain.MapDataset:
        """Examples in training order (shuffled, repeated): element i is a dict of numpy arrays.

        Must depend on nothing but the config and `seed`: the trainer gives each process its own
        rows of every global batch by index. docs/data.md has filters, packing and mixtures that
        keep to that, and what is refused.
        """

    def example_spec(self) -> Mapping[str, Any]:
        """Shape and dtype of each array of an example, as a `jax.ShapeDtypeStruct`.

        A task that knows them without its data can be planned for where the data is not.
        """
        example = self.train_data(seed=0)[0]
        return {
            key: jax.ShapeDtypeStruct(np.shape(value), np.asarray(value).dtype)
            for key, value in example.items()
        }

    def eval_data(self) -> grain.MapDataset | None:
        """Held-out examples in a fixed order, or None."""
        return None

    def describe(self) -> str:
        """A line or two about the data, printed by the lead process at the start."""
        return ""

    def flops_per_example(self, model: Any) -> float | None:
        """Model FLOPs of one example's forward and backward pass, for MFU; None if not known.

        `model` may be abstract: its variables hold shapes only.
        """
        del model
        return None

    def flops_formula(self) -> str:
        """How `flops_per_example` counts, in a line, with its source."""
        return ""

    def compute_dtype(self) -> str | None:
        """The dtype in which weights are used, and so travel; None for that of the parameters."""
        return None

    def tensor_bytes_per_example(self) -> float | None:
        """Bytes of activations of an example that splitting the model over `tensor` all-reduces.

        Forward and backward, the fewest that do; None if not known.
        """
        return None

    def tokens_per_example(self) -> int:
        """Tokens in one example, for throughput."""
        return 1

    def verdict(self, eval_loss: float) -> str:
        """What the final held-out loss means, printed by the lead process at the end."""
        return f"held-out loss {eval_loss:.4f}"

    def finish(self, model: Any, key: jax.Array) -> Mapping[str, jax.Array] | None:
        """Compute something to show at the end, under jit. Lead process only, on one device.

        The model is whole there; one of more than 1 GiB is not gathered, and this not called.
        """
        del model, key
        return None

    def show(self, results: Mapping[str, Any]) -> str:
        """The lead process prints this of what `finish` computed (as numpy arrays)."""
        return "\n".join(f"{name}: {value}" for name, value in results.items())


def load_task(path: str, model: Mapping[str, Any], data: Mapping[str, Any]) -> Task:
    """Import `package.module:Class` and make it.

    Raises:
      ConfigError: no such module or class, or a section that the task refuses.
    """
    found = import_path("config.task", path, _is_task, "Task called")
    return found(model=model, data=data)


def _is_task(value: object) -> bool:
    return isinstance(value, type) and issubclass(value, Task) and value is not Task
