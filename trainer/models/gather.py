"""How a sharded weight comes together where it is used, and how its gradient goes back."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.layout import Layout, with_layout_constraint

GATHERED = "gathered"  # What gathered weights are called in policies of what to keep.


@dataclasses.dataclass(frozen=True)
class Gather:
    """How one weight travels. Hashable; calls are made inside shard_map (or have no axes).

    Attributes:
      dims: for each dim of the weight, the mesh axes to gather it over.
      others: mesh axes that split the batch but not the weight: gradients are summed over them.
      dtype: what the weight is cast to before it travels.
      lines: of `trainer.target.Target`; weights are gathered over them in two steps.
      align: of `Place`; rows of gradients are scattered padded to a multiple of it.
    """

    dims: tuple[tuple[str, ...], ...]
    others: tuple[str, ...]
    dtype: str
    lines: tuple[tuple[str, int], ...] = ()
    align: int = 1

    def __call__(self, shard: jax.Array) -> jax.Array:
        """The weight that all devices of a group hold a shard of; differentiable."""
        if not self.others and not any(self.dims):
            return shard.astype(self.dtype)
        return checkpoint_name(_gather(self, shard), GATHERED)

    def gather(self, shard: jax.Array) -> jax.Array:
        """Cast and gather."""
        weight = shard.astype(self.dtype)
        for dim, axes in enumerate(self.dims):
            for axis in reversed(axes):
                for groups in self._steps(axis):
                    weight = jax.lax.all_gather(
                        weight, axis, axis=dim, tiled=True, axis_index_groups=groups
                    )
        return weight

    def _steps(self, axis: str) -> list[list[list[int]] | None]:
        """The groups of an axis in which a weight is gathered, one step after the other.

        Over three dims of a torus at once, libtpu 0.0.52 makes an all-reduce of an all-gather: it
        sends twice the bytes. Over a line and then a plane both stay what they are.
        """
        line = dict(self.lines).get(axis)
        if line is None:
            return [None]
        places = np.arange(jax.lax.axis_size(axis)).reshape(-1, line)
        return [places.tolist(), places.T.tolist()]

    def scatter(self, gradient: jax.Array) -> jax.Array:
        """Sum the devices' gradients of a gathered weight; each keeps its shard."""
        for dim, axes in enumerate(self.dims):
            if axes and self.align > 1:
                gradient = self._scatter_rows(gradient, dim, axes)
            elif axes:
                gradient = jax.lax.psum_scatter(gradient, axes, scatter_dimension=dim, tiled=True)
        return jax.lax.psum(gradient, self.others) if self.others else gradient

    def _scatter_rows(self, gradient: jax.Array, dim: int, axes: tuple[str, ...]) -> jax.Array:
        """A scatter that libtpu 0.0.52 leaves one, with `trainer.xla_flags`.

        Of rows that lie one after the other, whose length can be split into four parts of whole
        tiles. Any other is summed up on every device, which sends twice the bytes.
        """
        rows = jnp.moveaxis(gradient, dim, 0)
        shape = rows.shape[1:]
        rows = rows.reshape(rows.shape[0], -1)
        length = rows.shape[1]
        padding = -length % self.align
        if padding <= length // 16:  # More would cost what it saves.
            rows = jnp.pad(rows, ((0, 0), (0, padding)))
        rows = with_layout_constraint(rows, Layout((0, 1)))
        rows = jax.lax.psum_scatter(rows, axes, scatter_dimension=0, tiled=True)
        return jnp.moveaxis(rows[:, :length].reshape(-1, *shape), 0, dim)

    def flat(self, behind: int) -> Gather | None:
        """The same for a weight of two dims: those before `behind`, and the others, are one each.

        None, where a dim that is not the first of its group is gathered.
        """
        groups = (self.dims[:behind], self.dims[behind:])
        if any(axes for group in groups for axes in group[1:]):
            return None
        return dataclasses.replace(self, dims=tuple(group[0] for group in groups))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _gather(how: Gather, shard: jax.Array) -> jax.Array:
    return how.gather(shard)


def _gather_forward(how: Gather, shard: jax.Array) -> tuple[jax.Array, jax.Array]:
    return how.gather(shard), jnp.zeros((), shard.dtype)


def _gather_backward(how: Gather, like: jax.Array, gradient: jax.Array) -> tuple[jax.Array]:
    return (how.scatter(gradient).astype(like.dtype),)


_gather.defvjp(_gather_forward, _gather_backward)
