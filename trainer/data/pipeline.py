"""This process's part of every global batch, the same rows whatever the number of processes.

The global batch of step N is examples [N * B, (N + 1) * B) of the task's dataset, in that order.
Which of its rows a process reads follows from the sharding alone, so a run may go on with another
number of processes or another mesh and still see the same batches.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import grain
import jax
import numpy as np
from jax.sharding import NamedSharding

from launch.spec import ConfigError
from trainer.data.refusals import check_order

Batch = dict[str, np.ndarray]


class BatchIterator(Iterator[Batch]):
    """Iterates over this process's rows of the global batches, read ahead by threads.

    Args:
      dataset: examples in training order; element i is a dict of numpy arrays, equally shaped for
        every i. Of transformations that keep element i known from i; see `check_order`.
      global_batch_size: examples per step over all processes.
      rows: [M] int, sorted positions in [0, global_batch_size) that this process needs.
      num_threads: threads that read ahead, each a whole batch at a time; 0 reads in `__next__`.
      num_prefetch: batches kept ready; 0 reads in `__next__`.
      endless: running out of data is an error (training); else iteration stops (evaluation).
      what: how messages call this data, e.g. 'training data'.

    Attributes:
      wait_seconds: seconds that `__next__` has taken in all; a step waits for no other data.

    Raises:
      ConfigError: the dataset is shorter than one global batch, or its order cannot be kept.
    """

    def __init__(
        self,
        dataset: grain.MapDataset,
        global_batch_size: int,
        rows: Sequence[int] | np.ndarray,
        *,
        num_threads: int = 1,
        num_prefetch: int = 4,
        endless: bool = True,
        what: str = "training data",
    ):
        check_order(dataset, what)
        if len(dataset) < global_batch_size:
            raise ConfigError(
                "config.global_batch_size",
                f"the {what} has {len(dataset)} examples, fewer than one global batch; "
                "use more data or a smaller batch",
                global_batch_size,
            )
        self.wait_seconds = 0.0
        self._global_batch_size = global_batch_size
        self._endless = endless
        self._what = what
        batches = self._batches = _LocalBatches(dataset, global_batch_size, rows)
        options = grain.ReadOptions(
            num_threads=min(num_threads, num_prefetch), prefetch_buffer_size=num_prefetch
        )
        self._iterator = iter(batches.to_iter_dataset(options))
        self._failure: BaseException | None = None

    @property
    def num_batches(self) -> int:
        """Whole global batches in the dataset; a remainder is not used."""
        return len(self._batches)

    def __next__(self) -> Batch:
        """The next batch: dict of arrays [M, ...], rows in the order of `rows`.

        Raises:
          StopIteration: no whole batch is left, and the iterator is not `endless`.
          ConfigError: no whole batch is left, and it is.
        """
        if self._failure is not None:
            # Grain drops the batch that failed: going on would shift every later step by one.
            raise RuntimeError(f"reading {self._what} failed before") from self._failure
        start = time.perf_counter()
        try:
            return next(self._iterator)
        except StopIteration:
            if not self._endless:
                raise
            raise ConfigError(
                "config.num_steps",
                f"the {self._what} ends after {self.num_batches} global batches of "
                f"{self._global_batch_size} examples; repeat() it in the task's train_data, or "
                f"train at most {self.num_batches} steps",
            ) from None
        except Exception as error:
            self._failure = error
            raise
        finally:
            self.wait_seconds += time.perf_counter() - start

    def position(self) -> dict[str, int]:
        """Where the iterator stands: batches handed out, not those read ahead.

        The same on every process, JSON-able, and valid for any number of processes.
        """
        state = self._iterator.get_state()
        return {
            "next_index": int(state["next_index"]),
            "global_batch_size": self._global_batch_size,
        }

    def restore(self, position: Mapping[str, int]) -> None:
        """Go on from `position`: the next batch is the one that would have come next there.

        Raises:
          ConfigError: it was saved with another batch size and lies within a batch of this one,
            or beyond the end of the data.
        """
        size = self._global_batch_size
        saved_size = position.get("global_batch_size", size)
        next_index, within = divmod(position["next_index"] * saved_size, size)
        if within:
            raise ConfigError(
                "config.global_batch_size",
                f"{position['next_index']} batches of {saved_size} examples were read before, "
                f"which is no whole number of batches of {size}; keep {saved_size}",
                size,
            )
        if next_index > self.num_batches:
            raise ConfigError(
                "config.data",
                f"{next_index} global batches were read before, but the {self._what} now has only "
                f"{self.num_batches}; restore the data it was started with",
            )
        self._iterator.set_state({"next_index": next_index})
        self._failure = None

    def close(self) -> None:
        """Stop the threads. The iterator cannot be used afterwards."""
        self._iterator.close()


class _LocalBatches(grain.MapDataset):
    """Element k holds the rows that one process needs of global batch k.

    Whole batches, because Grain's Python costs some 30 us for each element it hands over:
    `_getitems` of the parents goes through shuffle, repeat and map once for all rows. (Grain's own
    `batch()` asks row by row in 0.2.18; its batched read is behind an experiment flag.)
    """

    def __init__(
        self, dataset: grain.MapDataset, global_batch_size: int, rows: Sequence[int] | np.ndarray
    ):
        super().__init__(dataset)
        self._global_batch_size = global_batch_size
        self._rows = [int(row) for row in rows]
        in_order = all(a < b for a, b in zip(self._rows, self._rows[1:], strict=False))
        if (
            not self._rows
            or not in_order
            or not 0 <= self._rows[0] <= self._rows[-1] < (global_batch_size)
        ):
            raise ValueError(f"rows must be sorted positions below {global_batch_size}: {rows}")

    def __len__(self) -> int:
        return len(self._parent) // self._global_batch_size

    def __str__(self) -> str:
        return f"_LocalBatches({len(self._rows)} of {self._global_batch_size})"

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return self.slice(index)
        first = index * self._global_batch_size
        indices = [first + row for row in self._rows]
        return _stack(self._parent._getitems(indices), indices)


def _stack(examples: Sequence[Any], indices: Sequence[int]) -> Batch:
    """Stack examples into one batch, naming the first that does not fit.

    Raises:
      ValueError: an example is None, no dict, or unlike the first; or its arrays are no numbers.
    """
    try:
        first = examples[0]
        if not isinstance(first, Mapping) or any(len(other) != len(first) for other in examples):
            raise ValueError("no dicts of the same names")
        batch = {name: np.stack([example[name] for example in examples]) for name in first}
    except (TypeError, KeyError, ValueError, IndexError):
        _raise_unfit(examples, indices)
        raise
    for name, array in batch.items():
        if array.dtype.kind not in "biufcV":  # V: bfloat16 and its like.
            raise ValueError(
                f"{name!r} of the dataset's examples is {array.dtype}, which is no number; "
                "drop it in a map()"
            )
    return batch


def _raise_unfit(examples: Sequence[Any], indices: Sequence[int]) -> None:
    """Raise ValueError for the first example that is none, or is unlike the first."""
    shapes: dict[str, tuple[int, ...]] | None = None
    for example, index in zip(examples, indices, strict=True):
        if example is None:
            raise ValueError(
                f"example {index} of the dataset is None; do not drop examples in a map(): drop "
                "them when the data is prepared, or give them a weight of 0"
            ) from None
        if not isinstance(example, Mapping):
            raise ValueError(
                f"example {index} of the dataset is {type(example).__name__}, and must be a dict "
                "of arrays"
            ) from None
        found = {name: np.shape(value) for name, value in example.items()}
        if shapes is None:
            shapes = found
        elif found != shapes:
            raise ValueError(
                f"example {index} of the dataset has arrays {found}, but example {indices[0]} has "
                f"{shapes}; all must be shaped alike: pad or cut them in a map()"
            ) from None


def rows_of_process(sharding: NamedSharding, global_batch_size: int) -> np.ndarray:
    """The rows of the global batch that this process's devices hold.

    Args:
      sharding: of a batch's arrays [B, ...], whose dim 0 alone is sharded.
      global_batch_size: B; the sharding must divide it.

    Returns:
      [M] int64, sorted. Two processes share rows when a mesh axis across them does not split the
      batch.
    """
    parts = sharding.addressable_devices_indices_map((global_batch_size,)).values()
    spans = {_span(index, global_batch_size) for index in parts}
    return np.unique(np.concatenate([np.arange(start, stop) for start, stop in spans]))


def to_global(
    batch: Mapping[str, np.ndarray],
    sharding: NamedSharding,
    rows: np.ndarray,
    global_batch_size: int,
) -> dict[str, jax.Array]:
    """Put this process's rows onto its devices, as its part of global arrays.

    Works under `jax.transfer_guard('disallow')`. No process hears of another; all must call it,
    with their own rows of the same global batch.

    Args:
      batch: arrays [M, ...], in the order of `rows`. Not to be written to afterwards: a CPU
        device may use the memory as it is.
      sharding: of arrays [B, ...], whose dim 0 alone is sharded.
      rows: [M] of `rows_of_process`.
      global_batch_size: B.

    Returns:
      Arrays [B, ...] with that sharding.
    """
    slices = _local_slices(sharding, rows.tobytes(), rows.dtype.str, global_batch_size)
    arrays = {}
    # This transfer is meant. One call for all devices: a device_put for each and
    # make_array_from_single_device_arrays take 4 to 6 times as long (4 devices, 60 us against 350).
    with jax.transfer_guard_host_to_device("allow"):
        for name, array in batch.items():
            shape = (global_batch_size, *array.shape[1:])
            arrays[name] = jax.make_array_from_callback(
                shape, sharding, lambda index, array=array: array[slices[index[0].start or 0]]
            )
    return arrays


@functools.lru_cache(maxsize=16)  # A training and an evaluation sharding; making it costs 100 us.
def _local_slices(
    sharding: NamedSharding, row_bytes: bytes, row_dtype: str, global_batch_size: int
) -> dict[int, slice]:
    """Where in the local rows each local device's part begins and ends, by its first global row."""
    rows = np.frombuffer(row_bytes, row_dtype)
    slices = {}
    for device, index in sharding.addressable_devices_indices_map((global_batch_size,)).items():
        start, stop = _span(index, global_batch_size)
        first = int(np.searchsorted(rows, start))
        part = slice(first, first + stop - start)
        if not np.array_equal(rows[part], np.arange(start, stop)):
            raise ValueError(f"{device} needs rows {start} to {stop}, not all in {rows}")
        slices[start] = part
    return slices


def _span(index: tuple[slice, ...] | None, length: int) -> tuple[int, int]:
    """Start and end on dim 0 of one device's index."""
    start, stop, _ = (index[0] if index else slice(None)).indices(length)
    return start, stop
