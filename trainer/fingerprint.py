"""What a process starts with, as a flat dict of short texts that can be compared between processes:
its config, its packages, its environment and its code.

A field is `SECTION/NAME`. Its text is what a person is shown, or a hash where that says enough.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.metadata
import json
import os
import platform
import sys
import sysconfig
from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax

from launch.spec import flatten

Fingerprint = dict[str, str]

# Sections, in the order in which differences are told: what explains most comes first.
CONFIG, PACKAGE, ENVIRONMENT, JAX_OPTION, CODE, PROGRAM = SECTIONS = (
    "config",
    "package",
    "environment",
    "jax option",
    "code",
    "program",
)
# Of these only hashes are known, and only where both sides have the field: a module that just the
# lead loads, say to draw a picture, is no difference.
HASHED = (CODE, PROGRAM)

PACKAGES = (
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "grain",
    "numpy",
    "ml_dtypes",
    "muster",
    "libtpu",
    *(f"jax-cuda{n}-{part}" for n in (12, 13) for part in ("plugin", "pjrt")),
    *(f"nvidia-{library}-cu{n}" for n in (12, 13) for library in ("cudnn", "nccl")),
    "nvidia-cublas-cu12",
    "nvidia-cublas",
)

# Read by compilers and libraries behind JAX, not by JAX.
VARIABLES = (
    "XLA_FLAGS",
    "LIBTPU_INIT_ARGS",
    "NVIDIA_TF32_OVERRIDE",
    "CUBLAS_WORKSPACE_CONFIG",
    "NCCL_ALGO",
    "NCCL_PROTO",
)
_FREE_FLAGS = ("--xla_dump_",)  # Each process may have its own place to write to.

# What JAX has made of its variables (JAX_ENABLE_X64, ...) and of the program's own wishes.
JAX_OPTIONS = (
    "jax_enable_x64",
    "jax_default_matmul_precision",
    "jax_numpy_dtype_promotion",
    "jax_default_prng_impl",
    "jax_enable_custom_prng",
    "jax_threefry_partitionable",
    "jax_threefry_gpu_kernel_lowering",
    "jax_random_seed_offset",
    "jax_softmax_custom_jvp",
    "jax_debug_nans",
    "jax_debug_infs",
    "jax_disable_jit",
    "jax_disable_most_optimizations",
    "jax_optimization_level",
    "jax_exec_time_optimization_effort",
    "jax_memory_fitting_effort",
    "jax_memory_fitting_level",
    "jax_compiler_enable_remat_pass",
    "jax_use_shardy_partitioner",
    "jax_cpu_collectives_implementation",
)

THE_CONFIG_FILE = "the config file"
_CONFIG_MODULE = "config_config"  # As `launch.spec.load_config` calls the file behind `--config`.
_LONGEST = 100  # Characters of a value that are shown.


def of_start(config: Mapping[str, Any], task: object) -> Fingerprint:
    """What this process starts with.

    Args:
      config: the resolved config as plain JSON.
      task: the user's task; its package counts as the user's own code wherever it is installed.
    """
    packages = {"launch", "trainer", type(task).__module__.partition(".")[0]}
    sections = {
        CONFIG: {f"config.{name}": json.dumps(value) for name, value in flatten(config)},
        PACKAGE: versions(),
        ENVIRONMENT: variables(os.environ),
        JAX_OPTION: {
            name: str(jax.config.values[name]) for name in JAX_OPTIONS if name in jax.config.values
        },
        CODE: code(sys.modules, packages),
    }
    return {
        f"{section}/{name}": _shown(text)
        for section, fields in sections.items()
        for name, text in fields.items()
    }


def of_program(lowered: jax.stages.Lowered, name: str) -> Fingerprint:
    """A program that is about to be compiled: StableHLO without the places it was traced at."""
    digest = _Digest()
    lowered.compiler_ir("stablehlo").operation.print(
        file=digest, binary=True, enable_debug_info=False
    )
    return {f"{PROGRAM}/{name}": digest.text()}


def versions() -> dict[str, str]:
    """Python's version and those of the packages that matter, as far as they are installed."""
    found = {"Python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def variables(env: Mapping[str, str]) -> dict[str, str]:
    """The environment variables that change what is computed or compiled."""
    found = {}
    for name in VARIABLES:
        words = [word for word in env.get(name, "").split() if not word.startswith(_FREE_FLAGS)]
        if words:
            found[name] = json.dumps(" ".join(words))
    return found


def code(
    modules: Mapping[str, Any],
    packages: Collection[str],
    digest: Callable[[bytes], str] | None = None,
) -> dict[str, str]:
    """A hash of every loaded source file that is not Python's own or an installed package's.

    Args:
      modules: by name, as in `sys.modules`.
      packages: top-level packages that count wherever they are installed.
      digest: of a file's bytes; by default their hash.

    Returns:
      Hashes by the file's path below the directory that it was imported from.
    """
    hashes = {}
    kinds = ("stdlib", "platstdlib")
    pythons = tuple(os.path.realpath(sysconfig.get_path(kind)) + os.sep for kind in kinds)
    for key, module in list(modules.items()):
        file, spec = (_fields_of(module).get(field) for field in ("__file__", "__spec__"))
        if not isinstance(file, str) or not file.endswith(".py"):
            continue
        name = spec.name if key == "__main__" and spec is not None else key
        if name.partition(".")[0] in packages or not (
            # Most files are done with at the first look; resolving links takes ten times as long.
            _installed(file, pythons) or _installed(os.path.realpath(file), pythons)
        ):
            try:
                with open(file, "rb") as source:
                    hashes[_path_of(name, file)] = (digest or _hash)(source.read())
            except OSError:
                continue  # Imported from elsewhere than a file system.
    return hashes


def of_task(task: object) -> dict[str, str]:
    """Digests of the source files that a task's numbers come from, by path: the user's own, and
    of Muster's what its built-in tasks are made of.

    Two digests a file, of its bytes and of its syntax without docstrings: a comment is no change,
    and neither is another Python's other idea of the syntax. Call it when all is imported.
    """
    modules = {
        name: module
        for name, module in list(sys.modules.items())
        if name.partition(".")[0] not in ("launch", "trainer")
        or name.startswith(("trainer.tasks", "trainer.models", "trainer.data"))
    }
    own = os.path.realpath(os.path.dirname(os.path.dirname(__file__)))
    skipped = tuple(os.path.join(own, name) + os.sep for name in ("launch", "configs"))
    modules = {
        name: module
        for name, module in modules.items()
        if not os.path.realpath(str(_fields_of(module).get("__file__"))).startswith(skipped)
        and name not in ("__main__", "__mp_main__", _CONFIG_MODULE)
    }
    return code(modules, {type(task).__module__.partition(".")[0]} - {"launch"}, _of_source)


def _of_source(data: bytes) -> str:
    """Digests of a file's bytes and of its syntax."""
    try:
        tree = ast.parse(data)
    except (SyntaxError, ValueError, RecursionError):
        return _hash(data)
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list) and body and isinstance(body[0], ast.Expr):
            text = body[0].value
            if isinstance(text, ast.Constant) and isinstance(text.value, str):
                del body[0]
    return f"{_hash(data)}/{_hash(ast.dump(tree).encode())}"


