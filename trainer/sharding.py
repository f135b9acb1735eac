"""Logical axis names to PartitionSpecs, for params and for optimizer state alike.

An `nnx.Param` names its dims ('embed', 'mlp', ...); one table of rules maps the names to mesh
axes. `annotate` completes what a model leaves open and refuses what cannot be laid out, so that
afterwards `nnx.get_partition_spec` is right for every variable, and `nnx.Optimizer` passes the
same names on to the moments.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from launch.spec import BATCH_AXES, ConfigError, closest

MeshAxes = str | tuple[str, ...] | None

# The dim of a variable without names that `annotate` splits over `fsdp`.
UNNAMED = "unnamed"

# Logical axis -> mesh axis. `config.sharding.rules` overrides entries or adds names.
DEFAULT_RULES: Mapping[str, MeshAxes] = {
    "batch": BATCH_AXES,
    "vocab": "tensor",
    "embed": "fsdp",
    "mlp": "tensor",
    "heads": "tensor",
    "kv_heads": "tensor",
    "head_dim": None,
    "layers": None,
    "norm": None,  # A norm's scale is small, and every device needs all of it.
    UNNAMED: "fsdp",
}


def make_rules(overrides: Sequence[Any], mesh: Mesh) -> dict[str, MeshAxes]:
    """The built-in table with `config.sharding.rules` over it.

    Args:
      overrides: pairs (logical name, mesh axis, tuple of mesh axes, or None).

    Raises:
      ConfigError: not a pair, or no such mesh axis.
    """
    rules = dict(DEFAULT_RULES)
    for index, rule in enumerate(overrides):
        field = f"config.sharding.rules[{index}]"
        if not (isinstance(rule, tuple) and len(rule) == 2 and isinstance(rule[0], str)):
            raise ConfigError(field, "must be a pair (logical axis, mesh axis or None)", rule)
        name, axes = rule
        for axis in as_tuple(axes):
            if axis not in mesh.shape:
                raise ConfigError(
                    field, f"no mesh axis {axis!r}; {closest(axis, mesh.shape)}", rule
                )
        if name in mesh.shape:
            raise ConfigError(field, "a mesh axis cannot be a logical axis's name", rule)
        rules[name] = axes
    return rules


def annotate(model: nnx.Module, mesh: Mesh, rules: Mapping[str, MeshAxes]) -> None:
    """Give every unnamed Param a layout, and check every named one.

    A Param without names is split over `fsdp` along its largest dim that divides; one in which no
    dim divides stays whole, and the ledger says so.

    Raises:
      ConfigError: a name without a rule, a dim that its mesh axes do not divide, one mesh axis
        used for two dims, or names that do not match the rank. It names the parameter.
    """
    for path, variable in nnx.iter_graph(model):
        if not isinstance(variable, nnx.Param) or not hasattr(variable.get_value(), "shape"):
            continue
        shape = variable.get_value().shape
        names = variable.get_metadata().get("out_sharding")
        if names:
            _check_layout(dotted(path), shape, tuple(names), mesh, rules)
        else:
            names = _layout_of_unnamed(shape, mesh.shape["fsdp"])
            if names:
                variable.set_metadata(out_sharding=names)


def _layout_of_unnamed(shape: Sequence[int], size: int) -> tuple[str | None, ...] | None:
    """Names that split the largest dim which `size` divides; None when there is none."""
    dims = [dim for dim, length in enumerate(shape) if length and length % size == 0]
    if not dims:
        return None
    largest = max(dims, key=lambda dim: shape[dim])
    return tuple(UNNAMED if dim == largest else None for dim in range(len(shape)))


def _check_layout(
    path: str,
    shape: Sequence[int],
    names: Sequence[str | None],
    mesh: Mesh,
    rules: Mapping[str, MeshAxes],
) -> None:
    if len(names) != len(shape):
        raise ConfigError("", f"parameter {path} has shape {tuple(shape)} but axis names {names}")
    used: dict[str, str] = {}
    for dim, name in enumerate(names):
        if name is None:
            continue
        if name not in rules:
            raise ConfigError(
                "config.sharding.rules",
                f"no rule for logical axis {name!r} of parameter {path}; {closest(name, rules)} "
                f"Otherwise add ({name!r}, mesh axis or None)",
            )
        axes = as_tuple(rules[name])
        size = math.prod(mesh.shape[axis] for axis in axes)
        if shape[dim] % size:
            raise ConfigError(
                "config.mesh",
                f"{' * '.join(axes)} = {size} does not divide dim {dim} ({name!r}, {shape[dim]}) "
                f"of parameter {path} {tuple(shape)}; change the mesh, or map {name!r} to None in "
                "config.sharding.rules",
            )
        for axis in axes:
            if axis in used and mesh.shape[axis] > 1:
                raise ConfigError(
                    "config.sharding.rules",
                    f"parameter {path} would use mesh axis {axis!r} twice, for {used[axis]!r} and "
                    f"{name!r}; map one of them to another axis or None",
                )
            used[axis] = name


def partition_specs(state: Any, rules: Mapping[str, MeshAxes]) -> list[PartitionSpec]:
    """One PartitionSpec per array of an nnx.State, in the order of `jax.tree.leaves`."""
    with nnx.logical_axis_rules(tuple(rules.items())):
        specs = nnx.get_partition_spec(state)
    return jax.tree.leaves(specs, is_leaf=lambda leaf: isinstance(leaf, PartitionSpec))


def spec_of_names(names: Sequence[str | None], rules: Mapping[str, MeshAxes]) -> PartitionSpec:
    """The PartitionSpec of an array whose dims have these logical names."""
    return PartitionSpec(*[rules.get(name, name) if name else None for name in names])


def named_shardings(state: Any, mesh: Mesh, rules: Mapping[str, MeshAxes]) -> list[NamedSharding]:
    """One NamedSharding per array of an nnx.State, in the order of `jax.tree.leaves`."""
    return [NamedSharding(mesh, spec) for spec in partition_specs(state, rules)]


def mesh_axes_of(spec: PartitionSpec) -> set[str]:
    """The mesh axes that a PartitionSpec splits over."""
    return {axis for entry in spec for axis in as_tuple(entry)}


def dotted(path: Sequence[Any]) -> str:
    """A path of keys, or of JAX's key objects, as `layers.0.mlp.kernel`."""
    return ".".join(
        str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path
    )


def as_tuple(axes: MeshAxes) -> tuple[str, ...]:
    """One entry of a PartitionSpec as a tuple of mesh axes."""
    if axes is None:
        return ()
    return (axes,) if isinstance(axes, str) else tuple(axes)
