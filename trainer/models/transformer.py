"""A decoder-only transformer: RMSNorm, rotary embedding, SwiGLU, grouped-query attention.

Shapes are in the names, `x_BLD`:

    B  examples                     D  model width, `dim`
    L  positions of a sequence      F  width of the MLP, `mlp_dim`
    M  positions attended to        H  width of a head, `head_dim`
    N  B * L, both flattened        Q  query heads, `num_heads`
    V  vocabulary                   K  key and value heads, `num_kv_heads`
    X  whatever the line says       G  query heads that share one key head, Q / K

Activations are [N, D] around every projection, so that each is a matmul of two dims: on CPU, XLA
copies transposed operands for the weight gradient of a three-dim one (two times slower).
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from trainer.models.attention import Attention
from trainer.models.embedding import look_up
from trainer.models.head_loss import HeadLoss, token_loss
from trainer.models.layer_loop import Input, loop_over_layers
from trainer.models.place import WHOLE, Place, find_place, over_batch_axes, pin
from trainer.models.remat import cast_in_loop, rematerialized
from trainer.models.rope import Rope
from trainer.models.sharded_loss import summed_over_mesh
from trainer.models.swiglu import MLP
from trainer.models.transformer_config import TransformerConfig
from trainer.models.weights import RMSNorm, make_weight
from trainer.task import Loss

_Shared = tuple[Rope, jax.Array | None]  # What all layers read: the angles and the documents.


class Layer(nnx.Module):
    """Attention and MLP, each normed before and added to the residual stream."""

    def __init__(self, config: TransformerConfig, rngs: nnx.Rngs):
        self.attention_norm = RMSNorm(config)
        self.attention = Attention(config, rngs)
        self.mlp_norm = RMSNorm(config)
        self.mlp = MLP(config, rngs)

    def __call__(
        self,
        x: Input,
        rope: Rope,
        batch: int,
        place: Place,
        segments_BL: jax.Array | None = None,
    ) -> jax.Array:
        """[N, D] to [N, D], where N is `batch` sequences one after the other."""
        x = x.within(place.row_major(x.x))
        x_ND = x.read() + self.attention(
            x, self.attention_norm, rope, batch, place, segments_BL=segments_BL
        )
        x_ND = place.row_major(x_ND)
        x_ND = self.mlp(x_ND, self.mlp_norm, place)
        return x_ND if place.is_local else over_batch_axes(x_ND, batch)


class Transformer(nnx.Module):
    """Token ids to logits or to a loss. Every parameter names its dims for the sharding rules."""

    def __init__(self, config: TransformerConfig, rngs: nnx.Rngs):
        D, V = config.dim, config.vocab_size
        self.config = config
        # Small, as in GPT-2: a tied head would else begin by predicting each token to come again.
        self.embedding_VD = make_weight(config, rngs, (V, D), ("vocab", "embed"), 2500)
        self.layers = _make_layers(config, rngs)
        self.norm = RMSNorm(config)
        if not config.tied_head:
            self.head_DV = make_weight(config, rngs, (D, V), ("embed", "vocab"), D)

    def __call__(self, tokens_BL: jax.Array, segments_BL: jax.Array | None = None) -> jax.Array:
        """Predict every position's next token.

        Args:
          tokens_BL: [B, L] integers in [0, V). The logits of one outside are NaN.
          segments_BL: [B, L] int32, which document each token is of; None for one document.

        Returns:
          [B, L, V] float32 logits; those of position l depend on tokens 0 to l alone, and of these
          on those of its own document.
        """
        return self._logits(tokens_BL, WHOLE, segments_BL)

    def loss(
        self, tokens_BL: jax.Array, targets_BL: jax.Array, segments_BL: jax.Array | None = None
    ) -> Loss:
        """Cross entropy in nats, plus the z-loss, summed over all tokens.

        Under a step's mesh each device computes its part of it from its shards of the params, and
        the gradients with it; logits are made a part of the vocabulary at a time.

        Args:
          tokens_BL, targets_BL: [B, L] integers in [0, V).
          segments_BL: [B, L] int32, which document each token is of, for rows of several: attention
            stays within. Then a target below 0 is none, and counts neither in the sum nor in its
            weight.
        """
        place = find_place(tokens_BL.shape[0])
        graphdef, params, rest = nnx.split(self, nnx.Param, ...)
        packed = segments_BL is not None
        arrays = [tokens_BL, targets_BL, *([segments_BL] if packed else [])]
        weight = jnp.sum(targets_BL >= 0, dtype=jnp.float32) if packed else _count(targets_BL)

        def local(params: Any, arrays_BXL: jax.Array) -> jax.Array:
            model = nnx.merge(graphdef, params, rest)
            segments_BL = arrays_BXL[:, 2] if packed else None
            return model.loss_here(arrays_BXL[:, 0], arrays_BXL[:, 1], place, segments_BL)

        if not place.is_local:
            return Loss(self.loss_here(tokens_BL, targets_BL, place, segments_BL), weight)
        arrays_BXL = jnp.stack(arrays, axis=1)
        return Loss(summed_over_mesh(local, params, arrays_BXL, place), weight)

    def loss_here(
        self,
        tokens_BL: jax.Array,
        targets_BL: jax.Array,
        place: Place,
        segments_BL: jax.Array | None = None,
    ) -> jax.Array:
        """The loss of these tokens from this model's arrays: shards, where `place` is local."""
        config, masked = self.config, segments_BL is not None
        in_one = not place.tensor and config.vocab_size <= config.loss_chunk
        if in_one or not place.is_local:
            logits_BLV = self._logits(tokens_BL, place, segments_BL)
            return token_loss(logits_BLV, targets_BL, config.z_loss, masked).total
        head = self.embedding_VD if config.tied_head else self.head_DV
        head_loss = HeadLoss(
            config.loss_chunk,
            vocab_dim=0 if config.tied_head else 1,
            gather=place.gather(head, config.dtype),
            tensor=place.tensor,
            z_loss=config.z_loss,
            align=place.align,
            masked=masked,
        )
        x_ND = self._hidden(tokens_BL, place, segments_BL)
        return head_loss(x_ND, head[...], targets_BL.reshape(-1).astype(jnp.int32))

    def _logits(
        self, tokens_BL: jax.Array, place: Place, segments_BL: jax.Array | None
    ) -> jax.Array:
        """[B, L] tokens to [B, L, V] float32 logits; the vocabulary is whole."""
        config = self.config
        x_ND = self._hidden(tokens_BL, place, segments_BL)
        if config.tied_head:
            head_DV = place.weight(self.embedding_VD, config.dtype).T
        else:
            head_DV = place.weight(self.head_DV, config.dtype)
        logits_NV = jnp.dot(x_ND, head_DV, preferred_element_type=jnp.float32)
        return logits_NV.reshape(*tokens_BL.shape, -1)

    def _hidden(
        self, tokens_BL: jax.Array, place: Place, segments_BL: jax.Array | None
    ) -> jax.Array:
        """[B, L] tokens to the last layer's normed output, [N, D] of the compute dtype."""
        config = self.config
        B, L = tokens_BL.shape
        rope = Rope.make(L, config.width_of_head, config.rope_base)
        tokens_N = tokens_BL.reshape(-1).astype(jnp.int32)
        if place.is_local:
            gather = place.gather(self.embedding_VD, config.dtype)
            x_ND = look_up(gather, place.tensor, self.embedding_VD[...], tokens_N)
        else:
            # Each process gathers its slices of the table's rows, as of any other weight, and looks
            # its own tokens up. Left to itself, XLA looks all tokens up in its slices.
            table_VD = self.embedding_VD[...].astype(config.dtype)
            table_VD = pin(table_VD, P(P.UNCONSTRAINED, None))
            x_ND = over_batch_axes(jnp.take(table_VD, tokens_N, axis=0), B)
        return self.norm(self._apply_layers(x_ND, rope, B, place, segments_BL), place)

    def _apply_layers(
        self,
        x_ND: jax.Array,
        rope: Rope,
        batch: int,
        place: Place,
        segments_BL: jax.Array | None,
    ) -> jax.Array:
        """All layers, one by one or scanned, each keeping what `remat` says for its backward."""
        config, shared = self.config, (rope, segments_BL)

        # A pure function of a layer's state, which both lax.scan and jax.checkpoint want.
        def of_layer(state: Any, x: Input, shared: _Shared) -> jax.Array:
            if config.scan_layers and place.batch and place.platform == "tpu":
                state = cast_in_loop(state, x.read())
            rope, segments_BL = shared
            return nnx.merge(graphdef, state)(x, rope, batch, place, segments_BL)

        if config.scan_layers and config.remat == "full" and place.is_local:
            graphdef, stacked = nnx.split(self.layers)
            return loop_over_layers(of_layer, config.dtype, stacked, x_ND, shared)

        def apply(state: Any, x_ND: jax.Array) -> jax.Array:
            return of_layer(state, Input(x_ND), shared)

        apply = rematerialized(apply, config.remat, place, prevent_cse=not config.scan_layers)
        if not config.scan_layers:
            for layer in self.layers:
                graphdef, state = nnx.split(layer)
                x_ND = apply(state, x_ND)
            return x_ND
        graphdef, stacked = nnx.split(self.layers)
        x_ND, _ = jax.lax.scan(lambda x_ND, state: (apply(state, x_ND), None), x_ND, stacked)
        return x_ND


def _count(targets_BL: jax.Array) -> jax.Array:
    return jnp.asarray(targets_BL.size, jnp.float32)


def _make_layers(config: TransformerConfig, rngs: nnx.Rngs) -> Layer | nnx.List:
    """A list of Layers, or for a scan one Layer whose parameters have a first dim `layers`.

    Both are drawn at once and so have the same numbers. Drawn layer by layer, each parameter would
    be a random generator of its own to compile: a second for every two or three of them on CPU.
    """

    @nnx.split_rngs(splits=config.num_layers)
    @nnx.vmap(transform_metadata={nnx.PARTITION_NAME: "layers"} if config.scan_layers else {})
    def make(rngs: nnx.Rngs) -> Layer:
        return Layer(config, rngs)

    stacked = make(rngs)
    if config.scan_layers:
        return stacked
    graphdef, state = nnx.split(stacked)

    def take(number: int) -> Layer:
        return nnx.merge(graphdef, jax.tree.map(lambda leaf: leaf[number], state))

    return nnx.List([take(number) for number in range(config.num_layers)])
