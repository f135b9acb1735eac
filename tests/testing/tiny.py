"""A task that remembers what it has seen, and what its runs must have seen and have kept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import SingleDeviceSharding

from launch import contract
from launch.spec import CheckpointSpec
from tests.testing.configs.tiny import ROOT, get_config
from trainer import storage
from trainer.checkpoint import Checkpointer
from trainer.data.sources import training_order
from trainer.task import Task

__all__ = ["ROOT", "get_config"]


class Seen(nnx.Variable):
    """A fingerprint of the rows consumed and their order; neither trained nor replaced."""


class Net(nnx.Module):
    """Two unnamed layers with dropout in between."""

    def __init__(self, rngs: nnx.Rngs):
        self.up = nnx.Linear(8, 16, rngs=rngs)
        self.dropout = nnx.Dropout(0.2, rngs=rngs)
        self.down = nnx.Linear(16, 1, rngs=rngs)
        self.seen = Seen(jnp.zeros((), jnp.int32))


class Rows:
    """Row i is drawn from a generator of its own."""

    def __init__(self, num_rows: int):
        self._num_rows = num_rows

    def __len__(self) -> int:
        return self._num_rows

    def __getitem__(self, index: Any) -> dict[str, np.ndarray]:
        x = np.random.default_rng(int(index)).normal(size=8).astype(np.float32)
        return {"x": x, "row": np.int32(index)}


class Witness(Task):
    """Regression whose state holds RNGs, and a fingerprint of every row in order."""

    def make_model(self, rngs: nnx.Rngs) -> Net:
        return Net(rngs)

    def loss(self, model: Net, batch: Any) -> Any:
        place = jnp.arange(1, batch["row"].shape[0] + 1)
        model.seen.set_value(model.seen.get_value() * 31 + jnp.sum(place * (batch["row"] + 7)))
        out = model.down(model.dropout(nnx.relu(model.up(batch["x"]))))
        # bad_row: a row whose target is not a number; -1 for all of them.
        bad = (batch["row"] == self.data_config["bad_row"]) | (self.data_config["bad_row"] == -1)
        target = jnp.where(bad, jnp.nan, jnp.sum(batch["x"], axis=-1))
        return jnp.mean((out[:, 0] - target) ** 2)

    def train_data(self, seed: int) -> grain.MapDataset:
        return training_order(Rows(self.data_config["num_rows"]), seed)


def fingerprint(num_steps: int, batch_size: int = 16, num_rows: int = 100, seed: int = 3) -> int:
    """What `Seen` must hold after `num_steps`, computed from the data alone."""
    value = np.int32(0)
    with np.errstate(over="ignore"):
        for step in range(num_steps):
            rows = rows_of_step(step, batch_size, num_rows, seed)
            total = np.int32(sum((i + 1) * (row + 7) for i, row in enumerate(rows)))
            value = np.int32(value * np.int32(31) + total)
    return int(value)


def rows_of_step(step: int, batch_size: int = 16, num_rows: int = 100, seed: int = 3) -> list[int]:
    """The rows of the batch after `step` updates, from the data alone."""
    data = training_order(Rows(num_rows), seed)
    return [int(data[step * batch_size + i]["row"]) for i in range(batch_size)]


def read_state(workdir: Path | str, step: int) -> dict[str, np.ndarray]:
    """Every leaf of a run's newest checkpoint by name, whole, on this process."""
    where = SingleDeviceSharding(jax.devices()[0])
    ledger = json.loads(storage.read_text(f"{workdir}/{contract.LEDGER_RECORD}"))
    abstract = {
        leaf["name"]: jax.ShapeDtypeStruct(leaf["shape"], _dtype(leaf["dtype"]), sharding=where)
        for leaf in ledger["leaves"]
    }
    saver = Checkpointer(f"{workdir}/{contract.CHECKPOINTS}", CheckpointSpec(), config={})
    restored = saver.restore(abstract)
    saver.close()
    assert restored is not None
    assert restored.step == step
    return {name: _plain(value) for name, value in restored.state.items()}


def _dtype(name: str) -> Any:
    return jax.random.key(0).dtype if name.startswith("key<") else jnp.dtype(name)


def _plain(value: Any) -> np.ndarray:
    if jax.dtypes.issubdtype(value.dtype, jax.dtypes.prng_key):
        value = jax.random.key_data(value)
    return np.asarray(value)
