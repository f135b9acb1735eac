"""Causal grouped-query attention: in plain JAX, and by the libraries' flash kernels.

Shapes as in `trainer.models.transformer`. All take queries that come scaled by H ** -0.5.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from launch.spec import ConfigError
from trainer.models import remat
from trainer.models.layer_loop import Input
from trainer.models.place import Place
from trainer.models.rope import Rope
from trainer.models.transformer_config import TransformerConfig
from trainer.models.weights import RMSNorm, make_weight, residual_fan_in

_MIN_CHUNK = 64  # Queries per block of attention; smaller ones cost more in calls than they save.
_LANES = 128  # Splash attention wants heads and sequences of multiples of it.


class Attention(nnx.Module):
    """Causal grouped-query attention with rotary embedding."""

    def __init__(self, config: TransformerConfig, rngs: nnx.Rngs):
        D, Q, K, H = config.dim, config.num_heads, config.kv_heads, config.width_of_head
        self.width = H
        self.dtype = config.dtype
        self.kernel = config.attention
        self.remat = config.remat
        self.query_DQH = make_weight(config, rngs, (D, Q, H), ("embed", "heads", "head_dim"), D)
        self.key_DKH = make_weight(config, rngs, (D, K, H), ("embed", "kv_heads", "head_dim"), D)
        self.value_DKH = make_weight(config, rngs, (D, K, H), ("embed", "kv_heads", "head_dim"), D)
        fan_in = residual_fan_in(config, Q * H)
        self.out_QHD = make_weight(config, rngs, (Q, H, D), ("heads", "head_dim", "embed"), fan_in)

    def __call__(
        self,
        x: Input,
        norm: RMSNorm,
        rope: Rope,
        batch: int,
        place: Place,
        *,
        segments_BL: jax.Array | None = None,
    ) -> jax.Array:
        """[N, D] to [N, D], where N is `batch` sequences one after the other; normed by `norm`."""
        N = x.x.shape[0]

        def enter(x_ND: jax.Array, *weights: jax.Array) -> list[jax.Array]:
            normed_ND = place.enter(norm(x.within(x_ND).read(), place))
            heads = (batch, N // batch, -1, self.width)
            # Behind the barrier, because XLA on TPU would write the products out in float32 for the
            # rotation and transpose them so.
            products = jax.lax.optimization_barrier([normed_ND @ weight for weight in weights])
            q_BQLH, k_BKMH, v_BKMH = (x.reshape(heads).transpose(0, 2, 1, 3) for x in products)
            # Scaling the queries is cheaper than scaling the scores.
            return [rope.turn(q_BQLH, scale=self.width**-0.5), rope.turn(k_BKMH), v_BKMH]

        def leave(out_BQLH: jax.Array, weight_XD: jax.Array) -> jax.Array:
            out_NX = out_BQLH.transpose(0, 2, 1, 3).reshape(N, -1)
            return place.leave(out_NX @ weight_XD)

        enter, leave = (remat.lightly(part, self.remat) for part in (enter, leave))
        weights = (self.query_DQH, self.key_DKH, self.value_DKH)
        projected = enter(x.x, *(place.weight(weight, self.dtype, 1) for weight in weights))
        q_BQLH, k_BKMH, v_BKMH = (checkpoint_name(x, remat.QUERY_KEY_VALUE) for x in projected)
        packed = segments_BL is not None
        kernel = choose_kernel(
            self.kernel, N // batch, self.width, self.dtype, place, packed=packed
        )
        out_BQLH = attend(q_BQLH, k_BKMH, v_BKMH, kernel, segments_BL)
        out_ND = leave(out_BQLH, place.weight(self.out_QHD, self.dtype, 2))
        return checkpoint_name(out_ND, remat.ATTENTION_OUT)


def choose_kernel(
    wanted: str, length: int, head_dim: int, dtype: str, place: Place, *, packed: bool = False
) -> str:
    """`splash`, `cudnn` or `xla`: what `config.model.attention` comes to at a place.

    Args:
      wanted: `config.model.attention`.
      length, head_dim, dtype: of the queries.
      place: where it runs.
      packed: rows hold several documents, which do not attend to each other.

    Raises:
      ConfigError: a kernel was asked for by name, and does not run there.
    """
    if not place.is_local:
        return "xla"  # Kernels take one device's arrays; XLA cannot partition them.
    problem = {"splash": _no_splash, "cudnn": _no_cudnn}
    if wanted == "auto":
        kernels = {"tpu": "splash", "gpu": "xla" if packed else "cudnn"}
        own = kernels.get(place.platform or "", "xla")
        return "xla" if own == "xla" or problem[own](length, head_dim, dtype, place) else own
    if wanted == "cudnn" and packed:
        rule = (
            "JAX gives cuDNN no documents, and config.data.packing needs them; use 'auto' or 'xla'"
        )
        raise ConfigError("config.model.attention", rule, wanted)
    if wanted in problem and (why := problem[wanted](length, head_dim, dtype, place)):
        raise ConfigError("config.model.attention", f"{why}; use 'auto' or 'xla'", wanted)
    return wanted


def _no_splash(length: int, head_dim: int, dtype: str, place: Place) -> str:
    """Why splash attention cannot be; empty where it can."""
    del dtype
    if place.platform != "tpu":
        return f"runs on tpu devices, and these are {place.platform}"
    if head_dim % _LANES:
        return f"needs heads of a multiple of {_LANES}, and these are {head_dim} wide"
    return f"needs data.seq_len={length} to be a multiple of {_LANES}" if length % _LANES else ""


def _no_cudnn(length: int, head_dim: int, dtype: str, place: Place) -> str:
    """Why cuDNN's attention cannot be; empty where it can."""
    if place.platform != "gpu":
        return f"runs on gpu devices, and these are {place.platform}"
    if dtype not in ("bfloat16", "float16"):
        return f"computes in 16 bits, and config.model.dtype is {dtype}"
    if head_dim % 8 or head_dim > 128:
        return f"needs heads of a multiple of 8 up to 128, and these are {head_dim} wide"
    return f"needs an even data.seq_len, and it is {length}" if length % 2 else ""


