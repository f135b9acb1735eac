"""Between arrays on devices and their pieces on the host, for local checkpoints."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from trainer.local_catalogue import Catalogue, Leaf, Piece, Placement

State = Mapping[str, jax.Array]
Buffers = dict[Piece, np.ndarray]


def plain(state: State) -> dict[str, jax.Array]:
    """The state with typed PRNG keys as their words. Collective: every process must call this."""
    return {
        name: jax.random.key_data(array) if _is_key(array) else array
        for name, array in state.items()
    }


def _is_key(array: Any) -> bool:
    return jax.dtypes.issubdtype(array.dtype, jax.dtypes.prng_key)


def _kind_of_key(leaf: Any) -> Any:
    kinds: list[Any] = []  # It can be asked of a key only, which there is while one is traced.
    jax.eval_shape(lambda key: kinds.append(jax.random.key_impl(key)), leaf)
    return kinds[0]


def _plain_abstract(leaf: Any) -> Any:
    if not _is_key(leaf):
        return leaf
    words = jax.eval_shape(jax.random.key_data, leaf)
    # What is beyond a PartitionSpec's end is not split.
    return jax.ShapeDtypeStruct(words.shape, words.dtype, sharding=leaf.sharding)


def catalogue(state: Mapping[str, Any], directories: Sequence[int]) -> Catalogue:
    """Who holds what of a state.

    Args:
      state: dotted name -> array or ShapeDtypeStruct with a sharding, over all processes.
      directories: see `Catalogue`.
    """
    placements: dict[Placement, int] = {}
    leaves = {}
    for name, array in state.items():
        leaf = _plain_abstract(array)
        placement = _placement(name, leaf)
        number = placements.setdefault(placement, len(placements))
        leaves[name] = Leaf(tuple(leaf.shape), np.dtype(leaf.dtype).name, number)
    return Catalogue(leaves, list(placements), list(directories))


def _placement(name: str, leaf: Any) -> Placement:
    indices = leaf.sharding.devices_indices_map(tuple(leaf.shape))
    starts = [
        sorted({index[dim].indices(size)[0] for index in indices.values()})
        for dim, size in enumerate(leaf.shape)
    ]
    grid = tuple(len(found) for found in starts)
    holders: dict[int, set[int]] = {}
    for device, index in indices.items():
        holders.setdefault(_box_number(leaf.shape, grid, index), set()).add(device.process_index)
    equal = all(size % parts == 0 for size, parts in zip(leaf.shape, grid, strict=True))
    if not equal or sorted(holders) != list(range(int(np.prod(grid)))):
        raise AssertionError(f"{name}: {leaf.sharding} does not cut {leaf.shape} into equal boxes")
    return Placement(grid, tuple(tuple(sorted(holders[box])) for box in range(len(holders))))


def _box_number(shape: Sequence[int], grid: Sequence[int], index: Sequence[slice]) -> int:
    number = 0
    for size, parts, part in zip(shape, grid, index, strict=True):
        number = number * parts + part.indices(size)[0] // max(1, size // parts)
    return number


def on_host(state: State, known: Catalogue, pieces: Sequence[Piece]) -> list[np.ndarray]:
    """The bytes of pieces that this process holds, each once.

    Args:
      state: from `plain`.
      known: its catalogue.
      pieces: which.

    Returns:
      For each piece an array in the shape of its box; on CPU it is the device's own memory, which
      must not be donated while somebody reads it.
    """
    shards = {}
    for name, array in state.items():
        grid = known.placements[known.leaves[name].placement].grid
        for shard in array.addressable_shards:
            shards[Piece(name, _box_number(array.shape, grid, shard.index))] = shard.data
    for piece in pieces:
        shards[piece].copy_to_host_async()  # All of them are on their way before one is waited for.
    return [np.asarray(shards[piece]) for piece in pieces]


def empty(wanted: Catalogue, process: int) -> Buffers:
    """Memory for everything that a process is to hold."""
    buffers: Buffers = {}
    for piece in wanted.held_by(process):
        shape = [stop - start for start, stop in wanted.box(piece)]
        buffers[piece] = np.empty(shape, wanted.leaves[piece.leaf].dtype)
    return buffers


def on_devices(
    abstract: Mapping[str, Any], wanted: Catalogue, buffers: Buffers
) -> dict[str, jax.Array]:
    """Arrays of the buffers, which are used up. Collective: every process must call this.

    Args:
      abstract: dotted name -> ShapeDtypeStruct with a sharding.
      wanted: its catalogue.
      buffers: what this process is to hold.
    """
    state = {}
    for name, leaf in abstract.items():
        words = _plain_abstract(leaf)
        grid = wanted.placements[wanted.leaves[name].placement].grid

        def part(index: Any, name: str = name, words: Any = words, grid: Any = grid) -> np.ndarray:
            return buffers[Piece(name, _box_number(words.shape, grid, index))]

        array = jax.make_array_from_callback(words.shape, leaf.sharding, part)
        if _is_key(leaf):
            wrap = functools.partial(jax.random.wrap_key_data, impl=_kind_of_key(leaf))
            array = jax.jit(wrap, out_shardings=leaf.sharding)(array)
        state[name] = array
    return state
