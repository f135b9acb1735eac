"""The state ledger: what every leaf of the train state costs each device, and what is wasted."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax

from launch.contract import SCHEMA
from launch.spec import ConfigError
from trainer.sharding import mesh_axes_of
from trainer.state import StateLayout

# Axes that exist to divide the state. `data` copies it by definition (see `Ledger.copies`).
STATE_AXES = ("fsdp", "tensor")


@dataclasses.dataclass(frozen=True)
class LedgerEntry:
    """One leaf. Bytes are of the array's elements.

    Attributes:
      group: `params`, `optimizer` or `rest` (random numbers, batch statistics).
      total_bytes: of the whole array, counted once.
      device_bytes: on each device.
      missing_axes: axes with more than one device that should split the leaf and do not: those of
        STATE_AXES, for the optimizer's state also those of `optimizer_axes`.
      excess_bytes: of `device_bytes`, how much splitting over `missing_axes` would save.
    """

    name: str
    group: str
    shape: tuple[int, ...]
    dtype: str
    spec: str
    total_bytes: int
    device_bytes: int
    missing_axes: tuple[str, ...]
    excess_bytes: int


@dataclasses.dataclass(frozen=True)
class Ledger:
    """All leaves of a train state on one mesh.

    Attributes:
      copies: how many times the whole state exists because of the `data` axis; of the optimizer's
        state there is one where `optimizer_axes` has `data`.
      optimizer_axes: axes that split the optimizer's state besides those of its params.
    """

    entries: tuple[LedgerEntry, ...]
    mesh_shape: dict[str, int]
    copies: int
    optimizer_axes: tuple[str, ...] = ()

    @property
    def device_bytes(self) -> int:
        """Bytes of train state on each device."""
        return sum(entry.device_bytes for entry in self.entries)

    @property
    def excess_bytes(self) -> int:
        """Bytes on each device that full sharding over STATE_AXES would save."""
        return sum(entry.excess_bytes for entry in self.entries)

    def excess_by_axis(self) -> dict[str, int]:
        """Axis -> bytes on each device that splitting over it, and it alone, would save."""
        axes: dict[str, int] = {}
        for entry in self.entries:
            for axis in entry.missing_axes if entry.excess_bytes else ():
                saved = entry.device_bytes - entry.device_bytes // self.mesh_shape[axis]
                axes[axis] = axes.get(axis, 0) + saved
        return axes

    def group_bytes(self) -> dict[str, tuple[int, int]]:
        """Group -> (bytes in total, bytes per device)."""
        groups: dict[str, tuple[int, int]] = {}
        for entry in self.entries:
            total, device = groups.get(entry.group, (0, 0))
            groups[entry.group] = (total + entry.total_bytes, device + entry.device_bytes)
        return groups

    def under_sharded(self) -> list[LedgerEntry]:
        """Leaves that are replicated or under-sharded along an axis, largest waste first."""
        wasteful = [entry for entry in self.entries if entry.excess_bytes]
        return sorted(wasteful, key=lambda entry: (-entry.excess_bytes, entry.name))

    def as_record(self) -> dict[str, Any]:
        """JSON for the run directory."""
        return {
            "schema": SCHEMA,
            "mesh": self.mesh_shape,
            "copies": self.copies,
            "optimizer_axes": self.optimizer_axes,
            "device_bytes": self.device_bytes,
            "excess_bytes": self.excess_bytes,
            "excess_bytes_by_axis": self.excess_by_axis(),
            "groups": {
                name: {"total_bytes": total, "device_bytes": device}
                for name, (total, device) in self.group_bytes().items()
            },
            "leaves": [dataclasses.asdict(entry) for entry in self.entries],
        }

    def as_text(self, most: int = 5) -> str:
        """A few lines for people, naming the `most` most wasteful leaves."""
        mesh = " ".join(f"{axis}={size}" for axis, size in self.mesh_shape.items())
        lines = [f"state on mesh {mesh}: {human_bytes(self.device_bytes)} per device"]
        for name, (total, device) in self.group_bytes().items():
            lines.append(
                f"  {name:<10}{human_bytes(total):>11} in all{human_bytes(device):>11} each"
            )
        if self.copies > 1:
            what = "the params, and splits the optimizer's state"
            what = what if "data" in self.optimizer_axes else "it, by definition"
            lines.append(f"  data={self.copies} keeps {self.copies} copies of {what}")
        wasteful = self.under_sharded()
        if wasteful:
            by_axis = ", ".join(
                f"{human_bytes(size)} for want of {axis}"
                for axis, size in self.excess_by_axis().items()
            )
            lines.append(
                f"  under-sharded: {len(wasteful)} leaves, {human_bytes(self.excess_bytes)} per "
                f"device more than needed ({by_axis})"
            )
        for entry in wasteful[:most]:
            lines.append(
                f"    {entry.name} {list(entry.shape)} {entry.spec}: "
                f"{human_bytes(entry.excess_bytes)}, not split over {', '.join(entry.missing_axes)}"
            )
        return "\n".join(lines)


def make_ledger(layout: StateLayout) -> Ledger:
    """Read the ledger off a layout; no array is needed."""
    mesh_shape = dict(layout.mesh.shape)
    entries = []
    for name, leaf in zip(layout.names, layout.abstract, strict=True):
        total, device = array_bytes(leaf)
        axes: tuple[str, ...] = STATE_AXES
        group = _group(name, layout)
        if group == "optimizer":
            axes = tuple(dict.fromkeys((*STATE_AXES, *layout.optimizer_axes)))
        missing = tuple(
            axis
            for axis in axes
            if leaf.size > 1  # A scalar has nothing to split.
            and mesh_shape[axis] > 1
            and axis not in mesh_axes_of(leaf.sharding.spec)
        )
        split = math.prod(mesh_shape[axis] for axis in missing)
        entries.append(
            LedgerEntry(
                name=name,
                group=group,
                shape=tuple(leaf.shape),
                dtype=str(leaf.dtype),
                spec=_spec_text(leaf.sharding.spec),
                total_bytes=total,
                device_bytes=device,
                missing_axes=missing,
                excess_bytes=device - device // split,
            )
        )
    return Ledger(tuple(entries), mesh_shape, mesh_shape["data"], layout.optimizer_axes)


def check_replication(ledger: Ledger, max_replicated_bytes: int | None) -> None:
    """Refuse a layout that wastes more than the config allows.

    Raises:
      ConfigError: with the largest leaves, before anything is made.
    """
    if max_replicated_bytes is None or ledger.excess_bytes <= max_replicated_bytes:
        return
    worst = "; ".join(
        f"{entry.name} {human_bytes(entry.excess_bytes)} (not over {', '.join(entry.missing_axes)})"
        for entry in ledger.under_sharded()[:5]
    )
    raise ConfigError(
        "config.sharding.max_replicated_bytes",
        f"{ledger.excess_bytes} bytes per device are replicated or under-sharded; largest: "
        f"{worst}; name their axes, change the rules, or raise the limit",
        max_replicated_bytes,
    )


def array_bytes(leaf: jax.ShapeDtypeStruct) -> tuple[int, int]:
    """(bytes of the whole array, bytes of one device's shard), PRNG keys included."""
    if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        data = jax.eval_shape(jax.random.key_data, leaf)
        width = data.dtype.itemsize * math.prod(data.shape[len(leaf.shape) :])
    else:
        width = leaf.dtype.itemsize
    shard = leaf.sharding.shard_shape(tuple(leaf.shape))
    return math.prod(leaf.shape) * width, math.prod(shard) * width


def human_bytes(count: float) -> str:
    """1536 -> '1.5 KiB'."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def _group(name: str, layout: StateLayout) -> str:
    if name.startswith("optimizer."):
        return "optimizer"
    return "params" if name in layout.params else "rest"


def _spec_text(spec: Any) -> str:
    return f"P({', '.join(repr(entry) for entry in spec)})"
