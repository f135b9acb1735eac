"""A weight is gathered whole and its gradient summed, by whichever steps the platform wants."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from launch.spec import MeshSpec
from trainer.mesh import make_mesh
from trainer.models.gather import Gather

AXES = ("data", "fsdp")
CASES = {
    "first dim": Gather((("fsdp",), ()), ("data",), "float32"),
    "last dim": Gather(((), ("fsdp",)), ("data",), "float32"),
    "both axes": Gather((("data", "fsdp"), ()), (), "float32"),
    "two steps, padded rows": Gather(((), ("fsdp",)), ("data",), "float32", (("fsdp", 2),), 9),
    "three dims": Gather(((), ("fsdp",), ()), ("data",), "float32", (), 8),
    "nowhere": Gather(((), ()), AXES, "float32"),
}


@pytest.mark.parametrize("case", CASES)
def test_gathered_whole_and_gradients_summed_over_all_devices(case):
    how = CASES[case]
    mesh = make_mesh(MeshSpec(data=2, fsdp=4), jax.devices()[:8])
    shape = (8, 4, 3)[: len(how.dims)] if how.align < 9 else (17, 4)
    weight = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    factors = np.arange(1.0, 9.0, dtype=np.float32)  # Each device's own.
    spec = P(*how.dims)

    def local(shard, factor):
        def total(shard):
            whole = how(shard)
            return jnp.sum(jnp.square(whole)) * factor[0], whole

        (_, whole), grad = jax.value_and_grad(total, has_aux=True)(shard)
        return whole[None], grad

    mapped = jax.shard_map(
        local, mesh=mesh, in_specs=(spec, P(AXES)), out_specs=(P(AXES), spec), check_vma=False
    )
    whole, grad = jax.jit(mapped)(weight, factors)
    np.testing.assert_array_equal(whole, np.broadcast_to(weight, (8, *shape)))
    np.testing.assert_allclose(grad, 2 * weight * factors.sum())


def test_two_dims_are_made_of_a_weight_where_its_shards_allow_it():
    fsdp = ("fsdp",)
    assert Gather((fsdp, (), ()), (), "float32").flat(1).dims == (fsdp, ())
    assert Gather(((), (), fsdp), (), "float32").flat(2).dims == ((), fsdp)
    assert Gather(((), fsdp, ()), (), "float32").flat(2) is None
