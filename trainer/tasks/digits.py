"""Classification of the 1,797 handwritten digits, 8 x 8 pixels each, that scikit-learn ships.

B examples, S side of an image, K classes.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
from collections.abc import Mapping
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from launch.spec import ConfigError, build, require
from trainer.models.vision import ConvNet, ConvNetConfig
from trainer.task import Batch, Loss, Task

SIDE = 8
NUM_CLASSES = 10

_WHITE = 16.0  # Pixels are 0 to 16.


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """How the digits are used.

    Attributes:
      eval_every: one image in how many is held out; 7 leaves 1,541 and holds out 256.
      max_shift: training images are moved by up to so many pixels each way, at random; 0 for off.
    """

    eval_every: int = 7
    max_shift: int = 1

    def __post_init__(self) -> None:
        rule = "must be at least 2: one image in so many is held out"
        require(self.eval_every >= 2, "eval_every", self.eval_every, rule)
        rule = f"must be in [0, {SIDE}), in pixels; images are {SIDE} wide"
        require(0 <= self.max_shift < SIDE, "max_shift", self.max_shift, rule)


class Digits(Task):
    """A ConvNet tells digits apart. `config.model` is a ConvNetConfig, `config.data` a
    DataConfig.
    """

    def __init__(self, model: Mapping[str, Any], data: Mapping[str, Any]):
        super().__init__(model, data)
        self.model = build(ConvNetConfig, model, "config.model")
        self.data = build(DataConfig, data, "config.data")
        blocks = len(self.model.channels)
        if SIDE % 2**blocks:
            rule = f"has {blocks} blocks, each of which halves the image's side {SIDE}; use 1 to 3"
            raise ConfigError("config.model.channels", rule, self.model.channels)
        if importlib.util.find_spec("sklearn") is None:
            rule = "its images come with scikit-learn, which is not installed; run: pip install "
            raise ConfigError("config.task", f"{rule}scikit-learn", "trainer.tasks.digits:Digits")

    def make_model(self, rngs: nnx.Rngs) -> ConvNet:
        """A fresh ConvNet."""
        return ConvNet(SIDE, NUM_CLASSES, self.model, rngs)

    def loss(self, model: ConvNet, batch: Batch) -> Loss:
        """Cross entropy in nats.

        Args:
          model: from `make_model`.
          batch: `image` [B, S, S] uint8 of 0 to 16, and `label` [B] int32.
        """
        logits_BK = model(batch["image"] / _WHITE)
        loss_B = optax.softmax_cross_entropy_with_integer_labels(logits_BK, batch["label"])
        return Loss(jnp.sum(loss_B), jnp.asarray(loss_B.size, jnp.float32))

    def train_data(self, seed: int) -> grain.MapDataset:
        """Shuffled and moved anew every epoch: elements are `{'image': [S, S], 'label': []}`."""
        from trainer.data.sources import training_order

        digits = training_order(self._split.train, seed)
        if not self.data.max_shift:
            return digits
        # Grain's generator depends on the seed and on the place in the endless order, on nothing
        # else: a resumed run moves its images as the run without interruption would have.
        return digits.random_map(functools.partial(shifted, max_shift=self.data.max_shift))

    def eval_data(self) -> grain.MapDataset:
        """Held-out images in their own order, where they belong."""
        from trainer.data.sources import fixed_order

        return fixed_order(self._split.held_out)

    @functools.cached_property
    def _split(self) -> Split:
        return load_split(self.data.eval_every)

    def describe(self) -> str:
        """How many images there are."""
        train, held_out = len(self._split.train), len(self._split.held_out)
        return f"data: {train:,} digits of {SIDE} x {SIDE} pixels, and {held_out:,} held out"

    def flops_per_example(self, model: ConvNet) -> float:
        """Six for every multiplication by a weight: it and an addition, and twice that back."""
        return 6.0 * model.multiplications()

    def verdict(self, eval_loss: float) -> str:
        """The held-out loss beside that of guessing."""
        return f"held-out loss {eval_loss:.4f} nats per digit (guessing: {np.log(NUM_CLASSES):.3f})"

    def finish(self, model: ConvNet, key: jax.Array) -> Mapping[str, jax.Array]:
        """How many of the held-out digits the model takes for what they are."""
        del key
        held_out = self._split.held_out
        logits_BK = model(jnp.asarray(held_out.images) / _WHITE)
        return {"num_right": jnp.sum(jnp.argmax(logits_BK, axis=-1) == held_out.labels)}

    def show(self, results: Mapping[str, Any]) -> str:
        """The accuracy."""
        right, of = int(results["num_right"]), len(self._split.held_out)
        return f"accuracy on {of} held-out digits: {right / of:.2%} ({of - right} wrong)"


@dataclasses.dataclass(frozen=True, eq=False)
class Images:
    """Images and what they show, by index, as Grain reads a source.

    Attributes:
      images: [N, S, S] uint8, 0 to 16.
      labels: [N] int32, 0 to 9.
    """

    images: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: Any) -> dict[str, np.ndarray]:
        return {"image": self.images[index], "label": self.labels[index]}


@dataclasses.dataclass(frozen=True)
class Split:
    """Images to train on and images held out; none is in both."""

    train: Images
    held_out: Images


def load_split(eval_every: int) -> Split:
    """Read scikit-learn's digits; every `eval_every`-th is held out.

    They come in groups by writer, so both parts have digits of every writer.
    """
    from sklearn.datasets import load_digits  # Here: importing it takes a second.

    digits = load_digits()
    images, labels = digits.images.astype(np.uint8), digits.target.astype(np.int32)
    held_out = np.arange(len(labels)) % eval_every == eval_every - 1
    return Split(
        Images(images[~held_out], labels[~held_out]), Images(images[held_out], labels[held_out])
    )


def shifted(
    example: Mapping[str, np.ndarray], rng: np.random.Generator, *, max_shift: int
) -> dict[str, np.ndarray]:
    """Move an example's image [S, S] by up to `max_shift` pixels each way, filling up with 0."""
    down, right = rng.integers(0, 2 * max_shift + 1, size=2)
    # What np.pad does, in a third of its time.
    side = SIDE + 2 * max_shift
    padded: np.ndarray = np.zeros((side, side), np.uint8)
    padded[max_shift : max_shift + SIDE, max_shift : max_shift + SIDE] = example["image"]
    return {**example, "image": padded[down : down + SIDE, right : right + SIDE]}
