"""The collectives of a compiled module: what a device sends in a step, along which axes and links.

Bytes are those that a device must send at the least, by whatever algorithm: of an all-gather
(n - 1) / n of its result, of a reduce-scatter and an all-to-all as much of its operand, of an
all-reduce twice that (it is both), of a permute all of it. (Patarasuk and Yuan, 'Bandwidth optimal
all-reduce algorithms', 2009.)
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from trainer.plan.hlo import Computation, Instruction, Module, metadata
from trainer.plan.loops import executions

_KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute",
          "ragged-all-to-all", "collective-broadcast")  # fmt: skip
# XLA's name of a fusion of an all-reduce with the slice of it that is kept.
_SCATTERING = "all-reduce-scatter"
_ASYNC = re.compile(r'custom_call_target="AsyncCollectiveStart"')


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective of the program.

    Attributes:
      kind: e.g. `all-gather`; the name of an asynchronous or fused form is that of its kind.
      axes: mesh axes along which data moves.
      link: `ici` or `dcn` on TPU; `host` (within a host) or `network` elsewhere.
      count: how often it runs in a step.
      sent_bytes: per device and step, over all its runs.
      dtype: of the largest array that moves.
      op: the operation of the model that it belongs to, as JAX names it.
    """

    kind: str
    axes: tuple[str, ...]
    link: str
    count: float
    sent_bytes: float
    dtype: str
    op: str


class Grid(NamedTuple):
    """Where the partitions of a module are.

    Attributes:
      names: the mesh axes.
      shape: their sizes.
      slices: of each device in the mesh's order, the slice it is in.
      hosts: of each device, the host it is on.
      on_tpu: whether links are ICI and DCN.
    """

    names: tuple[str, ...]
    shape: tuple[int, ...]
    slices: tuple[int, ...]
    hosts: tuple[int, ...]
    on_tpu: bool

    def within(self, num_partitions: int) -> list[int]:
        """The devices that a module's partitions are, as numbers in the mesh's order.

        For several slices XLA compiles the program of one; its partitions are that slice's devices.
        """
        if num_partitions == len(self.slices):
            return list(range(num_partitions))
        first = self.slices[0]
        return [number for number, which in enumerate(self.slices) if which == first]

    def axes(self, devices: Sequence[int]) -> tuple[str, ...]:
        """The axes along which these devices differ."""
        places = np.array(np.unravel_index(np.asarray(devices), self.shape))
        return tuple(
            name for name, line in zip(self.names, places, strict=True) if len(set(line)) > 1
        )

    def link(self, devices: Sequence[int]) -> str:
        """The slowest link between these devices."""
        where = self.slices if self.on_tpu else self.hosts
        apart = len({where[device] for device in devices}) > 1
        if self.on_tpu:
            return "dcn" if apart else "ici"
        return "network" if apart else "host"

    def across_slices(self) -> tuple[str, ...]:
        """The axes that reach over several slices."""
        places = np.array(np.unravel_index(np.arange(len(self.slices)), self.shape))
        slices = np.asarray(self.slices)
        found = []
        for axis, name in enumerate(self.names):
            others = np.delete(places, axis, axis=0)
            lines: dict[tuple[int, ...], set[int]] = {}
            for device in range(len(slices)):
                lines.setdefault(tuple(others[:, device]), set()).add(int(slices[device]))
            if any(len(line) > 1 for line in lines.values()):
                found.append(name)
        return tuple(found)


def collectives(module: Module, grid: Grid) -> list[Collective]:
    """All collectives that a run of the module carries out.

    Args:
      module: compiled.
      grid: its partitions' places.
    """
    counts, _ = executions(module)
    devices = grid.within(module.num_partitions)
    found = []
    for name, times in counts.items():
        instructions = module.computations[name].instructions
        # A collective that runs beside other work is cut up: a fusion starts it, others carry it
        # along, one ends it, and each holds the instruction. It is counted where it starts.
        starts = {
            operand
            for instruction in instructions.values()
            if _ASYNC.search(instruction.attributes)
            for operand in instruction.operands
        }
        for instruction in instructions.values():
            kind = instruction.opcode.removesuffix("-start")
            if instruction.opcode == "send" and "_xla_megascale_transfer_type" in (
                instruction.attributes
            ):
                found.append(_between_slices(instruction, grid, times))
            elif kind in _KINDS:
                carried = "chain_id=" in instruction.attributes and instruction.name not in starts
                if not carried:
                    scattered = kind == "all-reduce" and name.startswith(_SCATTERING)
                    kind = "reduce-scatter" if scattered else kind
                    one = _within_module(
                        instruction,
                        module.computations[name],
                        kind=kind,
                        devices=devices,
                        grid=grid,
                        times=times,
                    )
                    if one is not None:
                        found.append(one)
    return found


