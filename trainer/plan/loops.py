"""What calls what in a compiled module, and how often: loops' trips are read off their conditions.

On TPU the compiler does not note how often a loop runs.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator

from trainer.plan.hlo import Computation, Instruction, Module

_CALLS = re.compile(r"\bcalls=%?([\w.\-]+)")
_CALLED = re.compile(r"\bcalled_computations=\{([^}]*)\}")
_TO_APPLY = re.compile(r"\bto_apply=%?([\w.\-]+)")
_BRANCHES = re.compile(
    r"\b(?:branch_computations=\{([^}]*)\}|(?:true|false)_computation=%?([\w.\-]+))"
)
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')


def executions(module: Module) -> tuple[dict[str, float], int]:
    """How often each computation runs in one run of the module.

    A loop's body counts once for every trip. Of a conditional every branch counts.

    Returns:
      Counts by computation, and how many loops there are whose trips could not be told (they
      are counted as one).
    """
    counts: dict[str, float] = {}
    unknown = 0
    waiting = [(module.entry, 1.0)]
    while waiting:
        name, times = waiting.pop()
        counts[name] = counts.get(name, 0.0) + times
        computation = module.computations[name]
        for instruction in computation.instructions.values():
            repeated = 1.0
            if instruction.opcode == "while":
                trips = _trips(module, computation, instruction)
                unknown += trips is None
                repeated = float(1 if trips is None else trips)
            for target in called(instruction):
                if target in module.computations:
                    waiting.append((target, times * repeated))
    return counts, unknown


def _trips(module: Module, computation: Computation, loop: Instruction) -> int | None:
    """How often a loop's body runs: from the compiler's note, or from its condition.

    A condition that is understood compares a counter, which goes up by a constant from a
    constant (by two where the compiler has unrolled the loop), with a constant.
    """
    if found := _TRIPS.search(loop.attributes):
        return int(found[1])
    condition = module.computations[_attribute(loop, "condition")]
    test = _through_fusion(module, condition, condition.instructions[condition.root])
    if test is None:
        return None
    compare, scope, arguments = test
    direction = re.search(r"direction=(\w+)", compare.attributes)
    if compare.opcode != "compare" or direction is None or direction[1] not in ("LT", "LE"):
        return None
    counter, limit = (arguments.get(name, name) for name in compare.operands)
    bound = _constant([scope, condition], limit)
    index = _tuple_index(condition, counter)
    if bound is None or index is None:
        return None
    step = _step(module, loop, index)
    if step is None or step < 1:
        return None
    start = _start(computation, loop, index)
    return max(0, math.ceil((bound - start + (direction[1] == "LE")) / step))


def _step(module: Module, loop: Instruction, index: int) -> int | None:
    """By how much a trip moves the counter on; None where it cannot be told."""
    body = module.computations[_attribute(loop, "body")]
    root = body.instructions[body.root]
    if root.opcode != "tuple" or index >= len(root.operands):
        return None

    def moved(scope: Computation, name: str, outer: dict[str, str]) -> int | None:
        """How far a value is from the counter at the trip's beginning."""
        if name in outer:
            return moved(body, outer[name], {})
        found = scope.instructions.get(name)
        if found is None:
            return None
        if found.opcode in ("copy", "bitcast"):
            return moved(scope, found.operands[0], outer)
        if found.opcode == "get-tuple-element" and scope is body:
            return 0 if _tuple_index(body, name) == index else None
        if found.opcode == "fusion" and scope is body:
            through = _through_fusion(module, body, found)
            return None if through is None else moved(through[1], through[0].name, through[2])
        if found.opcode != "add":
            return None
        for one, other in (found.operands, found.operands[::-1]):
            by = _constant([scope, body], outer.get(other, other))
            rest = moved(scope, one, outer)
            if by is not None and rest is not None:
                return rest + by
        return None

    return moved(body, root.operands[index], {})


def _start(computation: Computation, loop: Instruction, index: int) -> int:
    """The counter's first value; 0 where it cannot be told."""
    init = computation.instructions.get(loop.operands[0])
    if init is None or init.opcode != "tuple" or index >= len(init.operands):
        return 0
    return _constant([computation], init.operands[index]) or 0


def called(instruction: Instruction) -> Iterator[str]:
    """The computations that an instruction runs; not those applied to single elements."""
    text = instruction.attributes
    opcode = instruction.opcode
    if opcode == "while":
        yield _attribute(instruction, "body")
    elif opcode in ("fusion", "async-start"):
        yield from _CALLS.findall(text)
    elif opcode == "custom-call-start":  # What runs beside the rest on a SparseCore.
        for many in _CALLED.findall(text):
            yield from [name.strip().lstrip("%") for name in many.split(",")]
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


def _constant(scopes: list[Computation], name: str) -> int | None:
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
