"""A small convolutional network for square images of one channel.

B examples, S side of the image, C channels, F features, K classes.
"""

from __future__ import annotations

import dataclasses
import itertools

import jax
from flax import nnx

from launch.spec import closest, require

_NORMS = ("batch", "layer")
_KERNEL = (3, 3)
_BATCH_MOMENTUM = 0.9  # Statistics of some ten batches: a run of a few hundred steps is soon right.


@dataclasses.dataclass(frozen=True)
class ConvNetConfig:
    """The shape of a ConvNet.

    Attributes:
      channels: of every block; each halves the image's side.
      norm: `batch`, by the statistics of the global batch (of a microbatch, where there are
        several), or `layer`, by those of each pixel's own channels, so that examples do not
        depend on each other.
      dropout: rate, before the last layer.
    """

    channels: tuple[int, ...] = (32, 64)
    norm: str = "batch"
    dropout: float = 0.2

    def __post_init__(self) -> None:
        ok = bool(self.channels) and all(channels >= 1 for channels in self.channels)
        require(ok, "channels", self.channels, "must be at least 1, for one block or more")
        require(self.norm in _NORMS, "norm", self.norm, closest(self.norm, _NORMS))
        require(0 <= self.dropout < 1, "dropout", self.dropout, "must be in [0, 1)")


class Block(nnx.Module):
    """Convolution, norm, ReLU, and a maximum over each 2 x 2 pixels."""

    def __init__(self, num_inputs: int, num_outputs: int, norm: str, rngs: nnx.Rngs):
        # No bias: the norm has one, and would take this one out again.
        self.conv = nnx.Conv(num_inputs, num_outputs, _KERNEL, use_bias=False, rngs=rngs)
        self.norm: nnx.BatchNorm | nnx.LayerNorm
        if norm == "batch":
            # No axis_name: the step is one program for the whole mesh, in which a mean over the
            # batch is that over the global batch.
            self.norm = nnx.BatchNorm(num_outputs, momentum=_BATCH_MOMENTUM, rngs=rngs)
        else:
            self.norm = nnx.LayerNorm(num_outputs, rngs=rngs)

    def __call__(self, x_BSSC: jax.Array) -> jax.Array:
        """[B, S, S, C] to [B, S / 2, S / 2, C of this block]."""
        return nnx.max_pool(nnx.relu(self.norm(self.conv(x_BSSC))), (2, 2), strides=(2, 2))


class ConvNet(nnx.Module):
    """Blocks, dropout and one linear layer. Its parameters name no axes: `fsdp` splits them.

    Args:
      side: of the images; every block halves it.
      num_classes: K.
      config: the shape; `side` must be a multiple of 2 ** len(config.channels).
      rngs: `params` for the weights, `dropout` afterwards.
    """

    def __init__(self, side: int, num_classes: int, config: ConvNetConfig, rngs: nnx.Rngs):
        self.side = side
        channels = (1, *config.channels)
        self.blocks = nnx.List(
            [
                Block(below, above, config.norm, rngs)
                for below, above in itertools.pairwise(channels)
            ]
        )
        side_left = side >> len(config.channels)
        self.dropout = nnx.Dropout(config.dropout, rngs=rngs)
        self.head = nnx.Linear(side_left**2 * channels[-1], num_classes, rngs=rngs)

    def __call__(self, images_BSS: jax.Array) -> jax.Array:
        """[B, S, S] float32 of about unit size to [B, K] logits."""
        x_BSSC = images_BSS[..., None]
        for block in self.blocks:
            x_BSSC = block(x_BSSC)
        features_BF = x_BSSC.reshape(x_BSSC.shape[0], -1)
        return self.head(self.dropout(features_BF))

    def multiplications(self) -> int:
        """How many weights an image is multiplied by; works on an abstract model too."""
        count, side = self.head.kernel.size, self.side
        for block in self.blocks:
            count += side**2 * block.conv.kernel.size
            side //= 2
        return count
