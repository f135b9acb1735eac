"""The digest of one array, which does not depend on how the array is sharded. Imports no jax.

An array is a row of 32-bit words (16- and 8-bit elements are widened, 64-bit ones are two). Every
word is mixed with its place, and the results are summed modulo 2**32, twice with different mixing:
64 bits. A sum can be taken shard by shard, on the devices that hold the shards, in any order. The
mixing of a word is one to one, so that a change within one word always changes the digest.

`device_digest` computes the same on devices.
"""

from __future__ import annotations

import numpy as np

# Multipliers and shifts of well-known integer hashes (murmur3, xxhash, and the golden ratio).
PLACE, MIX_1, MIX_2, MIX_3 = 0x9E3779B1, 0x85EBCA6B, 0xC2B2AE35, 0x27D4EB2F
SHIFT_1, SHIFT_2, SHIFT_3 = 15, 13, 16
_CHUNK_WORDS = 2**20  # Fits the processor's cache.


def can_digest(dtype: str) -> bool:
    """Whether arrays of a dtype, by its name, have a digest: all but complex and below one byte."""
    return not dtype.startswith("complex") and dtype not in ("int4", "uint4", "int2", "uint2")


def leaf_digest(array: np.ndarray) -> str:
    """16 hexadecimal digits. Keys of random numbers are given as their uint32 data.

    Args:
      array: any shape; a dtype that `can_digest`.
    """
    width = array.dtype.itemsize
    kind = {1: np.uint8, 2: np.uint16}.get(width, np.uint32)
    words = np.ascontiguousarray(array).reshape(-1).view(kind)
    first = second = 0
    for start in range(0, len(words), _CHUNK_WORDS):
        chunk = words[start : start + _CHUNK_WORDS].astype(np.uint32)
        place: np.ndarray = np.arange(start, start + len(chunk), dtype=np.uint64).astype(np.uint32)
        mixed = chunk ^ (place * np.uint32(PLACE))
        mixed *= np.uint32(MIX_1)
        mixed ^= mixed >> np.uint32(SHIFT_1)
        mixed *= np.uint32(MIX_2)
        mixed ^= mixed >> np.uint32(SHIFT_2)
        first += int(mixed.sum(dtype=np.uint64))
        mixed *= np.uint32(MIX_3)
        mixed ^= mixed >> np.uint32(SHIFT_3)
        second += int(mixed.sum(dtype=np.uint64))
    return as_text(first, second)


def as_text(first: int, second: int) -> str:
    """Two sums as a digest."""
    return f"{first % 2**32:08x}{second % 2**32:08x}"
