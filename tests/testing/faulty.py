"""A training in which something befalls one process; see tests.testing.faults."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import grain
import numpy as np

from tests.testing import tiny
from tests.testing.faults import AT_START, befall, is_guilty
from trainer.data.sources import training_order


class Rows(tiny.Rows):
    """Rows of which one cannot be had on the guilty process."""

    def __init__(self, num_rows: int, fault: str, first_bad_read: int):
        super().__init__(num_rows)
        self._fault = fault
        self._reads_left = first_bad_read

    def __getitem__(self, index: Any) -> dict[str, np.ndarray]:
        self._reads_left -= 1
        if self._reads_left < 0 and is_guilty():
            befall(self._fault)
        return super().__getitem__(index)


class Faulty(tiny.Witness):
    """The witness, which reads some batches before it befalls it."""

    def __init__(self, model: Mapping[str, Any], data: Mapping[str, Any]):
        super().__init__(model, data)
        if data["fault"] in AT_START and is_guilty():
            befall(data["fault"])

    def train_data(self, seed: int) -> grain.MapDataset:
        data = self.data_config
        return training_order(Rows(data["num_rows"], data["fault"], data["good_reads"]), seed)
