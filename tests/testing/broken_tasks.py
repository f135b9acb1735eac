"""Tasks that do not resume, each in the way that its name says; `muster certify` must name it.

    muster certify --config=tests/testing/configs/broken.py:iterator ...

`sound` is the same without any fault.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.experimental import io_callback

from trainer.data.sources import fixed_order, training_order
from trainer.task import Task

WIDTH = 8
NUM_ROWS = 96


class Rows:
    """Row i is drawn from a generator of its own."""

    def __len__(self) -> int:
        return NUM_ROWS

    def __getitem__(self, index: Any) -> dict[str, np.ndarray]:
        return {"x": np.random.default_rng(int(index)).normal(size=WIDTH).astype(np.float32)}


class Sound(Task):
    """Regression onto the sum of the inputs, with nothing wrong."""

    def make_model(self, rngs: nnx.Rngs) -> nnx.Module:
        return nnx.Sequential(nnx.Dropout(0.1, rngs=rngs), nnx.Linear(WIDTH, 1, rngs=rngs))

    def loss(self, model: Any, batch: Any) -> Any:
        return jnp.mean((model(batch["x"])[:, 0] - jnp.sum(batch["x"], axis=-1)) ** 2)

    def train_data(self, seed: int) -> grain.MapDataset:
        return training_order(Rows(), seed)

    def eval_data(self) -> grain.MapDataset:
        return fixed_order(Rows())


class UnsavedRng(Sound):
    """Noise on the inputs from a generator that lives in the task."""

    def __init__(self, model: Mapping[str, Any], data: Mapping[str, Any]):
        super().__init__(model, data)
        self._rng = np.random.default_rng(0)

    def loss(self, model: Any, batch: Any) -> Any:
        x = batch["x"]
        shape = jax.ShapeDtypeStruct(x.shape, x.dtype)

        def draw() -> np.ndarray:
            return self._rng.normal(scale=0.1, size=shape.shape).astype(shape.dtype)

        noise = jax.lax.stop_gradient(io_callback(draw, shape, ordered=False))
        return super().loss(model, {"x": x + noise})


class _Next(Rows):
    """Rows of a stream, handed out as they are asked for, and kept: the same again for an index."""

    def __init__(self) -> None:
        self._handed_out: dict[int, int] = {}

    def __getitem__(self, index: Any) -> dict[str, np.ndarray]:
        place = self._handed_out.setdefault(int(index), len(self._handed_out))
        return super().__getitem__(place)


class UnsavedIterator(Sound):
    """The position in the data is how much of a stream the source has handed out."""

    def train_data(self, seed: int) -> grain.MapDataset:
        return training_order(_Next(), seed)


class _OfASet(Rows):
    """Rows in the order in which a set of their names comes."""

    def __init__(self) -> None:
        self._names = list({f"row {i}" for i in range(NUM_ROWS)})

    def __getitem__(self, index: Any) -> dict[str, np.ndarray]:
        return super().__getitem__(self._names[int(index)].split()[1])


class SetOrder(Sound):
    """The order of a set decides which row is which."""

    def train_data(self, seed: int) -> grain.MapDataset:
        return training_order(_OfASet(), seed)


class TimeSeeded(Sound):
    """An augmentation whose generator is seeded with the time."""

    def train_data(self, seed: int) -> grain.MapDataset:
        started = time.time_ns() + os.getpid()

        def augment(example: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
            rng = np.random.default_rng([started, int(abs(example["x"][0]) * 1e6)])
            return {"x": example["x"] + rng.normal(size=WIDTH).astype(np.float32)}

        return training_order(Rows(), seed).map(augment)


def forgetful_momentum() -> optax.GradientTransformation:
    """Momentum whose moments are kept on the host, outside of the optimizer's state."""
    moments: dict[int, np.ndarray] = {}

    def remember(number: int, gradient: np.ndarray) -> np.ndarray:
        before = moments.get(number, np.zeros_like(gradient))
        moments[number] = np.asarray(gradient) + np.float32(0.9) * before
        return moments[number]

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        del params
        leaves, structure = jax.tree.flatten(updates)
        moved = [
            -1e-2
            * io_callback(
                lambda g, i=i: remember(i, g), jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), leaf
            )
            for i, leaf in enumerate(leaves)
        ]
        return jax.tree.unflatten(structure, moved), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)
