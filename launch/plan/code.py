"""The code that a plan depends on, as one digest. Nothing of it is imported."""

from __future__ import annotations

import ast
import hashlib
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[2]
# Of Muster itself: all that the trainer is, and what it takes from the launcher.
_OURS = ("trainer", "launch/spec", "launch/topology.py", "launch/errors.py", "launch/contract.py")
_INSTALLED = ("site-packages", "dist-packages")


def digest(task: str) -> str:
    """A digest of the code that makes a training step.

    That is all Python files of `trainer`, `launch.spec` and what these import; and the module of
    the task with all that it imports in turn, at any depth, as far as it is the user's own: what is
    installed is known by its version, which is part of a plan's key as well.

    Args:
      task: `package.module:Class`.
    """
    done = hashlib.sha256()
    for path in sorted({*_files_of_ours(), *_reached(task.partition(":")[0])}):
        try:
            data = path.read_bytes()
        except OSError:
            continue
        # The same code in another place is the same code.
        name = path.relative_to(_ROOT) if path.is_relative_to(_ROOT) else path.name
        done.update(f"{name}\0{len(data)}\0".encode())
        done.update(data)
    return done.hexdigest()


def _files_of_ours() -> Iterator[Path]:
    for name in _OURS:
        path = _ROOT / name
        yield from path.rglob("*.py") if path.is_dir() else (path,)


def _reached(module: str) -> set[Path]:
    """The user's own files that are imported when `module` is."""
    folders = [Path(folder or os.getcwd()) for folder in _search_path()]
    seen: set[str] = set()
    found: set[Path] = set()
    waiting = [module]
    while waiting:
        name = waiting.pop()
        if name in seen:
            continue
        seen.add(name)
        for path in _files_of(name, folders):
            if path in found or path.is_relative_to(_ROOT / "trainer"):
                continue
            found.add(path)
            waiting += _imports(path, name)
    return found


def _search_path() -> list[str]:
    """Where the user's modules can be; the interpreter's own library cannot change unseen."""
    library = os.path.dirname(os.__file__)
    return [
        folder
        for folder in dict.fromkeys(["", *sys.path])
        if not folder.startswith(library) and Path(folder).name not in _INSTALLED
    ]


def _files_of(name: str, folders: Sequence[Path]) -> list[Path]:
    """A module's file and those of the packages that it is in; none if it is not the user's."""
    parts = name.split(".")
    for folder in folders:
        inits = [folder.joinpath(*parts[:n], "__init__.py") for n in range(1, len(parts))]
        for file in (
            folder.joinpath(*parts[:-1], f"{parts[-1]}.py"),
            folder.joinpath(*parts, "__init__.py"),
        ):
            if file.is_file():
                return [path.resolve() for path in (*inits, file) if path.is_file()]
    return []


def _imports(path: Path, name: str) -> Iterable[str]:
    """Names of modules that a file imports, wherever it does; some may be names in a module."""
    try:
        tree = ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError):
        return
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*above, *([node.module] if node.module else [])])
            if module:
                yield module
            yield from (f"{module}.{alias.name}".strip(".") for alias in node.names)
