"""Every device of a mesh computes its part of the loss; the gradients are those of the whole."""

import types

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

BIG = {"vocab_size": 36, "num_kv_heads": 2, "loss_chunk": 8}  # Chunks do not divide 36 / 2.
FSDP, EVERYTHING = {"fsdp": 4}, {"data": 2, "fsdp": 2, "tensor": 2}
SCANNED = {"scan_layers": True, "num_layers": 2}
KINDS = {
    "tied, everything": ({"z_loss": 0.01, "num_layers": 1}, EVERYTHING),
    "untied, everything": ({"tied_head": False, "mlp_chunk": 5, "num_layers": 1}, EVERYTHING),
    "scanned, everything, packed": (
        {**SCANNED, "remat": "full", "tied_head": False, "z_loss": 0.01},
        EVERYTHING,
    ),
    "scanned, fsdp": ({**SCANNED, "mlp_chunk": 5, "remat": "keep_qkv"}, FSDP),
    "scanned, everything": ({**SCANNED, "mlp_chunk": 5, "remat": "full"}, EVERYTHING),
}


def packing(tokens):
    """Documents of a few tokens, the last one padding; and the targets that there are in them."""
    segments = np.sort(np.random.default_rng(2).integers(3, size=tokens.shape))[:, ::-1]
    same = (segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] > 0)
    return jnp.asarray(segments[:, :-1].copy(), jnp.int32), jnp.where(same, tokens[:, 1:], -1)


def loss_and_grads(model, tokens, spec=None, packed=False):
    """The mean loss and its gradients, on a mesh as a step sees it or on no mesh at all."""
    graphdef, state = nnx.split(model)

    def mean(state):
        segments, targets = packing(tokens) if packed else (None, tokens[:, 1:])
        total, weight = nnx.merge(graphdef, state).loss(tokens[:, :-1], targets, segments)
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
    (changes, spec), packed = KINDS[kind], "packed" in kind
    tokens = jnp.asarray(np.random.default_rng(1).integers(36, size=(8, 9)))
    plain = {"loss_chunk": 4096, "mlp_chunk": 0, "remat": "none"}
    value, grads = loss_and_grads(make(**{**BIG, **changes, **plain}), tokens, packed=packed)
    other, other_grads = loss_and_grads(make(**{**BIG, **changes}), tokens, spec, packed)
    np.testing.assert_allclose(other, value, rtol=1e-6)
    expected = dict(nnx.to_flat_state(grads))
    for path, grad in nnx.to_flat_state(other_grads):
        np.testing.assert_allclose(grad[...], expected[path][...], atol=1e-6, err_msg=str(path))


class Chip:
    """A TPU chip at a place."""

    def __init__(self, *coords, slice_index=0):
        self.coords, self.slice_index, self.platform = coords, slice_index, "tpu"


def grid(chips, *shape):
    """A mesh of them, of which only the axis `fsdp` is asked for."""
    devices = np.empty(len(chips), object)
    devices[:] = chips
    return types.SimpleNamespace(
        axis_names=("data", "fsdp"), devices=devices.reshape(shape), shape={"fsdp": shape[1]}
    )


CUBE = [Chip(x, y, z) for x in range(2) for y in range(3) for z in range(4)]


@pytest.mark.parametrize(
    ("mesh", "line"),
    [
        (grid(CUBE, 1, 24), 4),
        (grid(sorted(CUBE, key=lambda chip: chip.coords[::-1]), 1, 24), 2),
        (grid(CUBE, 2, 12), None),  # A plane.
        (grid(CUBE[:-2] + CUBE[:-3:-1], 1, 24), None),  # Not straight.
        (grid([Chip(*c.coords, slice_index=c.coords[0]) for c in CUBE], 1, 24), None),
        (grid([Chip(x, y, 0) for x in range(4) for y in range(4)], 1, 16), None),
    ],
)
def test_an_axis_over_three_dims_of_a_torus_goes_along_lines(mesh, line):
    assert target.line_of_torus(mesh, "fsdp") == line
