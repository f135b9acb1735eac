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

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from launch.spec import BATCH_AXES
from trainer.models.transformer_config import TransformerConfig

_MIN_CHUNK = 64  # Queries per block of attention; smaller ones cost more in calls than they save.


class RMSNorm(nnx.Module):
    """Divide by the root mean square and scale. Computed in float32, whatever comes in."""

    def __init__(self, config: TransformerConfig):
        self.epsilon = config.norm_epsilon
        ones = jnp.ones((config.dim,), config.param_dtype)
        self.scale_D = nnx.Param(ones, out_sharding=("norm",))

    def __call__(self, x_ND: jax.Array) -> jax.Array:
        """[N, D] to [N, D], of the same dtype."""
        x32_ND = x_ND.astype(jnp.float32)
        mean_square_N1 = jnp.mean(jnp.square(x32_ND), axis=-1, keepdims=True)
        x32_ND *= jax.lax.rsqrt(mean_square_N1 + self.epsilon)
        return (x32_ND * self.scale_D[...].astype(jnp.float32)).astype(x_ND.dtype)


class Attention(nnx.Module):
    """Causal grouped-query attention with rotary embedding."""

    def __init__(self, config: TransformerConfig, rngs: nnx.Rngs):
        D, Q, K, H = config.dim, config.num_heads, config.kv_heads, config.width_of_head
        self.num_groups = Q // K
        self.dtype = config.dtype
        self.query_DQH = _weight(config, rngs, (D, Q, H), ("embed", "heads", "head_dim"), D)
        self.key_DKH = _weight(config, rngs, (D, K, H), ("embed", "kv_heads", "head_dim"), D)
        self.value_DKH = _weight(config, rngs, (D, K, H), ("embed", "kv_heads", "head_dim"), D)
        fan_in = _residual_fan_in(config, Q * H)
        self.out_QHD = _weight(config, rngs, (Q, H, D), ("heads", "head_dim", "embed"), fan_in)

    def __call__(self, x_ND: jax.Array, rope: Rope, batch: int) -> jax.Array:
        """[N, D] to [N, D], where N is `batch` sequences one after the other."""
        _, K, H = self.key_DKH.shape
        heads = (batch, -1, K, self.num_groups, H)
        q_BLKGH = _project(x_ND, self.query_DQH, self.dtype).reshape(heads)
        k_BMKH = _project(x_ND, self.key_DKH, self.dtype).reshape(batch, -1, K, H)
        v_BMKH = _project(x_ND, self.value_DKH, self.dtype).reshape(batch, -1, K, H)
        # Scaling the queries is cheaper than scaling the scores.
        q_BKGLH = rope.turn(q_BLKGH.transpose(0, 2, 3, 1, 4), scale=H**-0.5)
        k_BKMH = rope.turn(k_BMKH.transpose(0, 2, 1, 3))
        out_BKGLH = causal_attention(q_BKGLH, k_BKMH, v_BMKH.transpose(0, 2, 1, 3))
        out_NX = out_BKGLH.transpose(0, 3, 1, 2, 4).reshape(x_ND.shape[0], -1)
        return _project(out_NX, self.out_QHD, self.dtype)


class MLP(nnx.Module):
    """SwiGLU: silu(x gate) * (x up), projected down."""

    def __init__(self, config: TransformerConfig, rngs: nnx.Rngs):
        D, F = config.dim, config.mlp_dim
        self.dtype = config.dtype
        self.gate_DF = _weight(config, rngs, (D, F), ("embed", "mlp"), D)
        self.up_DF = _weight(config, rngs, (D, F), ("embed", "mlp"), D)
        fan_in = _residual_fan_in(config, F)
        self.down_FD = _weight(config, rngs, (F, D), ("mlp", "embed"), fan_in)

    def __call__(self, x_ND: jax.Array) -> jax.Array:
        """[N, D] to [N, D]."""
        gate_NF = jax.nn.silu(_project(x_ND, self.gate_DF, self.dtype))
        up_NF = _project(x_ND, self.up_DF, self.dtype)
        return _project(gate_NF * up_NF, self.down_FD, self.dtype)