def _within_module(
    instruction: Instruction,
    computation: Computation,
    *,
    kind: str,
    devices: Sequence[int],
    grid: Grid,
    times: float,
) -> Collective | None:
    """A collective between partitions of the module; None where it is among one device alone."""
    instructions = computation.instructions
    made = list(instruction.shapes)
    if instruction.opcode.endswith("-start") and kind != "all-reduce":
        # (operands, results, ...): the result of an all-gather is the larger one.
        made = made[len(instruction.operands) : 2 * len(instruction.operands)] or made
    taken = [shape for name in instruction.operands if name in instructions
             for shape in instructions[name].shapes]  # fmt: skip
    moved = made if kind == "all-gather" else (taken or made)
    size = sum(shape.bytes for shape in moved)
    if kind == "collective-permute":
        pairs = _pairs(instruction.attributes)
        groups = [pair for pair in pairs if pair[0] != pair[1]]
        factor = 1.0
    else:
        groups = replica_groups(instruction.attributes, len(devices))
        n = len(groups[0]) if groups else 1
        factor = (n - 1) / n * (2 if kind == "all-reduce" else 1)
        groups = [] if n == 1 else groups
    if not groups:
        return None
    members = [[devices[partition] for partition in group] for group in groups]
    axes = tuple(
        name for name in grid.names if any(name in grid.axes(group) for group in members[:64])
    )
    links = {grid.link(group) for group in members}
    link = next((slow for slow in ("dcn", "network") if slow in links), next(iter(links)))
    dtype = max(moved, key=lambda shape: shape.bytes).dtype
    op, _ = metadata(instruction.attributes)
    return Collective(kind, axes, link, times, times * factor * size, dtype, op)


def _between_slices(instruction: Instruction, grid: Grid, times: float) -> Collective:
    """What the runtime of several slices carries out: the program only hands the data over."""
    named = re.search(r'_xla_megascale_transfer_type="(\w+)"', instruction.attributes)
    kind = (named[1] if named else "all-reduce").lower().replace("_", "-")
    data = instruction.shapes[0]
    n = len(set(grid.slices))
    factor = {"all-reduce": 2 * (n - 1) / n, "all-gather": float(n - 1),
              "reduce-scatter": (n - 1) / n, "all-to-all": (n - 1) / n}.get(kind, 1.0)  # fmt: skip
    op, _ = metadata(instruction.attributes)
    return Collective(
        kind, grid.across_slices(), "dcn", times, times * factor * data.bytes, data.dtype, op
    )


def replica_groups(attributes: str, num_partitions: int) -> list[list[int]]:
    """The groups of partitions between which a collective runs.

    XLA writes them as lists, `{{0,1},{2,3}}`; as a reshaped and transposed range,
    `[2,2]<=[4]T(1,0)`; or by the axes of a mesh, `mesh['a'=2,'b'=2] {'a'}`.

    Raises:
      ValueError: written in a form that is not known here.
    """
    found = re.search(r"replica_groups=(.*)", attributes)
    if found is None:
        return [list(range(num_partitions))]
    text = found[1]
    if text.startswith("{}"):
        return [list(range(num_partitions))]
    if text.startswith("{{"):
        return _lists(text)
    if ranged := re.match(r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text):
        shape, dims = _numbers(ranged[1]), _numbers(ranged[2])
        order = np.arange(int(np.prod(dims))).reshape(dims)
        if ranged[3]:
            order = order.transpose(_numbers(ranged[3]))
        return order.reshape(shape[0], -1).tolist()
    if meshed := re.match(r"mesh\[([^\]]*)\](.*?)\{([^}]*)\}", text):
        return _along_axes(meshed[1], meshed[2], meshed[3])
    raise ValueError(f"replica_groups in a form that is not known: {text[:80]}")


def _along_axes(mesh: str, between: str, along: str) -> list[list[int]]:
    """Groups along some axes of a mesh, all other coordinates being equal.

    An axis may be used in part: `'a':(2)4` is the part of size 4 that has a part of size 2 before.
    """
    sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", mesh)}
    order = np.arange(int(np.prod(list(sizes.values()))))
    if turned := re.search(r"device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?", between):
        order = order.reshape(_numbers(turned[1]))
        order = order.transpose(_numbers(turned[2])) if turned[2] else order
    elif listed := re.search(r"device_ids=\(([\d,]+)\)", between):
        order = np.asarray(_numbers(listed[1]))
    dims: list[int] = []
    chosen: list[int] = []
    parts: dict[str, list[tuple[int, int]]] = {}
    for name, before, size in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", along):
        parts.setdefault(name, []).append((int(before or 1), int(size or sizes[name])))
    for name, whole in sizes.items():
        done = 1
        for before, size in sorted(parts.get(name, [])):
            dims += [before // done, size]
            chosen.append(len(dims) - 1)
            done = before * size
        dims.append(whole // done)
    grid = order.reshape(dims)
    others = [axis for axis in range(len(dims)) if axis not in chosen]
    width = int(np.prod([dims[axis] for axis in chosen], dtype=int))
    return grid.transpose([*others, *chosen]).reshape(-1, width).tolist()


def _pairs(attributes: str) -> list[list[int]]:
    found = re.search(r"source_target_pairs=(\{\{.*?\}\})", attributes)
    return _lists(found[1]) if found else []


def _lists(text: str) -> list[list[int]]:
    whole = re.match(r"\{(\{[\d,]*\},?)*\}", text)
    return [_numbers(group) for group in re.findall(r"\{([\d,]+)\}", whole[0] if whole else "")]


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",") if number]