def attend(
    q_BQLH: jax.Array,
    k_BKMH: jax.Array,
    v_BKMH: jax.Array,
    kernel: str,
    segments_BL: jax.Array | None = None,
) -> jax.Array:
    """Softmax attention of each position to itself and those before, by one of the kernels.

    Args:
      q_BQLH: [B, Q, L, H]; all query heads of a key head stand together.
      k_BKMH, v_BKMH: [B, K, L, H].
      kernel: from `choose_kernel`.
      segments_BL: [B, L] int32; a position attends only to those of its own number.

    Returns:
      [B, Q, L, H], of the values' dtype.
    """
    if kernel == "splash":
        # Here: Pallas takes 0.3 s to import, and only TPUs have a use for it.
        from trainer.models.splash import splash_attention

        return splash_attention(q_BQLH, k_BKMH, v_BKMH, segments_BL)
    if kernel == "cudnn":
        assert segments_BL is None  # Not chosen for them.
        q_BLQH, k_BMKH, v_BMKH = (x.transpose(0, 2, 1, 3) for x in (q_BQLH, k_BKMH, v_BKMH))
        out_BLQH = jax.nn.dot_product_attention(
            q_BLQH, k_BMKH, v_BMKH, scale=1.0, is_causal=True, implementation="cudnn"
        )
        return checkpoint_name(out_BLQH.transpose(0, 2, 1, 3), remat.ATTENTION)
    B, Q, L, H = q_BQLH.shape
    K = k_BKMH.shape[1]
    out_BKGLH = causal_attention(q_BQLH.reshape(B, K, Q // K, L, H), k_BKMH, v_BKMH, segments_BL)
    return checkpoint_name(out_BKGLH.reshape(B, Q, L, H), remat.ATTENTION)


def causal_attention(
    q_BKGLH: jax.Array,
    keys_BKMH: jax.Array,
    values_BKMH: jax.Array,
    segments_BL: jax.Array | None = None,
) -> jax.Array:
    """Softmax attention of each position to itself and those before; queries come scaled.

    Queries are taken in up to four chunks, each of which looks only at the keys it can see: 3/8 of
    the scores are never computed (measured on CPU: 0.8 times the time of the whole square).

    Args:
      q_BKGLH: [B, K, G, L, H], all query heads of a key head together.
      keys_BKMH, values_BKMH: [B, K, L, H].
      segments_BL: [B, L] int32; a position attends only to those of its own number.

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
        visible = visible_XM
        if segments_BL is not None:
            same_BLM = segments_BL[:, start:end, None] == segments_BL[:, None, :end]
            visible = visible_XM & jnp.tile(same_BLM, (1, G, 1))[:, None]  # [B, 1, X, M]
        scores_BKXM = jnp.where(visible, scores_BKXM, -1e30)
        share_BKXM = jax.nn.softmax(scores_BKXM, axis=-1).astype(v_BKMH.dtype)
        out_BKXH = jnp.einsum("BKXM,BKMH->BKXH", share_BKXM, v_BKMH)
        outs.append(out_BKXH.reshape(B, K, G, size, H))
    return jnp.concatenate(outs, axis=3)
