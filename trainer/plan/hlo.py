"""XLA's text of a compiled module, read: instructions, what calls what, and how often.

The text is the only complete form of a compiled program that JAX hands out for every platform. Of
it only what the plan needs is read: shapes, opcodes, operands and the attributes as text.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Iterator
from typing import NamedTuple

# Bytes of an element; below one byte where XLA packs them.
_WIDTHS = {
    "pred": 1.0, "s4": 0.5, "u4": 0.5, "s8": 1.0, "u8": 1.0, "s16": 2.0, "u16": 2.0, "s32": 4.0,
    "u32": 4.0, "s64": 8.0, "u64": 8.0, "bf16": 2.0, "f16": 2.0, "f32": 4.0, "f64": 8.0,
    "c64": 8.0, "c128": 16.0,
}  # fmt: skip
_SHAPE = re.compile(r"\b([a-z]+[0-9]*[a-z0-9]*)\[([0-9,]*)\]")
_COMMENT = re.compile(r"/\*.*?\*/")
_HEAD = re.compile(r"\s*(ROOT )?%?([\w.\-]+) = ")
_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_END = re.compile(r"\}(, execution_thread=.*)?$")
_NAME = re.compile(r"%([\w.\-]+)")


class Shape(NamedTuple):
    """An array's dtype, as XLA names it, and dims."""

    dtype: str
    dims: tuple[int, ...]

    @property
    def size(self) -> int:
        """Elements."""
        return math.prod(self.dims)

    @property
    def bytes(self) -> float:
        """Bytes of the elements, without the padding of a layout."""
        width = _WIDTHS.get(self.dtype, 1.0 if self.dtype.startswith("f8") else 0.0)
        return self.size * width


class Instruction(NamedTuple):
    """One line of a computation.

    Attributes:
      name: unique within the module.
      shapes: of what it makes; several for a tuple.
      opcode: e.g. `all-gather-start`.
      operands: names of instructions.
      inside: the text between the parentheses, for constants and parameters.
      attributes: the text behind them.
    """

    name: str
    shapes: tuple[Shape, ...]
    opcode: str
    operands: tuple[str, ...]
    inside: str
    attributes: str


class Computation(NamedTuple):
    """Instructions in their order, by name, and the name of the last one's result."""

    name: str
    instructions: dict[str, Instruction]
    root: str


class Module(NamedTuple):
    """A compiled module.

    Attributes:
      computations: by name.
      entry: the name of the one that runs.
      num_partitions: programs that run it together: devices, or those of a slice where the
        compiler left the traffic between slices to its runtime.
      frames: number of a stack frame -> name of the function that it is in.
    """

    computations: dict[str, Computation]
    entry: str
    num_partitions: int
    frames: dict[str, str]


def parse(text: str) -> Module:
    """Read a module's text, as `compiled.as_text()` or XLA's dump has it."""
    text = _COMMENT.sub("", text)
    head = text[: text.index("\n")]
    partitions = re.search(r"\bnum_partitions=(\d+)", head)
    computations: dict[str, Computation] = {}
    entry = ""
    current: dict[str, Instruction] | None = None
    name = root = ""
    for line in _whole_lines(text):
        if current is None:
            found = _COMPUTATION.match(line)
            if found and " = " not in line.split("(", 1)[0]:
                current, name, root = {}, found[2], ""
                entry = name if found[1] else entry
        elif _END.match(line):
            computations[name] = Computation(name, current, root or next(reversed(current), ""))
            current = None
        elif found := _HEAD.match(line):
            instruction = _instruction(found[2], line[found.end() :])
            current[instruction.name] = instruction
            root = instruction.name if found[1] else root
        elif current:  # More of a kernel's attributes.
            last = next(reversed(current))
            current[last] = current[last]._replace(attributes=current[last].attributes + line)
    return Module(computations, entry, int(partitions[1]) if partitions else 1, _frames(text))


def _whole_lines(text: str) -> Iterator[str]:
    """Lines, each with what goes on in the next: Pallas kernels have notes of several lines."""
    pending = ""
    for line in text.splitlines():
        new = line.startswith((" ", "%", "ENTRY")) or not line or _END.match(line)
        if pending and (new or not pending.startswith(" ")):
            yield pending
            pending = ""
        pending += line
    yield pending


def _instruction(name: str, rest: str) -> Instruction:
    """Of `TYPE OPCODE(OPERANDS), ATTRIBUTES`."""
    end = _matching(rest, 0) if rest.startswith("(") else rest.index(" ")
    kind, rest = rest[:end], rest[end:].lstrip()
    opening = rest.index("(")
    closing = _matching(rest, opening)
    inside = rest[opening + 1 : closing - 1]
    shapes = tuple(
        Shape(dtype, tuple(int(dim) for dim in dims.split(",") if dim))
        for dtype, dims in _SHAPE.findall(_without_layouts(kind))
    )
    operands = tuple(_NAME.findall(inside))
    return Instruction(name, shapes, rest[:opening], operands, inside, rest[closing:])


def _without_layouts(kind: str) -> str:
    return re.sub(r"\{[^{}]*\}", "", kind)


def _matching(text: str, start: int) -> int:
    """The place behind the parenthesis that closes the one at `start`."""
    depth = 0
    for place in range(start, len(text)):
        if text[place] == "(":
            depth += 1
        elif text[place] == ")":
            depth -= 1
            if depth == 0:
                return place + 1
    return len(text)


def _frames(text: str) -> dict[str, str]:
    """Stack frame -> function, from the tables that stand before the computations."""

    def table(title: str) -> list[str]:
        found = re.search(rf"^{title}\n((?:\d+ .*\n)*)", text, re.MULTILINE)
        return found[1].splitlines() if found else []

    functions = {line.split(" ", 1)[0]: line.split(" ", 1)[1].strip('"')
                 for line in table("FunctionNames")}  # fmt: skip
    locations = {
        line.split(" ", 1)[0]: functions.get(found[1], "")
        for line in table("FileLocations")
        if (found := re.search(r"function_name_id=(\d+)", line))
    }
    return {
        line.split(" ", 1)[0]: locations.get(found[1], "")
        for line in table("StackFrames")
        if (found := re.search(r"file_location_id=(\d+)", line))
    }


@functools.lru_cache(maxsize=4096)
def metadata(attributes: str) -> tuple[str, str]:
    """(op_name, number of the stack frame) of an instruction's attributes; "" for what is not."""
    op = re.search(r'op_name="([^"]*)"', attributes)
    frame = re.search(r"stack_frame_id=(\d+)", attributes)
    return (op[1] if op else "", frame[1] if frame else "")
