"""The trainer on a process whose memory forgets: one bit of one parameter flips on one device."""

from __future__ import annotations

import ctypes
import os
from typing import Any

from launch import contract
from trainer import main
from trainer.replicas import ReplicaCheck

AT_STEP, PROCESS, LEAF = 4, "1", "model.up.kernel"

check = ReplicaCheck.check


def flip_and_check(self: Any, step: int, leaves: Any) -> None:
    """Flip a bit where the parameter lies, then go on as always."""
    if step == AT_STEP and os.environ[contract.PROCESS_ID] == PROCESS:
        leaf = leaves[self._layout.names.index(LEAF)].block_until_ready()
        at = leaf.addressable_shards[-1].data.unsafe_buffer_pointer()
        ctypes.c_uint8.from_address(at + 5).value ^= 4
    check(self, step, leaves)


if __name__ == "__main__":
    ReplicaCheck.check = flip_and_check  # type: ignore[method-assign]
    main.main()
