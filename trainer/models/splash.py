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

_BLOCKS = (512, 256, 128)  # Of queries and keys; the largest that divides L.


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def splash_attention(
    q_BQLH: jax.Array, k_BKMH: jax.Array, v_BKMH: jax.Array, interpret: bool = False
) -> jax.Array:
    """`trainer.models.attention.attend` by JAX's Pallas kernel.

    Its output and the scores' logsumexp are named for policies of what to keep: with both at hand
    the backward pass needs no forward pass of its own. `interpret` runs it anywhere, slowly.
    """
    out_BQLH, _ = _forward(q_BQLH, k_BKMH, v_BKMH, interpret)
    return out_BQLH


def _forward(
    q_BQLH: jax.Array, k_BKMH: jax.Array, v_BKMH: jax.Array, interpret: bool
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """The output, and what the backward pass wants: everything so far and the logsumexp."""
    kernel = _kernel(q_BQLH.shape[1], q_BQLH.shape[2], interpret)

    def one(qkv: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
        out_QLH, (log_z_QL,) = kernel(*qkv)
        return out_QLH, log_z_QL

    made = jax.lax.map(one, (q_BQLH, k_BKMH, v_BKMH))
    out_BQLH, log_z_BQL = (checkpoint_name(x, remat.ATTENTION) for x in made)
    return out_BQLH, (q_BQLH, k_BKMH, v_BKMH, out_BQLH, log_z_BQL)


def _backward(interpret: bool, kept: tuple[jax.Array, ...], dout_BQLH: jax.Array) -> Any:
    kernel = _kernel(dout_BQLH.shape[1], dout_BQLH.shape[2], interpret)

    def one(kept: tuple[jax.Array, ...], dout_QLH: jax.Array) -> Any:
        *qkv, out_QLH, log_z_QL = kept
        masks = (kernel.dq_mask_info, kernel.dkv_mask_info)
        known = (*qkv, None, None, out_QLH, log_z_QL, *masks)  # Neither segments nor sinks.
        return splash_attention_kernel._splash_attention_bwd(
            **kernel.kwargs, res=known, do=dout_QLH
        )[3:6]

    return jax.vmap(one)(kept, dout_BQLH)


splash_attention.defvjp(_forward, _backward)


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
