"""From hidden states to the loss without all logits: a part of the vocabulary at a time.

Shapes as in `trainer.models.transformer`; X is a chunk of the vocabulary. Logits [N, V] are by far
the largest array of a training step (2 GB for 16,384 tokens of Llama's 32,000, 8 GB of Llama 3's
128,256, in float32). Here a chunk of them is on a device at a time. There are two passes: the first
finds each token's logsumexp, the second computes the chunks again and their gradients at once, so
that the backward pass has nothing to do but to scale what it is given.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp

from trainer.models.chunks import chunks, join_dim, scan_gathered, split_dim
from trainer.models.gather import Gather
from trainer.task import Loss

_FAR_BELOW = -1e30  # A logit of no token: it adds nothing to the logsumexp.


def token_loss(
    logits_BLV: jax.Array, targets_BL: jax.Array, z_loss: float = 0.0, masked: bool = False
) -> Loss:
    """Cross entropy + z_loss * logsumexp^2, summed over [B, L] tokens, in float32 nats.

    With `masked`, over those whose target is not below 0.
    """
    logits_BLV = logits_BLV.astype(jnp.float32)
    log_z_BL = jax.nn.logsumexp(logits_BLV, axis=-1)
    # A select and a sum instead of a gather, whose gradient would be a scatter: they fuse.
    is_target_BLV = jnp.arange(logits_BLV.shape[-1]) == targets_BL[..., None]
    target_logit_BL = jnp.sum(jnp.where(is_target_BLV, logits_BLV, 0.0), axis=-1)
    loss_BL = log_z_BL - target_logit_BL
    if z_loss:
        loss_BL += z_loss * jnp.square(log_z_BL)
    if masked:
        counts_BL = targets_BL >= 0
        loss_BL = jnp.where(counts_BL, loss_BL, 0.0)
        return Loss(jnp.sum(loss_BL), jnp.sum(counts_BL, dtype=jnp.float32))
    return Loss(jnp.sum(loss_BL), jnp.asarray(targets_BL.size, jnp.float32))


@dataclasses.dataclass(frozen=True)
class HeadLoss:
    """How the loss is computed from hidden states. Hashable.

    Attributes:
      chunk: entries of the vocabulary whose logits are computed at a time.
      vocab_dim: which dim of the head's weight is the vocabulary: 1 of [D, V], 0 of a tied [V, D].
      gather: how the weight travels.
      tensor: the mesh axis that splits the vocabulary, or None.
      z_loss: weight of logsumexp^2.
      align: a chunk is a multiple of it.
      masked: a target below 0 is none, and has no part in the sum.
    """

    chunk: int
    vocab_dim: int
    gather: Gather
    tensor: str | None
    z_loss: float
    align: int = 1
    masked: bool = False

    def __call__(self, x_ND: jax.Array, head: jax.Array, targets_N: jax.Array) -> jax.Array:
        """The sum of the loss over N tokens, scalar float32, differentiable in x and head.

        Args:
          x_ND: [N, D] hidden states of the compute dtype; on all devices of `tensor` the same.
          head: this device's shard of the weight.
          targets_N: [N] int32 in [0, V); below 0 for none, if `masked`.
        """
        return _head_loss(self, x_ND, head, targets_N)

    def shards(self, head: jax.Array) -> jax.Array:
        """The weight in chunks of the vocabulary, ready to travel: [C, D, X] or [C, X, D]."""
        size = head.shape[self.vocab_dim]
        num, each = chunks(size, self.chunk, self.align)
        padding = [(0, 0), (0, 0)]
        padding[self.vocab_dim] = (0, num * each - size)
        return split_dim(jnp.pad(head.astype(self.gather.dtype), padding), self.vocab_dim, num)

    def logits(
        self, x_ND: jax.Array, whole: jax.Array, number: jax.Array, size: int
    ) -> tuple[jax.Array, jax.Array]:
        """Logits [N, X] float32 of a chunk, and the token ids [X] that they belong to."""
        weight_DX = whole.T if self.vocab_dim == 0 else whole
        logits_NX = jnp.dot(x_ND, weight_DX, preferred_element_type=jnp.float32)
        X = weight_DX.shape[1]
        local_X = number * X + jnp.arange(X)
        first = jax.lax.axis_index(self.tensor) * size if self.tensor else 0
        logits_NX = jnp.where(local_X < size, logits_NX, _FAR_BELOW)
        # Padding is behind this device's tokens, and where the next one's ids begin.
        return logits_NX, jnp.where(local_X < size, first + local_X, -1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _head_loss(how: HeadLoss, x_ND: jax.Array, head: jax.Array, targets_N: jax.Array) -> jax.Array:
    log_z_N, target_logit_N = _first_pass(how, x_ND, head, targets_N)
    return _total(how, log_z_N, target_logit_N, targets_N)


def _total(
    how: HeadLoss, log_z_N: jax.Array, target_logit_N: jax.Array, targets_N: jax.Array
) -> jax.Array:
    loss_N = log_z_N - target_logit_N
    if how.z_loss:
        loss_N += how.z_loss * jnp.square(log_z_N)
    if how.masked:
        loss_N = jnp.where(targets_N >= 0, loss_N, 0.0)
    return jnp.sum(loss_N)


def _first_pass(
    how: HeadLoss, x_ND: jax.Array, head: jax.Array, targets_N: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Each token's logsumexp and the logit of its target, [N] float32 both."""
    size = head.shape[how.vocab_dim]

    def use(sums: tuple, whole: jax.Array, number: jax.Array) -> tuple[tuple, None]:
        max_N, sum_N, target_logit_N = sums
        logits_NX, ids_X = how.logits(x_ND, whole, number, size)
        new_max_N = jnp.maximum(max_N, jnp.max(logits_NX, axis=-1))
        exp_NX = jnp.exp(logits_NX - new_max_N[:, None])
        sum_N = sum_N * jnp.exp(max_N - new_max_N) + jnp.sum(exp_NX, axis=-1)
        is_target_NX = ids_X == targets_N[:, None]
        target_logit_N += jnp.sum(jnp.where(is_target_NX, logits_NX, 0.0), axis=-1)
        return (new_max_N, sum_N, target_logit_N), None

    zeros_N = jnp.zeros(targets_N.shape, jnp.float32)
    start = (zeros_N + _FAR_BELOW, zeros_N, zeros_N)
    sums, _ = scan_gathered(use, start, how.shards(head), how.gather.gather)
    max_N, sum_N, target_logit_N = sums
    if how.tensor:
        local_max_N, max_N = max_N, jax.lax.pmax(max_N, how.tensor)
        both = (sum_N * jnp.exp(local_max_N - max_N), target_logit_N)
        sum_N, target_logit_N = jax.lax.psum(both, how.tensor)
    return max_N + jnp.log(sum_N), target_logit_N


