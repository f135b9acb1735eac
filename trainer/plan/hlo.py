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
_NAME = re.compile(r"%([\w.\-]+)")
_CALLS = re.compile(r"\bcalls=%?([\w.\-]+)")
_TO_APPLY = re.compile(r"\bto_apply=%?([\w.\-]+)")
_BRANCHES = re.compile(
    r"\b(?:branch_computations=\{([^}]*)\}|(?:true|false)_computation=%?([\w.\-]+))"
)
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')


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

    def executions(self) -> tuple[dict[str, float], int]:
        """How often each computation runs in one run of the module.

        A loop's body counts once for every trip. Of a conditional every branch counts.

        Returns:
          Counts by computation, and how many loops there are whose trips could not be told (they
          are counted as one).
        """
        counts: dict[str, float] = {}
        unknown = 0
        waiting = [(self.entry, 1.0)]
        while waiting:
            name, times = waiting.pop()
            counts[name] = counts.get(name, 0.0) + times
            computation = self.computations[name]
            for instruction in computation.instructions.values():
                repeated = 1.0
                if instruction.opcode == "while":
                    trips = self._trips(computation, instruction)
                    unknown += trips is None
                    repeated = float(1 if trips is None else trips)
                for target in called(instruction):
                    if target in self.computations:
                        waiting.append((target, times * repeated))
        return counts, unknown

    def _trips(self, computation: Computation, loop: Instruction) -> int | None:
        """How often a loop's body runs: from the compiler's note, or from its condition.

        A condition that is understood compares a counter, which goes up by one from a constant,
        with a constant.
        """
        if found := _TRIPS.search(loop.attributes):
            return int(found[1])
        condition = self.computations[_attribute(loop, "condition")]
        test = _through_fusion(self, condition, condition.instructions[condition.root])
        if test is None:
            return None
        compare, scope, arguments = test
        direction = re.search(r"direction=(\w+)", compare.attributes)
        if compare.opcode != "compare" or direction is None or direction[1] not in ("LT", "LE"):
            return None
        counter, limit = (arguments.get(name, name) for name in compare.operands)
        bound = _constant(self, [scope, condition], limit)
        index = _tuple_index(condition, counter)
        if bound is None or index is None:
            return None
        start = self._start(computation, loop, index)
        return max(0, bound - start + (direction[1] == "LE"))

    def _start(self, computation: Computation, loop: Instruction, index: int) -> int:
        """The counter's first value; 0 where it cannot be told."""
        init = computation.instructions.get(loop.operands[0])
        if init is None or init.opcode != "tuple" or index >= len(init.operands):
            return 0
        return _constant(self, [computation], init.operands[index]) or 0


def parse(text: str) -> Module:
    """Read a module's text, as `compiled.as_text()` or XLA's dump has it."""
    text = _COMMENT.sub("", text)
    head = text[: text.index("\n")]
    partitions = re.search(r"\bnum_partitions=(\d+)", head)
    computations: dict[str, Computation] = {}
    entry = ""
    current: dict[str, Instruction] | None = None
    name = root = ""
    for line in text.splitlines():
        if current is None:
            found = _COMPUTATION.match(line)
            if found and " = " not in line.split("(", 1)[0]:
                current, name, root = {}, found[2], ""
                entry = name if found[1] else entry
        elif line.startswith("}"):
            computations[name] = Computation(name, current, root or next(reversed(current), ""))
            current = None
        elif found := _HEAD.match(line):
            instruction = _instruction(found[2], line[found.end() :])
            current[instruction.name] = instruction
            root = instruction.name if found[1] else root
    return Module(computations, entry, int(partitions[1]) if partitions else 1, _frames(text))


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


def called(instruction: Instruction) -> Iterator[str]:
    """The computations that an instruction runs; not those applied to single elements."""
    text = instruction.attributes
    opcode = instruction.opcode
    if opcode == "while":
        yield _attribute(instruction, "body")
    elif opcode in ("fusion", "async-start"):
        yield from _CALLS.findall(text)
    elif opcode == "call":
        yield from _TO_APPLY.findall(text)
    elif opcode == "conditional":
        for many, one in _BRANCHES.findall(text):
            yield from [name.strip().lstrip("%") for name in many.split(",")] if many else [one]


def _attribute(instruction: Instruction, key: str) -> str:
    found = re.search(rf"\b{key}=%?([\w.\-]+)", instruction.attributes)
    return found[1] if found else ""


def _through_fusion(
    module: Module, scope: Computation, instruction: Instruction
) -> tuple[Instruction, Computation, dict[str, str]] | None:
    """An instruction, or the root of the fusion that it is; where it stands; its parameters."""
    if instruction.opcode != "fusion":
        return instruction, scope, {}
    inside = module.computations.get(next(called(instruction), ""))
    if inside is None:
        return None
    arguments = {
        inner.name: instruction.operands[int(inner.inside)]
        for inner in inside.instructions.values()
        if inner.opcode == "parameter"
    }
    return inside.instructions[inside.root], inside, arguments


def _constant(module: Module, scopes: list[Computation], name: str) -> int | None:
    """The integer that an instruction always is, seen through copies."""
    for scope in scopes:
        found = scope.instructions.get(name)
        while found is not None and found.opcode in ("copy", "bitcast", "convert", "reshape"):
            found = scope.instructions.get(found.operands[0])
        if found is not None and found.opcode == "constant":
            return int(found.inside) if re.fullmatch(r"-?\d+", found.inside) else None
    return None


def _tuple_index(scope: Computation, name: str) -> int | None:
    """Which element of a loop's state an instruction is."""
    found = scope.instructions.get(name)
    while found is not None and found.opcode in ("copy", "bitcast"):
        found = scope.instructions.get(found.operands[0])
    if found is None or found.opcode != "get-tuple-element":
        return None
    index = re.search(r"index=(\d+)", found.attributes)
    return int(index[1]) if index else None


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
