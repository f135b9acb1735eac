"""On a mesh every device computes its part of the loss, and the gradients are those of the whole."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from launch.spec import MeshSpec
from tests.unit.test_transformer import make
from trainer import target
from trainer.mesh import make_mesh
from trainer.sharding import make_rules

BIG = {"vocab_size": 36, "num_kv_heads": 2, "loss_chunk": 8}  # Chunks that do not divide 36 / 2.
MESHES = {
    "fsdp": {"fsdp": 4},
    "everything": {"data": 2, "fsdp": 2, "tensor": 2},
}
KINDS = {
    "tied": {"z_loss": 0.01},
    "chunked, scanned": {
        "tied_head": False,
        "scan_layers": True,
        "mlp_chunk": 5,
        "remat": "keep_qkv",
    },
}


def loss_and_grads(model, tokens, spec=None):
    """The mean loss and its gradients, on a mesh as a step sees it or on no mesh at all."""
    graphdef, state = nnx.split(model)

    def mean(state):
        total, weight = nnx.merge(graphdef, state).loss(tokens[:, :-1], tokens[:, 1:])
        return total / weight

    if spec is None:
        return jax.jit(jax.value_and_grad(mean))(state)
    sizes = {"data": 1, **spec}
    mesh = make_mesh(MeshSpec(**sizes), jax.devices()[: int(np.prod(list(sizes.values())))])
    state = jax.device_put(state, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()))
    with (
        nnx.use_eager_sharding(False),
        jax.sharding.use_abstract_mesh(mesh.abstract_mesh),
        target.tracing_for(mesh, make_rules((), mesh)),
    ):
        lowered = jax.jit(jax.value_and_grad(mean)).lower(state)
    assert "manual_computation" in lowered.as_text()
    return lowered.compile()(state)


@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradients_are_the_same_on_a_mesh(kind):
    changes = {**BIG, **KINDS[kind]}
    tokens = jnp.asarray(np.random.default_rng(1).integers(36, size=(8, 9)))
    plain = {"loss_chunk": 4096, "mlp_chunk": 0, "remat": "none"}
    value, grads = loss_and_grads(make(**{**changes, **plain}), tokens)
    for name, spec in MESHES.items():
        other, other_grads = loss_and_grads(make(**changes), tokens, spec)
        np.testing.assert_allclose(other, value, rtol=1e-6, err_msg=name)
        expected = dict(nnx.to_flat_state(grads))
        for path, grad in nnx.to_flat_state(other_grads):
            np.testing.assert_allclose(
                grad[...], expected[path][...], atol=1e-6, err_msg=f"{name} {path}"
            )
