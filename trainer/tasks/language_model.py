"""Next-token prediction with a transformer, on the bytes of text or on ready-made tokens."""

from __future__ import annotations

import dataclasses
import functools
import math
import unicodedata
from collections.abc import Mapping
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from launch.spec import ConfigError, build, closest, require
from trainer.models.transformer import Transformer
from trainer.models.transformer_config import TransformerConfig
from trainer.task import Batch, Loss, Task

_SAMPLE_TOKENS = 200
_SAMPLE_WINDOW = 64  # Tokens that a sampled token can see: each costs a pass over the window.
_TEMPERATURE = 0.8
_NEWLINE = 10  # A byte, and what a sample of bytes starts from.


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Where the tokens come from.

    Attributes:
      kind: `bytes` of any text files, or `array_record` files of token arrays.
      path: a file, a directory or several of them; for `array_record` also globs.
      seq_len: tokens to predict per example.
      pattern: `bytes`: which file names in a directory to read.
      exclude: `bytes`: names of directories to leave out.
      eval_every: `bytes`: one block of text in how many is held out for evaluation; 0 for none.
      eval_path: `array_record`: the held-out files; "" for none.
      dtype: `array_record`: of a token in the file.
    """

    kind: str
    path: Any
    seq_len: int
    pattern: str = "*"
    exclude: tuple[str, ...] = ()
    eval_every: int = 50
    eval_path: Any = ""
    dtype: str = "uint16"

    def __post_init__(self) -> None:
        kinds = ("bytes", "array_record")
        require(self.kind in kinds, "kind", self.kind, closest(self.kind, kinds))
        require(self.seq_len >= 1, "seq_len", self.seq_len, "must be at least 1")
        for name in ("path", "eval_path"):
            paths = getattr(self, name)
            paths = (paths,) if isinstance(paths, str) else paths
            ok = isinstance(paths, tuple) and all(isinstance(path, str) for path in paths)
            require(ok, name, paths, "must be a path or a tuple of paths")
        require(bool(self.path), "path", self.path, "empty; name a file or a directory")


class LanguageModel(Task):
    """A transformer that predicts the next token. `config.model` is a TransformerConfig,
    `config.data` a DataConfig.
    """

    def __init__(self, model: Mapping[str, Any], data: Mapping[str, Any]):
        super().__init__(model, data)
        self.model = build(TransformerConfig, model, "config.model")
        self.data = build(DataConfig, data, "config.data")
        if self.data.kind == "bytes" and self.model.vocab_size < 256:
            rule = "bytes need 256 token ids; set 256, or more to make it divide by a mesh axis"
            raise ConfigError("config.model.vocab_size", rule, self.model.vocab_size)

    def make_model(self, rngs: nnx.Rngs) -> Transformer:
        """A fresh transformer."""
        return Transformer(self.model, rngs)

    def loss(self, model: Transformer, batch: Batch) -> Loss:
        """Cross entropy in nats, plus the z-loss, over all tokens of the batch.

        Args:
          model: from `make_model`.
          batch: `tokens` [B, L + 1] integers: L inputs, and the same moved by one as targets.
        """
        tokens = batch["tokens"].astype(jnp.int32)
        return model.loss(tokens[:, :-1], tokens[:, 1:])

    def train_data(self, seed: int) -> grain.MapDataset:
        """Shuffled anew every epoch, for ever: elements are `{'tokens': [seq_len + 1]}`."""
        from trainer.data.sources import training_order

        return training_order(self._source("train"), seed)

    def example_spec(self) -> Mapping[str, Any]:
        """`tokens` [seq_len + 1], of the dtype that the data has."""
        dtype = "uint8" if self.data.kind == "bytes" else self.data.dtype
        return {"tokens": jax.ShapeDtypeStruct((self.data.seq_len + 1,), dtype)}

    def eval_data(self) -> grain.MapDataset | None:
        """Held-out rows in their own order; None when nothing is held out."""
        from trainer.data.sources import fixed_order

        held_out = self.data.eval_every if self.data.kind == "bytes" else self.data.eval_path
        return fixed_order(self._source("eval")) if held_out else None

    def _source(self, split: str) -> grain.sources.RandomAccessDataSource:
        """Examples of `train` or `eval`, as trainer.data.sources reads them."""
        from trainer.data import records, sources

        data = self.data
        if data.kind == "bytes":
            return sources.ByteWindows(self._corpus, data.seq_len, split, data.eval_every)
        path, field = (
            (data.path, "config.data.path")
            if split == "train"
            else (data.eval_path, "config.data.eval_path")
        )
        return records.TokenRecords(path, data.seq_len, data.dtype, field)

    @functools.cached_property
    def _corpus(self) -> Any:
        from trainer.data.sources import read_corpus

        return read_corpus(self.data.path, self.data.pattern, self.data.exclude)

    def describe(self) -> str:
        """How much data there is; for bytes, the loss that a model must beat."""
        if self.data.kind != "bytes":
            source = self._source("train")
            return f"data: {len(source):,} rows of {self.data.seq_len + 1} tokens"
        corpus = self._corpus
        skipped = f" ({corpus.num_skipped} unreadable)" if corpus.num_skipped else ""
        return (
            f"data: {len(corpus.data):,} bytes of text in {corpus.num_files:,} files{skipped}; "
            f"byte-unigram entropy {corpus.unigram_entropy:.3f} nats (the loss of guessing each "
            "byte by how often it occurs)"
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
        if self.data.kind == "bytes":
            text += f" (byte-unigram entropy {self._corpus.unigram_entropy:.3f})"
        return text

    def finish(self, model: Transformer, key: jax.Array) -> Mapping[str, jax.Array]:
        """Write 200 tokens of the model's own. Lead process only.

        Bytes go on from a newline, other tokens from id 0. A short window is run again for each
        token: slow, but it needs no cache and so no second way to compute the model.
        """
        start = _NEWLINE if self.data.kind == "bytes" else 0
        window = min(_SAMPLE_WINDOW, self.data.seq_len)
        return {"sample": sample(model, key, start=start, length=_SAMPLE_TOKENS, window=window)}

    def show(self, results: Mapping[str, Any]) -> str:
        """The sample as text, or as token ids where it is not bytes."""
        tokens = np.asarray(results["sample"])
        if self.data.kind != "bytes":
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