def _head_loss_forward(
    how: HeadLoss, x_ND: jax.Array, head: jax.Array, targets_N: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """The loss, and its gradients in x [N, D] and in the shard of the weight."""
    size = head.shape[how.vocab_dim]
    log_z_N, target_logit_N = _first_pass(how, x_ND, head, targets_N)
    scale_N = 1.0 + 2.0 * how.z_loss * log_z_N

    def use(dx_ND: jax.Array, whole: jax.Array, number: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits_NX, ids_X = how.logits(x_ND, whole, number, size)
        share_NX = jnp.exp(logits_NX - log_z_N[:, None])
        is_target_NX = ids_X == targets_N[:, None]
        dlogits_NX = share_NX * scale_N[:, None] - is_target_NX.astype(jnp.float32)
        if how.masked:
            dlogits_NX = jnp.where(targets_N[:, None] >= 0, dlogits_NX, 0.0)
        dlogits_NX = dlogits_NX.astype(x_ND.dtype)
        tied = how.vocab_dim == 0
        weight_XD = whole if tied else whole.T
        dx_ND += jnp.dot(dlogits_NX, weight_XD, preferred_element_type=jnp.float32)
        dweight = dlogits_NX.T @ x_ND if tied else x_ND.T @ dlogits_NX
        return dx_ND, how.gather.scatter(dweight)

    # Zeros that are not there before the layers are done: XLA on TPU sets constants up early.
    zeros_ND = jnp.broadcast_to(0.0 * log_z_N[:, None], x_ND.shape)
    dx_ND, dhead = scan_gathered(use, zeros_ND, how.shards(head), how.gather.gather)
    dx_ND = dx_ND.astype(x_ND.dtype)
    if how.tensor:
        dx_ND = jax.lax.psum(dx_ND, how.tensor)
    dhead = join_dim(dhead, how.vocab_dim)
    dhead = jax.lax.slice_in_dim(dhead, 0, size, axis=how.vocab_dim).astype(head.dtype)
    # All of it now: else XLA puts the last chunk's gradients off until the layers' are done, and
    # keeps what they need meanwhile (0.5 GB for 16,384 tokens of width 4096).
    return jax.lax.optimization_barrier(
        (_total(how, log_z_N, target_logit_N, targets_N), (dx_ND, dhead)),
    )


def _head_loss_backward(
    how: HeadLoss, kept: tuple[jax.Array, jax.Array], scale: jax.Array
) -> tuple[jax.Array, jax.Array, None]:
    del how
    dx_ND, dhead = kept
    return (dx_ND * scale).astype(dx_ND.dtype), (dhead * scale).astype(dhead.dtype), None


_head_loss.defvjp(_head_loss_forward, _head_loss_backward)
