"""From a task's dataset to global arrays on the mesh."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import grain
import jax
from jax.sharding import Mesh

from launch.spec import ConfigError
from trainer.data.identity import Identity, difference, find_mixture, identify
from trainer.data.pipeline import BatchIterator, rows_of_process, to_global
from trainer.mesh import batch_sharding


class Feed:
    """Global batches; each process reads and holds only its own rows.

    Args:
      dataset: examples in order; see `trainer.task.Task.train_data`.
      global_batch_size: examples per batch over all processes.
      mesh: whose `data` and `fsdp` axes split the batch.
      what: how messages call this data.
      **options: of `BatchIterator`.

    Attributes:
      identity: what the data is recognised by; empty where it has an end, as held-out data.

    Raises:
      ConfigError: the dataset's order cannot be kept at any number of processes; see
        `trainer.data.refusals` and `identify`.
    """

    def __init__(
        self,
        dataset: grain.MapDataset,
        global_batch_size: int,
        mesh: Mesh,
        what: str,
        **options: Any,
    ):
        self._sharding = batch_sharding(mesh)
        self._size = global_batch_size
        self._rows = rows_of_process(self._sharding, global_batch_size)
        self._iterator = BatchIterator(dataset, global_batch_size, self._rows, what=what, **options)
        self._mixture = find_mixture(dataset)
        self._example = dataset[0]
        self._past: Identity = {}  # Of sources that are out of the mixture.
        self.identity = identify(dataset, what) if options.get("endless", True) else {}
        self.close = self._iterator.close

    @property
    def wait_seconds(self) -> float:
        """Seconds spent waiting for data since the start."""
        return self._iterator.wait_seconds

    def __iter__(self) -> Iterator[dict[str, jax.Array]]:
        return self

    def __next__(self) -> dict[str, jax.Array]:
        return to_global(next(self._iterator), self._sharding, self._rows, self._size)

    def position(self) -> dict[str, Any]:
        """Where the feed stands: JSON, the same on every process, good at any number of them.

        `next_index` and `global_batch_size`, what the data is recognised by, and for a mixture its
        weights from the first example on.
        """
        position: dict[str, Any] = dict(self._iterator.position())
        if self.identity:
            position["data"] = {**self._past, **self.identity}
        if self._mixture is not None:
            position["mixture"] = [span.as_json() for span in self._mixture.history]
        return position

    def restore(self, position: Mapping[str, Any]) -> list[str]:
        """Go on from `position`, saved at any number of processes.

        Returns:
          Lines for people about what is allowed to change and has: weights of a mixture.

        Raises:
          ConfigError: the data is not that of the position, or the batch size does not fit it.
        """
        before = position.get("data", {})
        if self.identity and (found := difference(before, self.identity)):
            raise ConfigError(
                "config.data",
                f"{found}; so the examples to come would not be those of the run. Restore the "
                "data that it was started with, or start a new run",
            )
        self._past = dict(before)
        lines = self._restore_mixture(position)
        self._iterator.restore(position)
        return lines

    def _restore_mixture(self, position: Mapping[str, Any]) -> list[str]:
        history = position.get("mixture")
        saved_size = position.get("global_batch_size", self._size)
        example = int(position["next_index"]) * saved_size
        if self._mixture is None:
            if history:
                names = ", ".join(history[-1]["weights"])
                rule = f"was a mixture of {names}, and is none now; start a new run for other data"
                raise ConfigError("config.data", rule)
            return []
        if history:
            return self._mixture.restore(history, example)
        if example:
            raise ConfigError(
                self._mixture.field,
                f"the run has read {example:,} examples of data that was no mixture; how many of "
                "each source is not known: start a new run",
            )
        return []

    def abstract(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes, dtypes and shardings of a batch, arrays [B, ...]."""
        return {
            key: jax.ShapeDtypeStruct(
                (self._size, *value.shape), value.dtype, sharding=self._sharding
            )
            for key, value in self._example.items()
        }