class Layer(nnx.Module):
    """Attention and MLP, each normed before and added to the residual stream."""

    def __init__(self, config: TransformerConfig, rngs: nnx.Rngs):
        self.attention_norm = RMSNorm(config)
        self.attention = Attention(config, rngs)
        self.mlp_norm = RMSNorm(config)
        self.mlp = MLP(config, rngs)

    def __call__(self, x_ND: jax.Array, rope: Rope, batch: int) -> jax.Array:
        """[N, D] to [N, D], where N is `batch` sequences one after the other."""
        x_ND = x_ND + self.attention(self.attention_norm(x_ND), rope, batch)
        x_ND = x_ND + self.mlp(self.mlp_norm(x_ND))
        return _over_batch_axes(x_ND, batch)


class Transformer(nnx.Module):
    """Token ids to logits. Every parameter names its dims for `trainer.sharding`'s rules."""

    def __init__(self, config: TransformerConfig, rngs: nnx.Rngs):
        D, V = config.dim, config.vocab_size
        self.config = config
        # Small, as in GPT-2: a tied head would else begin by predicting each token to come again.
        self.embedding_VD = _weight(config, rngs, (V, D), ("vocab", "embed"), 2500)
        self.layers = _make_layers(config, rngs)
        self.norm = RMSNorm(config)
        if not config.tied_head:
            self.head_DV = _weight(config, rngs, (D, V), ("embed", "vocab"), D)

    def __call__(self, tokens_BL: jax.Array) -> jax.Array:
        """Predict every position's next token.

        Args:
          tokens_BL: [B, L] integers in [0, V). The logits of one outside are NaN.

        Returns:
          [B, L, V] float32 logits; those of position l depend on tokens 0 to l alone.
        """
        config = self.config
        B, L = tokens_BL.shape
        rope = Rope.make(L, config.width_of_head, config.rope_base)
        # Each process gathers its slices of the table's rows, as of any other weight, and looks its
        # own tokens up. Left to itself, XLA looks all tokens up in its slices.
        table_VD = _pin(self.embedding_VD[...].astype(config.dtype), P(P.UNCONSTRAINED, None))
        tokens_N = tokens_BL.reshape(-1).astype(jnp.int32)
        x_ND = jnp.take(table_VD, tokens_N, axis=0)
        x_ND = _over_batch_axes(x_ND, B)
        x_ND = self._apply_layers(x_ND, rope, B)
        x_ND = self.norm(x_ND)
        head_DV = self.embedding_VD[...].T if config.tied_head else self.head_DV[...]
        logits_NV = jnp.dot(x_ND, head_DV.astype(config.dtype), preferred_element_type=jnp.float32)
        return logits_NV.reshape(B, L, -1)

    def _apply_layers(self, x_ND: jax.Array, rope: Rope, batch: int) -> jax.Array:
        """All layers, one by one or scanned, each keeping what `remat` says for its backward."""
        config = self.config

        # A pure function of a layer's state, which both lax.scan and jax.checkpoint want.
        def apply(state: Any, x_ND: jax.Array) -> jax.Array:
            return nnx.merge(graphdef, state)(x_ND, rope, batch)

        if config.remat != "none":
            policy = getattr(jax.checkpoint_policies, config.remat, None)  # `full` has none
            apply = jax.checkpoint(apply, policy=policy, prevent_cse=not config.scan_layers)
        if not config.scan_layers:
            for layer in self.layers:
                graphdef, state = nnx.split(layer)
                x_ND = apply(state, x_ND)
            return x_ND
        graphdef, stacked = nnx.split(self.layers)
        x_ND, _ = jax.lax.scan(lambda x_ND, state: (apply(state, x_ND), None), x_ND, stacked)
        return x_ND


class Rope(NamedTuple):
    """Rotary position embedding: pairs of a head's dims are turned by position * frequency.

    Attributes:
      cos_LX, sin_LX: [L, H / 2] float32; dim i is paired with dim i + H / 2, as in Llama.
    """

    cos_LX: jax.Array
    sin_LX: jax.Array

    @classmethod
    def make(cls, length: int, head_dim: int, base: float) -> Rope:
        """The angles of positions 0 to length - 1."""
        frequency_X = base ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
        angle_LX = jnp.arange(length, dtype=jnp.float32)[:, None] * frequency_X
        return cls(jnp.cos(angle_LX), jnp.sin(angle_LX))

    def turn(self, x_LH: jax.Array, scale: float = 1.0) -> jax.Array:
        """Turn [..., L, H] and scale it, in float32; the dtype stays."""
        first, second = jnp.split(x_LH.astype(jnp.float32), 2, axis=-1)
        cos_LX, sin_LX = self.cos_LX * scale, self.sin_LX * scale
        turned = [first * cos_LX - second * sin_LX, second * cos_LX + first * sin_LX]
        return jnp.concatenate(turned, axis=-1).astype(x_LH.dtype)


