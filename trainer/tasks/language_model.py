"""Next-token prediction with a transformer, on the bytes of text or on ready-made tokens."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Mapping
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from launch.spec import ConfigError, build
from trainer.models.transformer import Transformer
from trainer.models.transformer_config import TransformerConfig
from trainer.task import Batch, Loss, Task
from trainer.tasks.language_data import DataConfig, LanguageData

_SAMPLE_TOKENS = 200
_SAMPLE_WINDOW = 64  # Tokens that a sampled token can see: each costs a pass over the window.
_TEMPERATURE = 0.8
_NEWLINE = 10  # A byte, and what a sample of bytes starts from.


class LanguageModel(Task):
    """A transformer that predicts the next token. `config.model` is a TransformerConfig,
    `config.data` a DataConfig.
    """

    def __init__(self, model: Mapping[str, Any], data: Mapping[str, Any]):
        super().__init__(model, data)
        self.model = build(TransformerConfig, model, "config.model")
        self.data = build(DataConfig, data, "config.data")
        self._data = LanguageData(self.data)
        if self._has_bytes and self.model.vocab_size < 256:
            rule = "bytes need 256 token ids; set 256, or more to make it divide by a mesh axis"
            raise ConfigError("config.model.vocab_size", rule, self.model.vocab_size)

    def make_model(self, rngs: nnx.Rngs) -> Transformer:
        """A fresh transformer."""
        return Transformer(self.model, rngs)

    def loss(self, model: Transformer, batch: Batch) -> Loss:
        """Cross entropy in nats, plus the z-loss, over all tokens of the batch.

        Args:
          model: from `make_model`.
          batch: `tokens` [B, L + 1] integers: L inputs, and the same moved by one as targets. With
            `segment_ids` [B, L + 1] int32 only tokens of the same document, which is not 0, are
            attended to and predicted from each other.
        """
        tokens = batch["tokens"].astype(jnp.int32)
        segments = batch.get("segment_ids")
        if segments is None:
            return model.loss(tokens[:, :-1], tokens[:, 1:])
        inputs, targets = segments[:, :-1], segments[:, 1:]
        predicted = (inputs == targets) & (targets != 0)
        return model.loss(tokens[:, :-1], jnp.where(predicted, tokens[:, 1:], -1), inputs)

    def train_data(self, seed: int) -> grain.MapDataset:
        """Shuffled anew every epoch, for ever; see `example_spec`."""
        return self._data.train(seed)

    def example_spec(self) -> Mapping[str, Any]:
        """`tokens` [seq_len + 1], of the dtype that the data has; of packed rows `segment_ids`."""
        shape = (self.data.seq_len + 1,)
        spec = {"tokens": jax.ShapeDtypeStruct(shape, self._data.dtype)}
        if self.data.packing:
            spec["segment_ids"] = jax.ShapeDtypeStruct(shape, "int32")
        return spec

    def eval_data(self) -> grain.MapDataset | None:
        """Held-out rows in their own order; None when nothing is held out."""
        return self._data.held_out()

    @property
    def _has_bytes(self) -> bool:
        return any(part.kind == "bytes" for part in self._data.parts.values())

    @property
    def _entropy(self) -> float | None:
        """The loss that a model of bytes must beat; None of other tokens, or of a mixture."""
        if self.data.kind != "bytes" or self.data.mixture:
            return None
        return self._data.corpus("").unigram_entropy

    def describe(self) -> str:
        """How much data there is; for bytes, the loss that a model must beat."""
        if (entropy := self._entropy) is None:
            return self._data.describe()
        return (
            f"{self._data.describe()}; byte-unigram entropy {entropy:.3f} nats (the loss of "
            "guessing each byte by how often it occurs)"
        )

    def tokens_per_example(self) -> int:
        """Tokens predicted per example, `seq_len`."""
        return self.data.seq_len

    def flops_per_example(self, model: Transformer) -> float:
        """Model FLOPs of an example, forward and backward, as PaLM's appendix B counts them.

        Per token 6 N + 12 * layers * heads * head_dim * L: N counts the parameters that are
        multiplied by (so not an untied embedding table), and attention counts as if it were not
        causal. Recomputation (remat) does not count. `model` may be abstract.
        """
        config, L = self.model, self.data.seq_len
        params = nnx.state(model, nnx.Param)
        N = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))
        if not config.tied_head:
            N -= config.vocab_size * config.dim
        attention = 12 * config.num_layers * config.num_heads * config.width_of_head * L
        return float(L * (6 * N + attention))

    def flops_formula(self) -> str:
        """PaLM's."""
        return (
            "6 * params + 12 * layers * heads * head_dim * L per token, as PaLM's appendix B: "
            "attention as if not causal, without an untied embedding table"
        )

    def compute_dtype(self) -> str:
        """`config.model.dtype`: weights are cast before they are gathered."""
        return self.model.dtype

    def tensor_bytes_per_example(self) -> float:
        """Two all-reduces of [L, D] each way in a layer, and one for either end of the model."""
        config, L = self.model, self.data.seq_len
        return float(
            (4 * config.num_layers + 2) * L * config.dim * jnp.dtype(config.dtype).itemsize
        )

    def verdict(self, eval_loss: float) -> str:
        """The held-out loss, for bytes beside the one that a model must beat."""
        text = f"held-out loss {eval_loss:.3f} nats per token"
        if (entropy := self._entropy) is not None:
            text += f" (byte-unigram entropy {entropy:.3f})"
        return text

    def finish(self, model: Transformer, key: jax.Array) -> Mapping[str, jax.Array]:
        """Write 200 tokens of the model's own. Lead process only.

        Bytes go on from a newline, other tokens from id 0. A short window is run again for each
        token: slow, but it needs no cache and so no second way to compute the model.
        """
        start = _NEWLINE if self._has_bytes else 0
        window = min(_SAMPLE_WINDOW, self.data.seq_len)
        return {"sample": sample(model, key, start=start, length=_SAMPLE_TOKENS, window=window)}

    def show(self, results: Mapping[str, Any]) -> str:
        """The sample as text, or as token ids where it is not bytes."""
        tokens = np.asarray(results["sample"])
        if not self._has_bytes:
            return "the model's own tokens: " + " ".join(str(token) for token in tokens)
        return "the model's own text:\n" + printable(tokens)


def sample(
    model: Transformer, key: jax.Array, *, start: int, length: int, window: int
) -> jax.Array:
    """Draw [length] int32 tokens from the model after the token `start`. Call under jit.

    Each is drawn from a pass over the last `window` tokens.
    """

    def draw_one(i: jax.Array, tokens: jax.Array) -> jax.Array:
        # tokens [1 + length]: what lies behind i is not written yet, and is not seen, since
        # attention is causal.
        first = jnp.maximum(i - (window - 1), 0)
        seen = jax.lax.dynamic_slice(tokens, (first,), (window,))
        logits_V = model(seen[None])[0, i - first]
        token = jax.random.categorical(jax.random.fold_in(key, i), logits_V / _TEMPERATURE)
        return tokens.at[i + 1].set(token.astype(jnp.int32))

    tokens = jnp.full(max(length + 1, window), start, jnp.int32)
    return jax.lax.fori_loop(0, length, draw_one, tokens)[1 : length + 1]


def printable(tokens: np.ndarray) -> str:
    """Bytes as text that is safe to print: anything else than text is shown as U+FFFD or `·`."""
    codes = [int(token) if 0 <= token < 256 else 0 for token in tokens]
    text = bytes(codes).decode("utf-8", errors="replace")
    return "".join(
        char if char in "\n\t" or unicodedata.category(char)[0] != "C" else "·" for char in text
    )
