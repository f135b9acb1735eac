"""The loss computed a part of the vocabulary at a time is the loss, and so are its gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from trainer.models.gather import Gather
from trainer.models.head_loss import HeadLoss, token_loss

N, D, V = 6, 4, 37


@pytest.mark.parametrize(("chunk", "vocab_dim", "z_loss"), [(37, 1, 0.0), (8, 1, 0.1), (5, 0, 0.1)])
def test_chunks_of_the_vocabulary_change_nothing(chunk, vocab_dim, z_loss):
    rng = np.random.default_rng(0)
    x_ND = jnp.asarray(rng.normal(size=(N, D)), jnp.float32)
    head_DV = jnp.asarray(rng.normal(size=(D, V)), jnp.float32)
    targets_N = jnp.asarray([0, 36, 7, 8, 35, 5])  # The ends of the vocabulary, and of chunks.
    how = HeadLoss(chunk, vocab_dim, Gather(((), ()), (), "float32"), None, z_loss)

    def chunked(x_ND, head_DV):
        return how(x_ND, head_DV if vocab_dim == 1 else head_DV.T, targets_N)

    def plain(x_ND, head_DV):
        return token_loss((x_ND @ head_DV)[None], targets_N[None], z_loss).total

    # Of twice the loss: what comes from behind is a factor of the gradients.
    results = [
        jax.jit(jax.value_and_grad(lambda *args, f=f: 2.0 * f(*args), (0, 1)))(x_ND, head_DV)
        for f in (chunked, plain)
    ]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), *results)
    np.testing.assert_allclose(chunked(x_ND, head_DV), plain(x_ND, head_DV), rtol=1e-6)