def causal_attention(q_BKGLH: jax.Array, keys_BKMH: jax.Array, values_BKMH: jax.Array) -> jax.Array:
    """Softmax attention of each position to itself and those before; queries come scaled.

    Queries are taken in up to four chunks, each of which looks only at the keys it can see: 3/8 of
    the scores are never computed (measured on CPU: 0.8 times the time of the whole square).

    Args:
      q_BKGLH: [B, K, G, L, H], all query heads of a key head together.
      keys_BKMH, values_BKMH: [B, K, L, H].

    Returns:
      [B, K, G, L, H], of the values' dtype.
    """
    B, K, G, L, H = q_BKGLH.shape
    num_chunks = next(n for n in (4, 2, 1) if n == 1 or (L % n == 0 and L // n >= _MIN_CHUNK))
    size = L // num_chunks
    outs = []
    for start in range(0, L, size):
        end = start + size
        # X = G * size: a dot of more dims would make XLA copy its operands (and its gradients).
        q_BKXH = q_BKGLH[:, :, :, start:end].reshape(B, K, G * size, H)
        k_BKMH, v_BKMH = keys_BKMH[:, :, :end], values_BKMH[:, :, :end]
        scores_BKXM = jnp.einsum(
            "BKXH,BKMH->BKXM", q_BKXH, k_BKMH, preferred_element_type=jnp.float32
        )
        visible_XM = jnp.tile(jnp.arange(start, end)[:, None] >= jnp.arange(end), (G, 1))
        scores_BKXM = jnp.where(visible_XM, scores_BKXM, -1e30)
        share_BKXM = jax.nn.softmax(scores_BKXM, axis=-1).astype(v_BKMH.dtype)
        out_BKXH = jnp.einsum("BKXM,BKMH->BKXH", share_BKXM, v_BKMH)
        outs.append(out_BKXH.reshape(B, K, G, size, H))
    return jnp.concatenate(outs, axis=3)


def _weight(
    config: TransformerConfig,
    rngs: nnx.Rngs,
    shape: tuple[int, ...],
    names: tuple[str, ...],
    fan_in: int,
) -> nnx.Param:
    """A parameter of variance 1 / fan_in, its dims named for the sharding rules."""
    value = jax.random.normal(rngs.params(), shape, config.param_dtype)
    return nnx.Param(value * fan_in**-0.5, out_sharding=names)


def _residual_fan_in(config: TransformerConfig, fan_in: int) -> int:
    """What is added to the residual stream is made smaller the more layers add to it (GPT-2)."""
    return fan_in * 2 * config.num_layers


def _project(x_NI: jax.Array, weight: nnx.Param, dtype: str) -> jax.Array:
    """[N, I] times a weight whose first dims make up I and whose others are flattened to one."""
    return x_NI @ weight[...].astype(dtype).reshape(x_NI.shape[1], -1)


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


def _over_batch_axes(x_ND: jax.Array, batch: int) -> jax.Array:
    """Keep activations of `batch` examples split by example, and by nothing else.

    Otherwise XLA may split activations as weights are split over `fsdp`, and then reduces
    activations over the mesh instead of gathering weights.
    """
    mesh = jax.sharding.get_abstract_mesh()
    shards = math.prod(mesh.shape.get(axis, 1) for axis in BATCH_AXES)
    return x_ND if batch % shards else _pin(x_ND, P(BATCH_AXES, None))


def _pin(x: jax.Array, spec: P) -> jax.Array:
    """Constrain x to `spec` where the mesh in context is the trainer's; else leave it alone."""
    mesh = jax.sharding.get_abstract_mesh()
    types = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    if any(types.get(axis) is not AxisType.Auto for axis in BATCH_AXES):
        return x  # No mesh, another's mesh, or inside shard_map.
    return jax.lax.with_sharding_constraint(x, spec)
