"""What the run trains: the witness, whose data is slow or waits as files of the driver say."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import grain

from launch import contract
from tests.testing import tiny
from tests.testing.chaos.config import BATCH_SIZE

CONTROL = "CHAOS_CONTROL"  # The folder of those files; without it data just comes.
GATE = "gate"  # No batch from this one on may be read.
SLOW = "slow"  # {"process": 1, "seconds": 0.5}: what one batch takes there.
CLOCK = "clock"  # By how many seconds the clock is off (hook/sitecustomize).
FELT = "felt"  # A folder: files that say what was met.
_PACE_SECONDS = 0.005  # A step takes about so long: it can be hit.


class Chaotic(tiny.Witness):
    """The witness. What it reads does not depend on when."""

    def train_data(self, seed: int) -> grain.MapDataset:
        control = os.environ.get(CONTROL)
        if control is None:
            return super().train_data(seed)
        return super().train_data(seed).map_with_index(_Slowly(Path(control)))


class _Slowly:
    """Waits before the first row of a batch is handed over."""

    def __init__(self, control: Path):
        self._control = control
        self._batch = -1

    def __call__(self, index: int, row: Any) -> Any:
        batch = index // BATCH_SIZE
        if batch != self._batch:
            self._batch = batch
            self._wait(batch)
        return row

    def _wait(self, batch: int) -> None:
        time.sleep(_PACE_SECONDS)
        slow = self._read(SLOW)
        me = os.environ.get(contract.PROCESS_ID)
        if slow and str(slow["process"]) == me:
            (self._control / FELT / f"{SLOW}-{batch}").touch()
            time.sleep(slow["seconds"])
        while True:
            gate = self._read(GATE)
            if gate is None or batch < gate:
                return
            time.sleep(0.01)

    def _read(self, name: str) -> Any:
        try:
            return json.loads((self._control / name).read_bytes())
        except (OSError, ValueError):
            return None
