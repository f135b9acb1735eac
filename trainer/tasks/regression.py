"""Regression by mean squared error on a known function with noise of known variance.

The function is the first of Friedman's (Multivariate Adaptive Regression Splines, 1991), a standard
test of regression: smooth, nonlinear, with an interaction, and inputs that mean nothing. No model
can get below the variance of the noise, so a loss can be judged.

B examples, I inputs, N rows.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from launch.spec import build, require
from trainer.models.mlp import MLP, MLPConfig
from trainer.task import Batch, Loss, Task

NOT_MEASURED = -999.0  # The target of a row without weight, as data files mark what is missing.

_INPUTS_USED = 5  # By the function, of those that a row has.


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """What data to generate. Row i is the same whatever the other rows are used for.

    Attributes:
      num_rows: rows to train on.
      num_eval_rows: rows held out.
      num_inputs: per row, uniform in [-1, 1); the function uses the first five of them.
      noise: standard deviation of what is added to the target.
      mask_fraction: of the rows, drawn at random: these have weight 0 and no target.
      seed: of the generator.
    """

    num_rows: int = 8192
    num_eval_rows: int = 2048
    num_inputs: int = 10
    noise: float = 1.0
    mask_fraction: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (
            ("num_rows", 1),
            ("num_eval_rows", 2),
            ("num_inputs", _INPUTS_USED),
            ("noise", 0),
            ("seed", 0),
        ):
            value = getattr(self, name)
            require(value >= least, name, value, f"must be at least {least}")
        fraction = self.mask_fraction
        rule = "must be in [0, 1): a fraction of the rows, and some rows must be left"
        require(0 <= fraction < 1, "mask_fraction", fraction, rule)


class Regression(Task):
    """An MLP fits Friedman's function. `config.model` is an MLPConfig, `config.data` a
    DataConfig.
    """

    def __init__(self, model: Mapping[str, Any], data: Mapping[str, Any]):
        super().__init__(model, data)
        self.model = build(MLPConfig, model, "config.model")
        self.data = build(DataConfig, data, "config.data")

    def make_model(self, rngs: nnx.Rngs) -> MLP:
        """A fresh MLP with one output."""
        return MLP(self.data.num_inputs, self.model, 1, rngs)

    def loss(self, model: MLP, batch: Batch) -> Loss:
        """Squared error over the rows that have weight.

        Args:
          model: from `make_model`.
          batch: `x` [B, I], `y` [B] and `weight` [B], float32.
        """
        return mse_loss(model, batch["x"], batch["y"], batch["weight"])

    def train_data(self, seed: int) -> grain.MapDataset:
        """Shuffled anew every epoch, for ever: elements are `{'x': [I], 'y': [], 'weight': []}`."""
        from trainer.data.sources import training_order

        return training_order(self._train, seed)

    def eval_data(self) -> grain.MapDataset:
        """Held-out rows in their own order."""
        from trainer.data.sources import fixed_order

        return fixed_order(self._held_out)

    @functools.cached_property
    def _train(self) -> Rows:
        return make_rows(self.data, self.data.num_rows, split=0)

    @functools.cached_property
    def _held_out(self) -> Rows:
        return make_rows(self.data, self.data.num_eval_rows, split=1)

    def describe(self) -> str:
        """How much data there is, and between what its loss must lie."""
        masked = (
            f", {self.data.mask_fraction:.0%} of them masked" if self.data.mask_fraction else ""
        )
        return (
            f"data: {self.data.num_rows:,} rows of {self.data.num_inputs} inputs{masked}; a mean "
            f"squared error of {self._held_out.variance:.2f} is that of guessing the mean, and "
            f"{self.data.noise**2:.2f} is the noise"
        )

    def flops_per_example(self, model: MLP) -> float:
        """Six for every weight of a kernel: a multiplication and an addition, and twice back."""
        return 6.0 * sum(layer.kernel.size for layer in model.layers)

    def verdict(self, eval_loss: float) -> str:
        """The held-out loss beside the best and the worst that it could sensibly be."""
        return (
            f"held-out mean squared error {eval_loss:.3f} (noise {self.data.noise**2:.3f}, "
            f"variance of the target {self._held_out.variance:.2f})"
        )

    def finish(self, model: MLP, key: jax.Array) -> Mapping[str, jax.Array]:
        """R^2 over the held-out rows: the part of the target's variance that is explained."""
        del key
        rows = self._held_out
        total, weight = mse_loss(model, *map(jnp.asarray, (rows.x, rows.y, rows.weight)))
        return {"r_squared": 1 - total / weight / rows.variance}

    def show(self, results: Mapping[str, Any]) -> str:
        """R^2 beside the largest that the noise leaves possible."""
        possible = 1 - self.data.noise**2 / self._held_out.variance
        return f"R^2 on held-out rows {results['r_squared']:.4f} (the noise allows {possible:.4f})"


def mse_loss(model: MLP, x_BI: jax.Array, y_B: jax.Array, weight_B: jax.Array) -> Loss:
    """The squared error of the model's one output, weighted and summed over B examples.

    The target of an example without weight may be anything.
    """
    # Not a product with 0 afterwards: that of NaN is NaN, in the gradient if not in the loss.
    y_B = jnp.where(weight_B > 0, y_B, 0.0)
    squared_B = optax.squared_error(model(x_BI)[:, 0], y_B)
    return Loss(jnp.sum(weight_B * squared_B), jnp.sum(weight_B))


def friedman(x_NI: np.ndarray) -> np.ndarray:
    """Friedman's function, [N, I] to [N]. His inputs are in [0, 1], these in [-1, 1]."""
    x_NI = (x_NI + 1) / 2
    return (
        10 * np.sin(np.pi * x_NI[:, 0] * x_NI[:, 1])
        + 20 * (x_NI[:, 2] - 0.5) ** 2
        + 10 * x_NI[:, 3]
        + 5 * x_NI[:, 4]
    )


@dataclasses.dataclass(frozen=True, eq=False)
class Rows:
    """Generated rows, by index, as Grain reads a source.

    Attributes:
      x: [N, I] float32.
      y: [N] float32, NOT_MEASURED where the weight is 0.
      weight: [N] float32, 0 or 1.
    """

    x: np.ndarray
    y: np.ndarray
    weight: np.ndarray

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, index: Any) -> dict[str, np.ndarray]:
        return {"x": self.x[index], "y": self.y[index], "weight": self.weight[index]}

    @property
    def variance(self) -> float:
        """Of the targets that count."""
        return float(np.var(self.y[self.weight > 0]))


def make_rows(data: DataConfig, num_rows: int, split: int) -> Rows:
    """Generate the first `num_rows` of a split.

    Inputs, noise and masks are drawn from generators of their own, so that more rows or another
    mask leave the rest as it is.
    """
    of_x, of_noise, of_mask = (
        np.random.default_rng((data.seed, split, stream)) for stream in range(3)
    )
    x_NI = of_x.uniform(-1, 1, (num_rows, data.num_inputs))
    y_N = friedman(x_NI) + data.noise * of_noise.normal(size=num_rows)
    weight_N = of_mask.random(num_rows) >= data.mask_fraction
    y_N = np.where(weight_N, y_N, NOT_MEASURED)
    return Rows(*(array.astype(np.float32) for array in (x_NI, y_N, weight_N)))
