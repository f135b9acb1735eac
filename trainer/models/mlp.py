"""A multi-layer perceptron. B examples, I inputs, O outputs."""

from __future__ import annotations

import dataclasses
import itertools

import jax
from flax import nnx

from launch.spec import require


@dataclasses.dataclass(frozen=True)
class MLPConfig:
    """The shape of an MLP.

    Attributes:
      hidden: width of every hidden layer; () for a linear model.
    """

    hidden: tuple[int, ...] = (64, 64)

    def __post_init__(self) -> None:
        ok = all(width >= 1 for width in self.hidden)
        require(ok, "hidden", self.hidden, "every width must be at least 1")


class MLP(nnx.Module):
    """Linear layers with GELU in between; its parameters are `layers.N.kernel` and `.bias`.

    They name no axes, so each is split over the mesh's `fsdp` by itself.
    """

    def __init__(self, num_inputs: int, config: MLPConfig, num_outputs: int, rngs: nnx.Rngs):
        widths = (num_inputs, *config.hidden, num_outputs)
        self.layers = nnx.List(
            [nnx.Linear(below, above, rngs=rngs) for below, above in itertools.pairwise(widths)]
        )

    def __call__(self, x_BI: jax.Array) -> jax.Array:
        """[B, I] to [B, O]."""
        *hidden, last = self.layers
        for layer in hidden:
            x_BI = nnx.gelu(layer(x_BI))
        return last(x_BI)
