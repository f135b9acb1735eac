"""A witness that is another one on one process; see tests.testing.configs.odd."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import metadata
from typing import Any

from tests.testing import tiny
from tests.testing.configs.odd import is_odd


class Odd(tiny.Witness):
    """The witness, another one on one process."""

    def __init__(self, model: Mapping[str, Any], data: Mapping[str, Any]):
        super().__init__(model, data)
        if is_odd("start", data["odd"]):
            version = metadata.version
            metadata.version = lambda name: "0.0.1" if name == "flax" else version(name)

    def loss(self, model: tiny.Net, batch: Any) -> Any:
        more = 2.0 if is_odd("program", self.data_config["odd"]) else 1.0
        return super().loss(model, batch) * more
