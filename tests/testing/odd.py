"""A training in which process 1 is not like the others, as its config names it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from importlib import metadata
from typing import Any

from launch import contract
from tests.testing import tiny


class Odd(tiny.Witness):
    """The witness, another one on process 1."""

    def __init__(self, model: Mapping[str, Any], data: Mapping[str, Any]):
        super().__init__(model, data)
        self._is_odd = os.environ.get(contract.PROCESS_ID) == "1"
        if self._is_odd and data["odd"] == "package":
            version = metadata.version
            metadata.version = lambda name: "0.0.1" if name == "flax" else version(name)

    def loss(self, model: tiny.Net, batch: Any) -> Any:
        more = 2.0 if self._is_odd and self.data_config["odd"] == "program" else 1.0
        return super().loss(model, batch) * more


def get_config(odd: str) -> Any:
    """`package`, `program` or `config`: what process 1 has otherwise."""
    config = tiny.get_config("witness")
    config.task = "tests.testing.odd:Odd"
    config.data.odd = odd
    config.global_batch_size = 12
    if odd == "config" and os.environ.get(contract.PROCESS_ID) == "1":
        config.seed = 4
    return config
