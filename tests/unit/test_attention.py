"""Flash attention is attention; a kernel that cannot be is refused by name, or not chosen."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from launch.spec import ConfigError
from trainer.models.attention import attend, choose_kernel
from trainer.models.place import WHOLE, Place
from trainer.models.splash import splash_attention

TPU, GPU, CPU = (Place(platform=platform, is_local=True) for platform in ("tpu", "gpu", "cpu"))


@pytest.mark.parametrize("packed", [False, True])
def test_splash_attention_and_its_gradients_equal_the_plain_form(packed):
    B, Q, K, L, H = 2, 2, 1, 256, 128
    rng = np.random.default_rng(0)
    q, k, v, weight = (
        jnp.asarray(rng.normal(size=(B, heads, L, H)), jnp.float32) for heads in (Q, K, K, Q)
    )
    q *= H**-0.5
    documents = np.repeat([[1, 2, 3, 0]], [100, 28, 110, 18], axis=1).repeat(B, axis=0)
    documents[1] = np.sort(documents[1])
    segments = jnp.asarray(documents, jnp.int32) if packed else None

    def total(attention):
        return lambda *qkv: jnp.sum(attention(*qkv) * weight)

    flash = jax.value_and_grad(
        total(lambda *qkv: splash_attention(*qkv, segments, True)), (0, 1, 2)
    )
    plain = jax.value_and_grad(total(lambda *qkv: attend(*qkv, "xla", segments)), (0, 1, 2))
    (value, grads), (expected, expected_grads) = jax.jit(flash)(q, k, v), jax.jit(plain)(q, k, v)
    np.testing.assert_allclose(value, expected, rtol=1e-4)
    for grad, wanted in zip(grads, expected_grads, strict=True):
        np.testing.assert_allclose(grad, wanted, atol=2e-4)


@pytest.mark.parametrize(
    ("place", "length", "head_dim", "dtype", "kernel"),
    [
        (TPU, 4096, 128, "bfloat16", "splash"),
        (TPU, 4096, 64, "bfloat16", "xla"),
        (TPU, 100, 128, "bfloat16", "xla"),
        (GPU, 4096, 128, "bfloat16", "cudnn"),
        (GPU, 4096, 128, "float32", "xla"),
        (CPU, 4096, 128, "bfloat16", "xla"),
        (WHOLE, 4096, 128, "bfloat16", "xla"),
    ],
)
def test_a_platforms_own_kernel_is_chosen_where_it_can_be(place, length, head_dim, dtype, kernel):
    assert choose_kernel("auto", length, head_dim, dtype, place) == kernel


def test_packed_rows_take_a_kernel_that_knows_of_documents():
    def choose(wanted, place):
        return choose_kernel(wanted, 4096, 128, "bfloat16", place, packed=True)

    assert [choose("auto", place) for place in (TPU, GPU, CPU)] == ["splash", "xla", "xla"]
    with pytest.raises(ConfigError, match=r"attention='cudnn': .* config.data.packing needs them"):
        choose("cudnn", GPU)


@pytest.mark.parametrize(
    ("wanted", "place", "length", "head_dim", "message"),
    [
        ("splash", CPU, 4096, 128, "'splash': runs on tpu devices, and these are cpu; use 'auto'"),
        ("splash", TPU, 4096, 64, "'splash': needs heads of a multiple of 128, and these are 64"),
        ("splash", TPU, 100, 128, "'splash': needs data.seq_len=100 to be a multiple of 128"),
        ("cudnn", GPU, 100, 256, "'cudnn': needs heads of a multiple of 8 up to 128"),
        ("cudnn", TPU, 4096, 128, "'cudnn': runs on gpu devices, and these are tpu"),
    ],
)
def test_a_kernel_that_cannot_be_is_refused(wanted, place, length, head_dim, message):
    with pytest.raises(ConfigError) as caught:
        choose_kernel(wanted, length, head_dim, "bfloat16", place)
    assert str(caught.value).startswith(f"config.model.attention={message}")