def _fields_of(module: Any) -> Mapping[str, Any]:
    """A module's namespace, past a lazy module's `__getattr__`, which would load it."""
    try:
        return object.__getattribute__(module, "__dict__")
    except AttributeError:
        return {}


def _installed(path: str, pythons: tuple[str, ...]) -> bool:
    """Whether a source file belongs to an installed package, or to Python, which lives there."""
    return "/site-packages/" in path or "/dist-packages/" in path or path.startswith(pythons)


def _path_of(name: str, file: str) -> str:
    """`trainer/step.py` for the module `trainer.step`: hosts may keep their checkouts anywhere."""
    if name == _CONFIG_MODULE:
        return THE_CONFIG_FILE
    if name in ("__main__", "__mp_main__"):  # A script, which has no name to be imported by.
        return os.path.basename(file)
    is_package = os.path.basename(file) == "__init__.py"
    return name.replace(".", "/") + ("/__init__.py" if is_package else ".py")


def _shown(text: str) -> str:
    """A text short enough to be sent and shown, and as different from others as it was."""
    if len(text) <= _LONGEST:
        return text
    return f"{text[:_LONGEST]}... (hash {_hash(text.encode())})"


def _hash(data: bytes) -> str:
    digest = _Digest()
    digest.write(data)
    return digest.text()


class _Digest:
    """A file to write to, of which only a hash is kept: a program's text may be of many MB."""

    def __init__(self) -> None:
        self._digest = hashlib.blake2b(digest_size=8)

    def write(self, data: bytes) -> None:
        self._digest.update(data)

    def text(self) -> str:
        return self._digest.hexdigest()
