"""A loss computed by every device from its shards, with its gradients, in one shard_map.

Left to itself XLA decides what travels: it gathers weights in float32, reduces whole gradients and
cuts them afterwards, and where a weight is split it may split activations. Inside of shard_map it
decides nothing: what travels is what `trainer.models.place` says.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import PartitionSpec as P

from trainer.models.place import Place, specs_of

Local = Callable[[Any, jax.Array], jax.Array]


def summed_over_mesh(local: Local, params: Any, batch: jax.Array, place: Place) -> jax.Array:
    """The sum over devices of `local`, differentiable in the params.

    The gradients are computed along with the value, inside of the same shard_map: differentiated
    from outside it would sum every gradient over the mesh once more.

    Args:
      local: (this device's shards of the params, its rows of the batch) -> scalar float32. Every
        param passes through `place.gather`, whose gradient is that of the sum over devices.
      params: an nnx.State of whole arrays.
      batch: [B, ...], split over `place.batch` on the first dim.
      place: not `WHOLE`.
    """
    if not place.batch and not place.tensor:
        return local(params, batch)  # One device.
    leaves, treedef = jax.tree.flatten(params)
    specs = specs_of(params, place)

    def of_leaves(leaves: list[jax.Array], batch: jax.Array) -> jax.Array:
        return local(jax.tree.unflatten(treedef, leaves), batch)

    def total(value: jax.Array) -> jax.Array:
        return jax.lax.psum(value, place.batch) if place.batch else value

    # check_vma=False: Pallas kernels do not say what varies over the mesh.
    mapped = functools.partial(
        jax.shard_map, in_specs=(specs, P(place.batch or None)), check_vma=False
    )

    @jax.custom_vjp
    def summed(leaves: list[jax.Array], batch: jax.Array) -> jax.Array:
        return mapped(lambda *args: total(of_leaves(*args)), out_specs=P())(leaves, batch)

    def forward(leaves: list[jax.Array], batch: jax.Array) -> tuple[jax.Array, list[jax.Array]]:
        def both(leaves: list[jax.Array], batch: jax.Array) -> tuple[jax.Array, list[jax.Array]]:
            value, gradients = jax.value_and_grad(of_leaves)(leaves, batch)
            return total(value), gradients

        return mapped(both, out_specs=(P(), specs))(leaves, batch)

    def backward(gradients: list[jax.Array], scale: jax.Array) -> tuple[list[jax.Array], None]:
        return [(gradient * scale).astype(gradient.dtype) for gradient in gradients], None

    summed.defvjp(forward, backward)
    return summed(leaves, batch)
