"""Where a model's arrays lie while its loss is computed, and how weights and gradients travel.

The loss of a sharded model is computed inside one `jax.shard_map` (`trainer.models.sharded_loss`):
every device has its examples, its shards of the weights, and plain local code. What goes over the
mesh is said here, and is nothing else:

- a weight is cast to the compute dtype and gathered over the axes that split the batch, where it is
  used; its gradient is reduce-scattered back to the shard, in the compute dtype (`Gather`);
- over the axis `tensor`, which splits heads, the MLP and the vocabulary, activations are summed:
  behind each pair of projections, and on the way back before it (`leave` and `enter`).

Without a place (`WHOLE`) the same code runs on whole arrays, and XLA may partition it.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
from flax import nnx
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from launch.spec import BATCH_AXES
from trainer import target
from trainer.models.gather import Gather
from trainer.sharding import MeshAxes, as_tuple

_TENSOR = "tensor"
_SPLIT_NAMES = ("heads", "kv_heads", "mlp", "vocab")  # Dims that local code takes as a share.


@dataclasses.dataclass(frozen=True, eq=False)
class Place:
    """What local code has to know of the mesh that it runs on.

    Attributes:
      platform: of the devices, `cpu`, `gpu` or `tpu`; None if nobody said.
      batch: mesh axes with more than one device that split the batch.
      tensor: the mesh axis that splits heads, MLP and vocabulary, or None.
      rules: logical axis -> mesh axes of the params.
      is_local: code sees this device's shards, not whole arrays that XLA partitions.
      lines: of `trainer.target.Target`.
    """

    platform: str | None = None
    batch: tuple[str, ...] = ()
    tensor: str | None = None
    rules: Mapping[str, MeshAxes] = dataclasses.field(default_factory=dict)
    is_local: bool = False
    lines: Mapping[str, int] = dataclasses.field(default_factory=dict)

    def gather(self, param: nnx.Param, dtype: str) -> Gather:
        """How a parameter travels, by the names of its dims."""
        names = (param.get_metadata().get("out_sharding") or ())[-param.get_value().ndim :]
        dims = [
            tuple(axis for axis in as_tuple(self.rules.get(name)) if axis in self.batch)
            for name in names
        ]
        used = {axis for axes in dims for axis in axes}
        others = tuple(axis for axis in self.batch if axis not in used)
        return Gather(tuple(dims), others, dtype, tuple(self.lines.items()), self.align)

    @property
    def align(self) -> int:
        """What sizes of chunks are to be multiples of.

        See Gather._scatter_rows; above 1 on TPU alone.
        """
        return 512 if self.platform == "tpu" else 1

    def weight(self, param: nnx.Param, dtype: str, behind: int = 0) -> jax.Array:
        """A parameter ready for use: cast, gathered over the batch's axes.

        Args:
          param: whose array is this device's shard.
          dtype: to cast it to.
          behind: make two dims of it: all before this one, and the others. 0 leaves it as it is.
        """
        gather, shard = self.gather(param, dtype), param[...]
        if not behind:
            return gather(shard)
        # Flat before it travels, which more compilers do well.
        shape = (math.prod(shard.shape[:behind]), -1)
        flat = gather.flat(behind)
        if flat is not None:
            return flat(shard.reshape(shape))
        weight = gather(shard)
        return weight.reshape(math.prod(weight.shape[:behind]), -1)

    def row_major(self, x: jax.Array) -> jax.Array:
        """x and its gradient, laid out row by row, where XLA would choose otherwise (TPU)."""
        if self.platform != "tpu":
            return x
        return with_layout_constraint(x, Layout(tuple(range(x.ndim))))

    def enter(self, x: jax.Array) -> jax.Array:
        """Before a projection whose outputs are split over `tensor`: gradients are summed."""
        return _enter(self.tensor, x) if self.tensor else x

    def enter_backward(self, dx: jax.Array) -> jax.Array:
        """The gradient of `enter`."""
        return jax.lax.psum(dx, self.tensor) if self.tensor else dx

    def leave(self, x: jax.Array) -> jax.Array:
        """Behind a projection whose inputs are split over `tensor`: sum the parts."""
        return _leave(self.tensor, x) if self.tensor else x


WHOLE = Place()


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _enter(axis: str, x: jax.Array) -> jax.Array:
    del axis
    return x


_enter.defvjp(lambda axis, x: (x, None), lambda axis, _, dx: (jax.lax.psum(dx, axis),))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _leave(axis: str, x: jax.Array) -> jax.Array:
    return jax.lax.psum(x, axis)


_leave.defvjp(lambda axis, x: (jax.lax.psum(x, axis), None), lambda axis, _, dx: (dx,))


def find_place(batch: int) -> Place:
    """The place of a loss over `batch` examples, from the mesh and the target in context.

    `WHOLE`, where local code cannot be run: nobody says what is traced for, the mesh is another's
    or a shard_map is open already, the batch does not divide, or the rules split dims over axes
    that local code does not expect there.
    """
    wanted = target.current()
    mesh = jax.sharding.get_abstract_mesh()
    types = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    if wanted is None or any(
        types.get(axis) is not AxisType.Auto for axis in (*BATCH_AXES, _TENSOR)
    ):
        return WHOLE
    if mesh.size == 1:
        return Place(wanted.platform, is_local=True)
    axes = tuple(axis for axis in BATCH_AXES if mesh.shape[axis] > 1)
    rules = {
        name: tuple(axis for axis in as_tuple(rule) if mesh.shape[axis] > 1)
        for name, rule in wanted.rules.items()
    }
    tensor = (_TENSOR,) if mesh.shape[_TENSOR] > 1 else ()
    divides = batch % math.prod(mesh.shape[axis] for axis in axes) == 0
    split = {rules.get(name) for name in _SPLIT_NAMES}
    free = all(_TENSOR not in rule for name, rule in rules.items() if name not in _SPLIT_NAMES)
    if not (divides and free and split == {tensor}) or rules.get("layers"):
        return WHOLE
    return Place(
        platform=wanted.platform,
        batch=axes,
        tensor=tensor[0] if tensor else None,
        rules=rules,
        is_local=True,
        lines=wanted.lines,
    )


def pin(x: jax.Array, spec: P) -> jax.Array:
    """Constrain x to `spec` where the mesh in context is the trainer's; else leave it alone."""
    mesh = jax.sharding.get_abstract_mesh()
    types = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    if any(types.get(axis) is not AxisType.Auto for axis in BATCH_AXES):
        return x  # No mesh, another's mesh, or inside shard_map.
    return jax.lax.with_sharding_constraint(x, spec)


def over_batch_axes(x_ND: jax.Array, batch: int) -> jax.Array:
    """Keep whole activations of `batch` examples split by example, and by nothing else.

    Otherwise XLA may split activations as weights are split over `fsdp`, and then reduces
    activations over the mesh instead of gathering weights.
    """
    mesh = jax.sharding.get_abstract_mesh()
    shards = math.prod(mesh.shape.get(axis, 1) for axis in BATCH_AXES)
    return x_ND if batch % shards else pin(x_ND, P(BATCH_AXES, None))


def specs_of(params: Any, place: Place) -> list[P]:
    """The PartitionSpec of every parameter of a State at a place, in the order of its leaves."""
    specs = []
    for param in jax.tree.leaves(params, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable)):
        names = param.get_metadata().get("out_sharding") or ()
        specs.append(P(*[place.rules.get(name) or None for name in names]))
    return specs
