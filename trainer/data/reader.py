"""This process's rows of global batches, and all that a resume has to know of them. Free of jax."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import grain
import numpy as np

from launch.spec import ConfigError
from trainer.data.identity import Identity, difference, find_mixture, identify
from trainer.data.pipeline import Batch, BatchIterator


class Reader(Iterator[Batch]):
    """A `BatchIterator` that knows its data again, and goes on where a mixture stood.

    Args:
      dataset: examples in order; see `trainer.task.Task.train_data`.
      global_batch_size: examples per batch over all processes.
      rows: [M] int, sorted positions in [0, global_batch_size) that this process needs.
      what: how messages call this data.
      **options: of `BatchIterator`.

    Attributes:
      example: the first one.
      identity: what the data is recognised by; empty where it has an end, as held-out data.

    Raises:
      ConfigError: the dataset's order cannot be kept at any number of processes; see
        `trainer.data.refusals` and `identify`.
    """

    def __init__(
        self,
        dataset: grain.MapDataset,
        global_batch_size: int,
        rows: Sequence[int] | np.ndarray,
        what: str,
        **options: Any,
    ):
        self._size = global_batch_size
        self._iterator = BatchIterator(dataset, global_batch_size, rows, what=what, **options)
        self._mixture = find_mixture(dataset)
        self._past: Identity = {}  # Of sources that are out of the mixture.
        self.example = dataset[0]
        self.identity = identify(dataset, what) if options.get("endless", True) else {}
        self.close = self._iterator.close

    @property
    def wait_seconds(self) -> float:
        """Seconds spent waiting for data since the start."""
        return self._iterator.wait_seconds

    def __next__(self) -> Batch:
        return next(self._iterator)

    def position(self) -> dict[str, Any]:
        """Where the reader stands: JSON, the same on every process, good at any number of them.

        `next_index` and `global_batch_size`, what the data is recognised by, and for a mixture its
        weights from the first example on.
        """
        position: dict[str, Any] = dict(self._iterator.position())
        if self.identity:
            position["data"] = {**self._past, **self.identity}
        if self._mixture is not None:
            position["mixture"] = [span.as_json() for span in self._mixture.history]
        return position

    def restore(self, position: Mapping[str, Any], *, other_data: bool = False) -> list[str]:
        """Go on from `position`, saved at any number of processes.

        Args:
          position: from `position()`.
          other_data: go on at the same place of data that is not what it was, as the user wants.

        Returns:
          Lines for people about what is allowed to change and has: weights of a mixture, and
          with `other_data` the data.

        Raises:
          ConfigError: the data is not that of the position, or the batch size does not fit it.
        """
        before = position.get("data", {})
        lines = []
        found = difference(before, self.identity)
        if found and other_data:
            lines.append(f"data: {found}; examples may come twice or not at all in this epoch")
        elif found:
            raise ConfigError(
                "config.data",
                f"{found}; so the examples to come would not be those of the run. Restore the "
                "data that it was started with, start a new run, or go on all the same with "
                "--config.restore.allow_change=data",
            )
        self._past = dict(before)
        lines += self._restore_mixture(position, other_data)
        self._iterator.restore(position)
        return lines

    def _restore_mixture(self, position: Mapping[str, Any], other_data: bool) -> list[str]:
        history = position.get("mixture")
        saved_size = position.get("global_batch_size", self._size)
        example = int(position["next_index"]) * saved_size
        if self._mixture is None:
            if history and not other_data:
                names = ", ".join(history[-1]["weights"])
                rule = f"was a mixture of {names}, and is none now; start a new run for other data"
                raise ConfigError("config.data", rule)
            return []
        if history:
            return self._mixture.restore(history, example)
        if example and not other_data:
            raise ConfigError(
                self._mixture.field,
                f"the run has read {example:,} examples of data that was no mixture; how many of "
                "each source is not known: start a new run",
            )
        return []
