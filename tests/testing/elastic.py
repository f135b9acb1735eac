"""A training on packed, filtered and mixed documents that remembers every row it has seen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import grain
import jax.numpy as jnp
import numpy as np
from flax import nnx

from launch.spec import build
from tests.testing import tiny
from tests.testing.configs.elastic import SEQ_LEN
from trainer.data.records import write_token_records
from trainer.task import Task
from trainer.tasks.language_data import DataConfig, LanguageData


def write_documents(directory: Path) -> dict[str, str]:
    """One file of documents for each source; returns their paths."""
    rng = np.random.default_rng(0)
    paths = {}
    for source, (name, count) in enumerate({"web": 90, "books": 60}.items()):
        paths[name] = str(directory / f"{name}.array_record")
        lengths = rng.integers(1, 40, count)
        documents = (source * 30_000 + d * 100 + np.arange(n) for d, n in enumerate(lengths))
        write_token_records(paths[name], documents, any_length=True)
    return paths


def is_kept(example: Any) -> bool:
    """The filter of `web`."""
    return int(example["tokens"][0]) // 100 % 4 != 0


class Net(nnx.Module):
    """One weight, and what was seen."""

    def __init__(self, rngs: nnx.Rngs):
        self.layer = nnx.Linear(SEQ_LEN + 1, 1, rngs=rngs)
        self.seen = tiny.Seen(jnp.zeros((), jnp.int32))


class ElasticWitness(Task):
    """Its state holds a fingerprint of every row of every global batch, in order."""

    def make_model(self, rngs: nnx.Rngs) -> Net:
        return Net(rngs)

    def loss(self, model: Net, batch: Any) -> Any:
        model.seen.set_value(next_fingerprint(jnp, model.seen.get_value(), batch))
        return jnp.mean(model.layer(batch["segment_ids"].astype(jnp.float32)) ** 2)

    def train_data(self, seed: int) -> grain.MapDataset:
        return LanguageData(build(DataConfig, self.data_config, "config.data")).train(seed)

    def describe(self) -> str:
        return LanguageData(build(DataConfig, self.data_config, "config.data")).describe()


def next_fingerprint(xp: Any, seen: Any, batch: Any) -> Any:
    """int32: what was seen before, and the place of each token and document now."""
    total = xp.int32(0)
    for number, key in enumerate(("tokens", "segment_ids"), 1):
        values = batch[key].astype(xp.int32)
        places = xp.arange(1, values.size + 1, dtype=xp.int32).reshape(values.shape)
        total = total + number * xp.sum(places * (values + 7), dtype=xp.int32)
    return seen * xp.int32(31) + total
