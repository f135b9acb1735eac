"""What a buffer of the compiled program is, in the words of the model."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from trainer.plan.buffers import Buffer
from trainer.plan.hlo import Instruction, Module, metadata
from trainer.plan.loops import called
from trainer.state import StateLayout

_SHAPE = re.compile(r"([a-z]+[0-9]+[a-z0-9]*|pred)\[([\d,]*)\]")
# What an instruction is for, where its name or opcode says so.
_ROLES = (
    ("all-gather", "gathered"),
    ("all-reduce-scatter", "to be reduced and scattered"),
    ("reduce-scatter", "reduced and scattered"),
    ("all-reduce", "all-reduced"),
    ("collective-permute", "on its way"),
    ("while", "carried through a loop"),
    ("copy", "copied"),
)


class Named(NamedTuple):
    """A buffer and what it is: `bytes` on a device, `shape` as XLA writes it."""

    name: str
    bytes: int
    shape: str
    what: str


class Namer:
    """Finds words for buffers.

    Args:
      module: compiled.
      layout: of the train state, whose leaves are the first arguments.
      batch: names of the batch's arrays, the arguments behind these, in order.
    """

    def __init__(self, module: Module, layout: StateLayout, batch: Sequence[str]):
        self._module = module
        self._instructions: dict[str, Instruction] = {}
        for computation in module.computations.values():
            self._instructions.update(computation.instructions)
        self._arguments = [*layout.names, *(f"batch.{name}" for name in batch)]
        self._by_dims = _dims_of_params(layout)

    def argument(self, number: int) -> str:
        """The dotted name of an argument of the step."""
        known = number < len(self._arguments)
        return self._arguments[number] if known else f"argument {number}"

    def temporary(self, buffer: Buffer) -> Named:
        """Say of a temporary when it is made, by which function, and which parameter it is like."""
        op, frame = self._origin(self._instructions.get(buffer.name))
        parts = [_phase(op)] if op else []
        function = self._module.frames.get(frame, "")
        if function:
            parts.append(function.replace(".<locals>", ""))
        parts += [word for key, word in _ROLES if buffer.name.startswith(key)][:1]
        if like := self._like(buffer.shape):
            parts.append(like)
        what = ", ".join(parts) or (op.rsplit("/", 1)[-1] if op else "the compiler's own")
        return Named(buffer.name, buffer.size, buffer.shape.split("{")[0], what)

    def _origin(self, instruction: Instruction | None) -> tuple[str, str]:
        """The operation and the stack frame that an instruction comes from.

        A fusion without any has those of the last instruction in it that has.
        """
        if instruction is None:
            return "", ""
        op, frame = metadata(instruction.attributes)
        for name in () if op else called(instruction):
            inside = self._module.computations.get(name)
            for inner in reversed(inside.instructions.values() if inside else ()):
                op, frame = metadata(inner.attributes)
                if op:
                    return op, frame
        return op, frame

    def _like(self, shape: str) -> str:
        found = _SHAPE.search(shape)
        dims = _key(int(dim) for dim in found[2].split(",") if dim) if found else ()
        names = self._by_dims.get(dims)
        if not names:
            return ""
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        return f"of the shape of {names[0]}{more}"


def _phase(op: str) -> str:
    if "rematted_computation" in op:
        return "computed again for the backward pass"
    if "transpose(" in op:
        return "backward pass"
    if "jvp(" in op:
        return "forward pass"
    return "update"


def _key(dims: Iterable[int]) -> tuple[int, ...]:
    return tuple(sorted(dim for dim in dims if dim > 1))


def _dims_of_params(layout: StateLayout) -> Mapping[tuple[int, ...], list[str]]:
    """Dims, in whatever order, -> parameters that have them whole, sharded, or in one layer."""
    found: dict[tuple[int, ...], list[str]] = {}
    for name, leaf in zip(layout.names, layout.abstract, strict=True):
        if name not in layout.params or len(leaf.shape) < 2:
            continue
        shapes = [("", leaf.shape), ("a shard of ", leaf.sharding.shard_shape(leaf.shape))]
        if len(leaf.shape) > 2:  # Stacked over layers.
            shapes.append(("a layer of ", leaf.shape[1:]))
        for prefix, shape in shapes:
            key = _key(shape)
            label = f"{prefix}{name.removeprefix('model.')}"
            if key and label not in found.setdefault(key, []):
                found[key].append(label)
    return found
