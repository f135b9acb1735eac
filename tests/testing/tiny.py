"""Small trainings for tests: a language model, and a task that remembers what it has seen."""

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
from ml_collections import ConfigDict

from launch import contract
from launch.spec import CheckpointSpec
from trainer import storage
from trainer.checkpoint import Checkpointer
from trainer.data.sources import training_order
from trainer.task import Task

ROOT = Path(__file__).resolve().parents[2]


def get_config(task: str = "lm") -> ConfigDict:
    """`lm`, `witness` or `around` (a witness that one row spoils, with everything around its
    chain); usable as `--config=tests/testing/tiny.py:witness`."""
    config = ConfigDict()
    config.seed = 3
    config.num_steps = 6
    config.global_batch_size = 16
    config.num_microbatches = 1
    config.log_every_steps = 1
    config.optimizer = ConfigDict({"chain": ("clip_by_global_norm", "adamw")})
    config.optimizer.clip_by_global_norm = ConfigDict({"max_norm": 1.0})
    config.optimizer.adamw = ConfigDict({"learning_rate": 1e-2, "weight_decay": 0.1})
    config.mesh = ConfigDict({"data": -1, "fsdp": 1, "tensor": 1, "dcn_data": 1, "dcn_fsdp": 1})
    config.sharding = ConfigDict({"rules": ()})
    config.checkpoint = ConfigDict({"every_steps": 0, "every_seconds": 0.0, "keep_last": 3})
    config.eval = ConfigDict({"every_steps": 0, "num_batches": 2})
    if task == "lm":
        config.task = "trainer.tasks.language_model:LanguageModel"
        config.model = ConfigDict({"vocab_size": 256, "dim": 32, "num_layers": 2, "mlp_dim": 64})
        config.model.num_heads = 4
        config.model.num_kv_heads = 2
        config.data = ConfigDict({"kind": "bytes", "path": str(ROOT / "LICENSE"), "seq_len": 32})
        config.data.eval_every = 10
    else:
        config.task = "tests.testing.tiny:Witness"
        config.model = ConfigDict()
        config.data = ConfigDict({"num_rows": 100, "bad_row": -2})
    if task == "around":
        config.data.bad_row = 5
        config.eval.params = "ema"
        config.sharding.optimizer_axes = ("data",)
        config.optimizer = ConfigDict({"chain": ("clip_by_global_norm", "partition")})
        config.optimizer.clip_by_global_norm = ConfigDict({"max_norm": 1.0})
        sgd = {"chain": ("sgd",), "sgd": {"learning_rate": 1e-2, "momentum": 0.9}}
        adamw = {"chain": ("adamw",), "adamw": {"learning_rate": 1e-2}}
        config.optimizer.partition = ConfigDict({"transforms": {"biases": sgd, "rest": adamw}})
        config.optimizer.partition.param_labels = (("bias", "biases"), (".*", "rest"))
        config.optimizer.no_decay = ("up",)
        config.optimizer.ema_decay = 0.9
        config.optimizer.skip = ConfigDict({"loss_sigmas": 8.0, "max_in_a_row": 3})
    return config


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
