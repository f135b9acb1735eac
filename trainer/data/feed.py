"""From a task's dataset to global arrays on the mesh."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import grain
import jax
from jax.sharding import Mesh

from trainer.data.pipeline import rows_of_process, to_global
from trainer.data.reader import Reader
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
      identity, position, restore, close: of `Reader`.

    Raises:
      ConfigError: the dataset's order cannot be kept at any number of processes.
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
        self._reader = Reader(dataset, global_batch_size, self._rows, what, **options)
        self.identity = self._reader.identity
        self.position = self._reader.position
        self.restore = self._reader.restore
        self.close = self._reader.close

    @property
    def wait_seconds(self) -> float:
        """Seconds spent waiting for data since the start."""
        return self._reader.wait_seconds

    def __iter__(self) -> Iterator[dict[str, jax.Array]]:
        return self

    def __next__(self) -> dict[str, jax.Array]:
        return to_global(next(self._reader), self._sharding, self._rows, self._size)

    def abstract(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes, dtypes and shardings of a batch, arrays [B, ...]."""
        return {
            key: jax.ShapeDtypeStruct(
                (self._size, *value.shape), value.dtype, sharding=self._sharding
            )
            for key, value in self._reader.example.items()
        }
