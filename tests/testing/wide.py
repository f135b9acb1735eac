"""A training of a few large matrices: it compiles in no time and fills any memory."""

from __future__ import annotations

from typing import Any

import grain
import jax
import jax.numpy as jnp
from flax import nnx

from trainer.task import Task


class Matrices(nnx.Module):
    """One matrix after the other."""

    def __init__(self, depth: int, width: int, rngs: nnx.Rngs):
        self.all_LIO = nnx.Param(jax.random.normal(rngs.params(), (depth, width, width)))

    def __call__(self, x_BI: jax.Array) -> jax.Array:
        return jax.lax.scan(
            lambda x, matrix: (jnp.tanh(x @ matrix), None), x_BI, self.all_LIO[...]
        )[0]


class Wide(Task):
    """Learns nothing."""

    def make_model(self, rngs: nnx.Rngs) -> Matrices:
        return Matrices(self.model_config["depth"], self.model_config["width"], rngs)

    def loss(self, model: Matrices, batch: Any) -> jax.Array:
        return jnp.mean(model(batch["x"]) ** 2)

    def example_spec(self) -> dict[str, Any]:
        return {"x": jax.ShapeDtypeStruct((self.model_config["width"],), jnp.float32)}

    def train_data(self, seed: int) -> grain.MapDataset:
        raise AssertionError("a plan needs no data")
