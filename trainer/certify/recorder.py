"""Writes down what a training went through, step by step, so that two of them can be compared.

One file per attempt and process, a JSON object per line, each written at once: of a process that is
killed all lines but the last are whole.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import xxhash
from flax import nnx

from trainer.state import Leaves, StateLayout

# A state of which a process holds more is digested at fewer steps.
EVERY_STEP_BYTES = 1 << 28

ZEROS = "zeros"  # The digest of what holds nothing but zeros: moments that begin anew, say.


class Recorder:
    """This process's records of one attempt."""

    def __init__(self, directory: Path, attempt: int, process_id: int):
        folder = directory / f"attempt-{attempt:03d}"
        folder.mkdir(mode=0o700, exist_ok=True)
        path = folder / f"process-{process_id:05d}.jsonl"
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)

    def write(self, event: str, **fields: Any) -> None:
        """Append a line."""
        os.write(self._fd, json.dumps({"event": event, **fields}).encode() + b"\n")

    def state(self, when: str, step: int, layout: StateLayout, leaves: Leaves) -> None:
        """Record a digest of every leaf, by the parts of it that this process holds.

        Args:
          when: `initial`, `restored` or `after` (an update).
          step: completed updates.
          layout: of the leaves.
          leaves: not donated yet.
        """
        digests = {
            name: digests_of(leaf)
            for name, leaf in zip(layout.names, leaves, strict=True)
            if leaf.size
        }
        self.write("state", when=when, step=step, leaves=digests)


def digests_of(array: jax.Array) -> dict[str, str]:
    """Digests of an array's parts on this process, by their place: `0:4,8:16`, "" for a scalar.

    Parts that several devices hold alike are digested once. Reads them back to the host.
    """
    found: dict[str, str] = {}
    for shard in array.addressable_shards:
        # Of PRNG keys the index has the dims of their data as well, which are never split.
        dims = zip(shard.index, array.shape, strict=False)
        spans = [part.indices(length)[:2] for part, length in dims]
        place = ",".join(f"{start}:{stop}" for start, stop in spans)
        if place not in found:
            found[place] = digest(_plain(shard.data))
    return found


def digest(array: np.ndarray) -> str:
    """16 bytes of XXH3 of an array's bytes, in hex; ZEROS if all of them are 0."""
    data = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    return xxhash.xxh3_128_hexdigest(data) if data.any() else ZEROS


def _plain(data: jax.Array) -> np.ndarray:
    if jax.dtypes.issubdtype(data.dtype, jax.dtypes.prng_key):
        data = jax.random.key_data(data)
    return np.asarray(data)


def rows_of(batch: Mapping[str, jax.Array]) -> list[tuple[int, str]]:
    """(row of the global batch, digest of its arrays) of the rows that this process holds.

    Args:
      batch: arrays [B, ...], of which dim 0 alone is split.
    """
    names = sorted(batch)
    parts: dict[int, dict[str, np.ndarray]] = {}
    for name in names:
        for shard in batch[name].addressable_shards:
            start = shard.index[0].indices(batch[name].shape[0])[0]
            of_part = parts.setdefault(start, {})
            if name not in of_part:
                of_part[name] = np.asarray(shard.data)
    return [
        (start + i, row_digest([(name, arrays[name][i]) for name in names]))
        for start, arrays in sorted(parts.items())
        for i in range(len(arrays[names[0]]))
    ]


def row_digest(arrays: Sequence[tuple[str, np.ndarray]]) -> str:
    """A digest of an example's arrays, by name."""
    hasher = xxhash.xxh3_64()
    for name, array in arrays:
        hasher.update(f"{name}:{array.dtype}{array.shape}\0".encode())
        hasher.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8))
    return hasher.hexdigest()


def kinds_of(layout: StateLayout) -> dict[str, str]:
    """What every leaf is: `rng`, `batch_statistics`, `params`, `optimizer` or else `model`."""
    variables = nnx.to_flat_state(jax.tree.unflatten(layout.treedef, layout.abstract))
    return {
        name: _kind(name, variable.type, layout)
        for name, (_, variable) in zip(layout.names, variables, strict=True)
    }


def _kind(name: str, kind: type, layout: StateLayout) -> str:
    if issubclass(kind, nnx.RngState):
        return "rng"
    if issubclass(kind, nnx.BatchStat):
        return "batch_statistics"
    if name in layout.params:
        return "params"
    return "optimizer" if name.startswith("optimizer.") else "model"


def local_bytes(layout: StateLayout) -> int:
    """Bytes of the state's different parts on this process, roughly."""
    total = 0
    for leaf in layout.abstract:
        places = set(map(str, leaf.sharding.addressable_devices_indices_map(leaf.shape).values()))
        size = int(np.prod(leaf.sharding.shard_shape(leaf.shape)))
        total += len(places) * size * np.dtype(_width(leaf.dtype)).itemsize
    return total


def _width(dtype: Any) -> Any:
    return np.uint64 if jax.dtypes.issubdtype(dtype, jax.dtypes.prng_key) else dtype
