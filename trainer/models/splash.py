"""JAX's flash attention for TPUs, one sequence at a time where that saves memory.

Shapes as in `trainer.models.transformer`. The forward kernel writes each logsumexp 128 times over,
and XLA copies all of it to take one out: 0.5 GB for 16,384 tokens of 32 heads. So the sequences of
a batch take their turns in it. For that both passes are called by themselves; the backward one by
its private name, which is the same in JAX 0.10 and 0.12.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.pallas.ops.tpu import splash_attention as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel

from trainer.models import remat

# Queries, keys, values, the output, each query's logsumexp, and its document's number or None.
_Known = tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array, jax.Array | None]
_BLOCKS = (512, 256, 128)  # Of queries and keys; the largest that divides L.


def splash_attention(
    q_BQLH: jax.Array,
    k_BKMH: jax.Array,
    v_BKMH: jax.Array,
    segments_BL: jax.Array | None = None,
    interpret: bool = False,
) -> jax.Array:
    """`trainer.models.attention.attend` by JAX's Pallas kernel.

    Its output and the scores' logsumexp are named for policies of what to keep: with both at hand
    the backward pass needs no forward pass of its own. `interpret` runs it anywhere, slowly.
    """
    kernel = _kernel(q_BQLH.shape[1], q_BQLH.shape[2], interpret)

    def one(inputs: tuple[Any, ...]) -> tuple[jax.Array, jax.Array]:
        *qkv, segments_L = inputs
        out_QLH, (log_z_QL,) = kernel(*qkv, _segment_ids(segments_L))
        return out_QLH, log_z_QL

    made = jax.lax.map(one, jax.lax.stop_gradient((q_BQLH, k_BKMH, v_BKMH, segments_BL)))
    out_BQLH, log_z_BQL = (checkpoint_name(x, remat.ATTENTION) for x in made)
    return _with_gradients(interpret, (q_BQLH, k_BKMH, v_BKMH, out_BQLH, log_z_BQL, segments_BL))


def _segment_ids(segments_L: jax.Array | None) -> Any:
    return None if segments_L is None else splash.SegmentIds(q=segments_L, kv=segments_L)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _with_gradients(interpret: bool, known: _Known) -> jax.Array:
    """The output, computed already, with the gradients that it has.

    All that the backward pass wants is an argument, so that a policy keeps it once: made and named
    inside, the output would be kept twice, for the backward pass and for whoever uses it.
    """
    del interpret
    return known[3]


def _forward(interpret: bool, known: _Known) -> tuple[jax.Array, _Known]:
    return _with_gradients(interpret, known), known


def _backward(interpret: bool, known: _Known, dout_BQLH: jax.Array) -> tuple[Any]:
    kernel = _kernel(dout_BQLH.shape[1], dout_BQLH.shape[2], interpret)

    def one(known: _Known, dout_QLH: jax.Array) -> Any:
        *qkv, out_QLH, log_z_QL, segments_L = known
        masks = (kernel.dq_mask_info, kernel.dkv_mask_info)
        segments = _segment_ids(segments_L)
        residuals = (*qkv, segments, None, out_QLH, log_z_QL, *masks)  # No sinks.
        return splash_attention_kernel._splash_attention_bwd(
            **kernel.kwargs, res=residuals, do=dout_QLH
        )[3:6]

    return ((*jax.vmap(one)(known, dout_BQLH), None, None, None),)


_with_gradients.defvjp(_forward, _backward)


def _kernel(num_heads: int, length: int, interpret: bool) -> Any:
    """The kernel for one sequence: [Q, L, H], [K, L, H], [K, L, H] to [Q, L, H] and [Q, L]."""
    block = next(block for block in _BLOCKS if length % block == 0)
    sizes = splash.BlockSizes(
        block_q=block,
        block_kv=block,
        block_kv_compute=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_kv_dkv_compute=block,
        block_q_dq=block,
        block_kv_dq=block,
    )
    causal = splash.CausalMask((length, length))
    return splash.make_splash_mha(
        splash.MultiHeadMask([causal] * num_heads),
        head_shards=1,
        q_seq_shards=1,
        block_sizes=sizes,
        save_residuals=True,
        interpret=interpret,
    )
