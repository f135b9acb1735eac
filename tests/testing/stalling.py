"""A small training that comes to a stand somewhere, in C or in Python, on some processes."""

from __future__ import annotations

import ctypes
import os
import threading
from typing import Any

import grain

from launch import contract
from tests.testing import tiny
from trainer import checkpoint


class Stalling(tiny.Witness):
    """Stalls in `restore` or `compile`, or when it reads `data` or held-out data (`eval`)."""

    def __init__(self, model: Any, data: Any):
        super().__init__(model, data)
        if self.data_config["where"] == "restore":
            read_step = checkpoint.read_step

            def stall(*args: Any) -> Any:
                self._stall("restore")
                return read_step(*args)

            checkpoint.read_step = stall

    def _stall(self, where: str) -> None:
        process = int(os.environ.get(contract.PROCESS_ID, "0"))
        if where != self.data_config["where"] or self.data_config["process"] not in (-1, process):
            return
        print(f"stalls in {where}", flush=True)
        if where in ("restore", "compile"):
            # As storage and compilers do: in C, where no Python signal handler can run.
            libc, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(64)
            libc.pthread_mutex_lock(mutex)
            libc.pthread_mutex_lock(mutex)
        threading.Event().wait()

    def loss(self, model: Any, batch: Any) -> Any:
        self._stall("compile")
        return super().loss(model, batch)

    def train_data(self, seed: int) -> grain.MapDataset:
        dataset = super().train_data(seed)
        limit = self.data_config["num_rows"] * self.data_config["epochs"]
        return dataset.map_with_index(lambda index, row: self._row(index, row, "data", limit))

    def eval_data(self) -> grain.MapDataset:
        rows = grain.MapDataset.source(tiny.Rows(64))
        return rows.map_with_index(lambda index, row: self._row(index, row, "eval", 16))

    def _row(self, index: int, row: Any, where: str, limit: int) -> Any:
        if index >= limit:
            self._stall(where)
        return row
