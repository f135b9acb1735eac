"""Before the first step: are all processes about to run the same training?

Another config, another version of a package or a stale file on one host makes a gang hang in a
collective, or train something that nobody asked for. So every process compares what it has with
what the lead has, by one exchange over the coordination service, and the processes that differ are
named with what differs.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import platform
import site
import sys
import sysconfig
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib import metadata
from typing import Any

import jax

from launch.spec import ConfigError, flatten
from trainer import agreement

# Packages of which another version may train otherwise, or not speak with this one.
PACKAGES = (
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "grain",
    "numpy",
    "libtpu",
    "jax-cuda12-plugin",
    "jax-cuda13-plugin",
)
# Of JAX's settings, those that change what is computed or how it is compiled.
JAX_SETTINGS = (
    "jax_enable_x64",
    "jax_default_matmul_precision",
    "jax_default_prng_impl",
    "jax_threefry_partitionable",
    "jax_numpy_dtype_promotion",
    "jax_debug_nans",
    "jax_disable_jit",
)
FLAGS = ("XLA_FLAGS", "LIBTPU_INIT_ARGS")
_OWN_FLAG = "--xla_dump"  # Where a process dumps to is its own affair.
_OWN_PACKAGES = ("trainer", "launch", "configs")
_MOST_TOLD = 5
_ABSENT = "(absent)"

Fingerprint = Mapping[str, str]  # What is compared -> its value, or a hash of it.


def check(config: Any) -> None:
    """Compare this process's config, code, packages and settings with all others'.

    Collective: every process must call this, directly after `distributed.initialize`.

    Args:
      config: the resolved config as plain JSON.

    Raises:
      ConfigError: on every process; names those that differ, and accuses them.
    """
    if jax.process_count() > 1:
        _compare("fingerprint", fingerprint(config))


def check_program(lowered: jax.stages.Lowered) -> None:
    """Compare the program that is about to be compiled. Collective: every process must call this.

    Raises:
      ConfigError: on every process; names those that differ, and accuses them.
    """
    if jax.process_count() > 1:
        text = lowered.as_text()  # Without the places in the source, which may differ.
        _compare("program", {"the compiled training step": _hash(text.encode())})


def fingerprint(config: Any) -> Fingerprint:
    """What must be alike on all processes."""
    return {
        **{f"config.{name}": repr(value) for name, value in flatten(config)},
        **{name: _version(name) for name in PACKAGES},
        "Python": platform.python_version(),
        **{name: str(getattr(jax.config, name, _ABSENT)) for name in JAX_SETTINGS},
        **{name: _flags(os.environ.get(name, "")) for name in FLAGS},
        **code(),
    }


def code() -> Fingerprint:
    """A hash of each file of Python that was imported and belongs to no installed package."""
    installed = {sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")}
    installed |= {*site.getsitepackages(), site.getusersitepackages()}
    found = {}
    for name, module in list(sys.modules.items()):
        spec = getattr(module, "__spec__", None)
        file = getattr(module, "__file__", None)
        if not file or not file.endswith(".py"):
            continue
        known_as = spec.name if name == "__main__" and spec else name
        own = known_as.partition(".")[0] in _OWN_PACKAGES
        if own or not file.startswith(tuple(f"{folder}{os.sep}" for folder in installed)):
            with open(file, "rb") as source:
                found[f"the code of {known_as}"] = _hash(source.read())
    return found


@dataclasses.dataclass(frozen=True)
class Difference:
    """A thing that is not alike everywhere.

    Attributes:
      name: of the thing.
      values: what some processes have -> those processes, in order.
      usual: what most have; the lead's, where none is had by most.
    """

    name: str
    values: Mapping[str, tuple[int, ...]]
    usual: str

    @property
    def odd(self) -> tuple[int, ...]:
        """The processes that have something else than most."""
        return tuple(sorted(i for value, who in self.values.items() for i in who))

    def __str__(self) -> str:
        hashed = not self.name.startswith("config.") and " " in self.name
        told = [
            f"{self.name} {'differs' if hashed else f'is {value}'} on {_processes(who)}"
            for value, who in sorted(self.values.items(), key=lambda item: item[1])
        ]
        return "; ".join(told) + ("" if hashed else f", {self.usual} on the others")


def differences(lead: Fingerprint, others: Sequence[Fingerprint]) -> list[Difference]:
    """What is not alike.

    Args:
      lead: the lead's fingerprint.
      others: of each process, the lead's included, what it has otherwise than the lead.
    """
    found = []
    for name in sorted({name for other in others for name in other}):
        values = [other.get(name, lead.get(name, _ABSENT)) for other in others]
        counts = Counter(values)
        most = max(counts.values())
        # On a tie the lead is right, if its value is one of those.
        usual = values[0] if counts[values[0]] == most else counts.most_common(1)[0][0]
        by_value: dict[str, tuple[int, ...]] = {}
        for process, value in enumerate(values):
            if value != usual:
                by_value[value] = (*by_value.get(value, ()), process)
        found.append(Difference(name, by_value, usual))
    return found


def _compare(what: str, own: Fingerprint) -> None:
    lead = agreement.broadcast(what, own)
    other = {
        name: own.get(name, _ABSENT)
        for name in {**lead, **own}
        if own.get(name, _ABSENT) != lead.get(name, _ABSENT)
    }
    found = differences(lead, agreement.gather(what, other))
    if not found:
        return
    odd = tuple(sorted({process for difference in found for process in difference.odd}))
    more = f"; and {len(found) - _MOST_TOLD} more" if len(found) > _MOST_TOLD else ""
    told = "; ".join(str(difference) for difference in found[:_MOST_TOLD])
    error = ConfigError(
        "",
        f"the processes are not about to run the same training: {told}{more}. Make them alike: "
        "one checkout, one environment and one command for all hosts",
    )
    agreement.fail_together(error, accuses=odd)


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return _ABSENT


def _flags(text: str) -> str:
    return " ".join(flag for flag in text.split() if not flag.startswith(_OWN_FLAG)) or _ABSENT


def _hash(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=8).hexdigest()


def _processes(ids: Sequence[int]) -> str:
    listed = ", ".join(map(str, ids[:8])) + (", ..." if len(ids) > 8 else "")
    return f"process{'es' * (len(ids) > 1)} {listed}"
