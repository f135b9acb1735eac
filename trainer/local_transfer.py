"""Bytes from the processes that have them to all processes, over the links that training uses.

No port is opened and nothing has to be authenticated: a block of bytes is a sum over processes of
which all but one add zeros. Integers, so that every bit arrives as it was.
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

# Of one block. A device takes its part of it twice: as it goes out, and as it comes in.
BLOCK_BYTES = 64 * 2**20
_WORD = np.dtype(np.uint32)


def possible() -> bool:
    """Have all processes the same number of devices? Only then is there a way here."""
    counts = collections.Counter(device.process_index for device in jax.devices())
    return len(set(counts.values())) == 1


class Exchange:
    """Sends blocks to all processes. Collective: every process must make one.

    Args:
      total_bytes: how much there is to send, alike on all processes.
    """

    def __init__(self, total_bytes: int):
        by_process = sorted(jax.devices(), key=lambda device: (device.process_index, device.id))
        processes = jax.process_count()
        columns = jax.local_device_count()
        row = columns * _WORD.itemsize
        self.block_bytes = -(-min(max(1, total_bytes), BLOCK_BYTES) // row) * row
        mesh = Mesh(np.array(by_process).reshape(processes, columns), ("process", "device"))
        self._shape = (processes, self.block_bytes // _WORD.itemsize)
        self._split = NamedSharding(mesh, P("process", "device"))
        self._sum = jax.jit(
            lambda words: words.sum(axis=0, dtype=_WORD),
            out_shardings=NamedSharding(mesh, P("device")),
        )

    def send(self, block: np.ndarray) -> np.ndarray:
        """Add up the blocks of all processes. Collective: every process must call this.

        Args:
          block: [block_bytes] uint8; zeros where this process is not the source.

        Returns:
          [block_bytes] uint8, the same on all processes.
        """
        words = block.view(_WORD)[None]
        mine = jax.make_array_from_callback(
            self._shape, self._split, lambda index: words[:, index[1]]
        )
        total = self._sum(mine)
        out = np.empty(self._shape[1], _WORD)
        for shard in total.addressable_shards:
            out[shard.index] = jax.device_get(shard.data)
        return out.view(np.uint8)


def exchange(
    sizes: Sequence[int], give: Callable[[int], np.ndarray | None]
) -> Iterator[tuple[int, np.ndarray]]:
    """Send parts of any size, packed into blocks. Collective: every process must go through it.

    Args:
      sizes: bytes of every part, alike on all processes.
      give: part number -> [bytes] uint8 on its source, None on all others. Called once per part,
        in order.

    Yields:
      Part number and its bytes, [bytes] uint8, in order; the array is the receiver's own.
    """
    total = sum(sizes)
    if not total:
        yield from ((part, np.empty(0, np.uint8)) for part in range(len(sizes)))
        return
    wire = Exchange(total)
    # A part may begin anywhere in a block, and go on in the next ones.
    sending, out_at, outgoing = 0, 0, None  # part, its next byte, and its bytes where it is ours
    receiving, in_at = 0, 0
    incoming: np.ndarray = np.empty(sizes[0], np.uint8)
    for _ in range(-(-total // wire.block_bytes)):
        block = np.zeros(wire.block_bytes, np.uint8)
        filled = 0
        while sending < len(sizes) and filled < len(block):
            if out_at == 0:
                outgoing = give(sending)
            count = min(sizes[sending] - out_at, len(block) - filled)
            if outgoing is not None:
                block[filled : filled + count] = outgoing[out_at : out_at + count]
            filled, out_at = filled + count, out_at + count
            if out_at == sizes[sending]:
                sending, out_at, outgoing = sending + 1, 0, None
        block, taken = wire.send(block), 0
        while receiving < len(sizes):
            count = min(sizes[receiving] - in_at, len(block) - taken)
            incoming[in_at : in_at + count] = block[taken : taken + count]
            taken, in_at = taken + count, in_at + count
            if in_at < sizes[receiving]:
                break
            yield receiving, incoming
            receiving, in_at = receiving + 1, 0
            if receiving < len(sizes):
                incoming = np.empty(sizes[receiving], np.uint8)
