"""Compile a step for a target and keep what the compiler says of it, also where it refuses."""

from __future__ import annotations

import re
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax

from trainer.plan.buffers import Dump, read_dump

_GIB = 1 << 30
_UNITS = {"K": 1 << 10, "M": 1 << 20, "G": _GIB, "T": 1 << 40, "": 1}
_REFUSED = re.compile(r"total memory required.*?\(([\d.]+)([KMGT]?)\) exceeds available HBM "
                      r"\(([\d.]+)([KMGT]?)\)")  # fmt: skip


class Memory(NamedTuple):
    """Bytes on each device, as the compiler lays them out.

    Attributes:
      argument, output, alias, temp, code: as `memory_analysis` calls them; an output that is
        aliased takes the place of an argument.
    """

    argument: int
    output: int
    alias: int
    temp: int
    code: int

    @property
    def peak(self) -> int:
        """All that must be there at once."""
        return self.argument + self.output - self.alias + self.temp + self.code


class Compiled(NamedTuple):
    """What came of a compilation.

    Attributes:
      fits: whether the compiler let it pass.
      memory: of the program.
      usable_bytes: what the compiler had to give, where it said so (when it refuses).
      seconds: of compiling.
      text: the compiled module.
      dump: what lies in memory; None where the compiler wrote nothing.
    """

    fits: bool
    memory: Memory
    usable_bytes: int | None
    seconds: float
    text: str
    dump: Dump | None

    @property
    def peak(self) -> int:
        """All that must be there at once.

        XLA's statistics can count more temporaries than it allocates: 11.3 GiB of them with 5 GiB
        of arguments in a program that it accepts for 15.75 GiB (libtpu 0.0.42.1). The buffer
        assignment is what it goes by.
        """
        if self.dump is None or not self.fits:  # A refusal says how much it takes.
            return self.memory.peak
        temp = min(self.memory.temp, self.dump.bytes_of("temp"))
        return self.memory._replace(temp=temp).peak


def compile_for_plan(compile_with: Callable[[dict[str, Any]], Any], function: str) -> Compiled:
    """Compile and read what there is to read.

    Args:
      compile_with: compiles with these compiler options.
      function: name of the jitted function. It must not come from JAX's compile cache, which
        keeps no dump.

    Raises:
      Exception: whatever the compiler raises but for want of memory.
    """
    with tempfile.TemporaryDirectory(prefix="muster-plan-") as folder:
        began = time.monotonic()
        try:
            made = compile_with({"xla_dump_to": folder, "xla_dump_hlo_as_text": True})
        except jax.errors.JaxRuntimeError as error:
            refusal = _REFUSED.search(str(error))
            dump = read_dump(Path(folder), function)
            if refusal is None or dump is None:
                raise
            seconds = time.monotonic() - began
            required = _bytes(refusal[1], refusal[2])
            usable = _bytes(refusal[3], refusal[4])
            return Compiled(False, _from_dump(dump, required), usable, seconds, dump.text, dump)
        seconds = time.monotonic() - began
        stats = made.memory_analysis()
        memory = Memory(
            stats.argument_size_in_bytes,
            stats.output_size_in_bytes,
            stats.alias_size_in_bytes,
            stats.temp_size_in_bytes,
            stats.generated_code_size_in_bytes,
        )
        return Compiled(
            True, memory, None, seconds, made.as_text(), read_dump(Path(folder), function)
        )


def _bytes(number: str, unit: str) -> int:
    return int(float(number) * _UNITS[unit])


def _from_dump(dump: Dump, required: int) -> Memory:
    """The memory of a refused program; what its parts do not account for is temporary."""
    argument = dump.bytes_of("argument")
    output = dump.bytes_of("output")
    temp = dump.bytes_of("temp")
    # Aliased outputs lie in their arguments' allocations already.
    return Memory(argument, output, 0, max(temp, required - argument - output), 0)
