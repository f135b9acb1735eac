"""How long arrays live that loops carry: the compiler's ranges leave their time in a loop out."""

from __future__ import annotations

import re

from trainer.plan.buffers import Dump
from trainer.plan.hlo import Instruction, Module

_SAME = ("bitcast", "copy-done", "optimization-barrier")


def with_loops(dump: Dump, module: Module) -> Dump:
    """The dump with ranges that go on to the last use, through loops and what comes behind them.

    Args:
      dump: of a compilation.
      module: the same program.
    """
    users: dict[str, list[tuple[Instruction, int]]] = {}
    for computation in module.computations.values():
        for instruction in computation.instructions.values():
            for place, operand in enumerate(instruction.operands):
                users.setdefault(operand, []).append((instruction, place))
    seen: dict[tuple[str, str], int] = {}

    def last_use(name: str, index: str) -> int:
        """The moment of the last use of an element of what an instruction makes."""
        key = (name, index)
        if key in seen:
            return seen[key]
        seen[key] = 0  # Nothing uses itself.
        found = 0
        for user, place in users.get(name, ()):
            if user.opcode == "get-tuple-element":
                chosen = re.search(r"index=(\d+)", user.attributes)
                if chosen and index in ("", chosen[1]):
                    found = max(found, last_use(user.name, ""))
            elif user.opcode == "tuple":
                found = max(found, last_use(user.name, str(place)))
            elif user.opcode == "while":
                found = max(found, dump.order.get(user.name, 0), last_use(user.name, index))
            elif user.opcode in _SAME:
                found = max(found, last_use(user.name, index))
            else:
                found = max(found, dump.order.get(user.name, 0))
        seen[key] = found
        return found

    ranges = {
        (name, index): (start, max(end, last_use(name, index)))
        for (name, index), (start, end) in dump.ranges.items()
    }
    return dump._replace(ranges=ranges)
