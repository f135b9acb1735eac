"""The user's code as one archive, named by its content, that goes to every host."""

from __future__ import annotations

import dataclasses
import fnmatch
import gzip
import hashlib
import os
import tarfile
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import IO

from launch import command
from launch.backends.host_plan import ROOT
from launch.spec import ConfigError

# Names that files with secrets have. An example of one is none.
_SECRETS = (
    *(".env", ".env.*", "*.pem", "*.key", "*.p12", "*.pfx", "*.keystore", "id_rsa*", "id_dsa*"),
    *("id_ecdsa*", "id_ed25519*", ".netrc", ".pypirc", ".git-credentials", ".htpasswd"),
    *("credentials.json", "credentials", "*service*account*.json", "*client_secret*.json"),
    *("application_default_credentials.json", "google_compute_engine"),
)
_NO_SECRETS = ("*.example", "*.sample", "*.template", "*.pub")
_OUTSIDE_GIT = (".git", "__pycache__", ".venv", "venv", "node_modules")
_MUSTER = ("launch", "trainer", "configs")
_MOST_NAMED = 5


@dataclasses.dataclass(frozen=True)
class Archive:
    """An archive of code.

    Attributes:
      digest: SHA-256 of its files' names, modes and content.
      path: where it is; a gzipped tar file.
      size: in bytes.
      files: how many are in it.
    """

    digest: str
    path: Path
    size: int
    files: int


@dataclasses.dataclass(frozen=True)
class Code:
    """What goes to the hosts.

    Attributes:
      archives: the user's tree first, if there is one; Muster's own packages, if they are not in
        it.
      root: the user's tree, here.
      cwd: the current directory, seen from it.
    """

    archives: tuple[Archive, ...]
    root: Path | None
    cwd: str


def pack(send: bool, max_file_bytes: int, run: Path, folder: Path) -> Code:
    """Pack the current directory's tree.

    Args:
      send: whether the user's tree goes along.
      max_file_bytes: a larger file is refused.
      run: the run directory, which does not go along.
      folder: where archives are put.

    Raises:
      ConfigError: a file looks like a secret, or is too large.
    """
    archives = []
    root = None
    if send:
        root, files = checked_tree(max_file_bytes, run)
        archives.append(_archive(root, files, folder))
    if root is None or not _is_below(ROOT / "launch", root):
        ours = (path for name in _MUSTER for path in (ROOT / name).rglob("*.py"))
        archives.append(_archive(ROOT, [str(path.relative_to(ROOT)) for path in ours], folder))
    cwd = "." if root is None else os.path.relpath(Path.cwd(), root)
    return Code(tuple(archives), root, cwd)


def checked_tree(max_file_bytes: int, run: Path) -> tuple[Path, list[str]]:
    """The current directory's tree, and those of its files that go along; see pack.

    Raises:
      ConfigError: a file looks like a secret, or is too large.
    """
    root = _root()
    files = [name for name in tree_files(root) if not _is_below(root / name, run)]
    check(root, files, max_file_bytes)
    return root, files


def _is_below(path: Path, folder: Path) -> bool:
    return path.resolve().is_relative_to(folder.resolve())


def _root() -> Path:
    """The top of the git tree that the current directory is in, or that directory itself."""
    done = command.run(["git", "rev-parse", "--show-toplevel"], timeout_seconds=10)
    return Path(done.out.strip()) if done.ok and done.out.strip() else Path.cwd()


def tree_files(root: Path) -> list[str]:
    """The files of a tree, relative to it: what git tracks and what it does not ignore."""
    git = ["git", "-C", str(root), "ls-files", "-z"]
    tracked = command.run([*git, "--recurse-submodules"], timeout_seconds=60)
    others = command.run([*git, "--others", "--exclude-standard"], timeout_seconds=60)
    if tracked.ok and others.ok:
        names = {name for done in (tracked, others) for name in done.out.split("\0") if name}
        return sorted(name for name in names if os.path.lexists(root / name))
    found = []
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if name not in _OUTSIDE_GIT]
        found += [os.path.relpath(os.path.join(folder, name), root) for name in files]
    return sorted(found)


def check(root: Path, files: Iterable[str], max_file_bytes: int) -> None:
    """Refuse what must not, or need not, leave this machine.

    Raises:
      ConfigError: names the files.
    """
    secrets = [name for name in files if is_secret_file(name)]
    if secrets:
        rule = f"would send what looks like secrets: {_named(secrets)}; put them into .gitignore"
        raise ConfigError("cluster.tpu.send_code", f"{rule}, or set it to False", True)
    large = []
    for name in files:
        size = (root / name).lstat().st_size
        if size > max_file_bytes:
            large.append(f"{name} ({size} bytes)")
    if large:
        rule = f"these files are larger: {_named(large)}; put them into .gitignore, or raise it"
        raise ConfigError("cluster.tpu.max_file_bytes", rule, max_file_bytes)


def is_secret_file(name: str) -> bool:
    """Whether a file's name is one of those that hold secrets."""
    base = os.path.basename(name).lower()
    if any(fnmatch.fnmatch(base, pattern) for pattern in _NO_SECRETS):
        return False
    return any(fnmatch.fnmatch(base, pattern) for pattern in _SECRETS)


def _named(names: Sequence[str]) -> str:
    more = f" and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else ""
    return ", ".join(names[:_MOST_NAMED]) + more


def _archive(root: Path, files: Sequence[str], folder: Path) -> Archive:
    """The same files give the same bytes, whenever and by whomever they are packed."""
    digest = hashlib.sha256()
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    with (
        tempfile.NamedTemporaryFile(dir=folder, suffix=".part", delete=False) as out,
        gzip.GzipFile(fileobj=out, mode="wb", compresslevel=6, mtime=0, filename="") as zipped,
        tarfile.open(fileobj=zipped, mode="w") as tar,
    ):
        for name in sorted(files):
            _add(tar, root / name, name, digest)
    path = folder / f"{digest.hexdigest()}.tar.gz"
    os.replace(out.name, path)
    return Archive(digest.hexdigest(), path, path.stat().st_size, len(files))


def _add(tar: tarfile.TarFile, path: Path, name: str, digest: hashlib._Hash) -> None:
    info = tarfile.TarInfo(name)
    stat = path.lstat()
    if path.is_symlink():
        info.type, info.linkname = tarfile.SYMTYPE, os.readlink(path)
    elif not path.is_file():
        return  # A socket, say.
    info.mode = 0o755 if stat.st_mode & 0o100 else 0o644
    digest.update(f"{name}\0{info.mode:o}\0{info.linkname}\0".encode())
    if info.issym():
        tar.addfile(info)
        return
    with path.open("rb") as file:
        data: IO[bytes] = file
        info.size = os.fstat(file.fileno()).st_size
        content = data.read(info.size)
        info.size = len(content)
        digest.update(f"{len(content)}\0".encode() + content)
        file.seek(0)
        tar.addfile(info, file)


def bundle() -> tuple[str, bytes]:
    """What a bare host needs to run an agent: its digest, and a tar file."""
    import io

    names = [
        *("launch/__init__.py", "launch/contract.py", "launch/logfile.py"),
        *sorted(f"launch/agent/{path.name}" for path in (ROOT / "launch/agent").glob("*.py")),
        *sorted(f"launch/hook/{path.name}" for path in (ROOT / "launch/hook").glob("*.py")),
    ]
    buffer = io.BytesIO()
    digest = hashlib.sha256()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name in names:
            _add(tar, ROOT / name, name, digest)
    return digest.hexdigest()[:16], buffer.getvalue()
