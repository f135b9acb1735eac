"""Where a run directory is: on a file system, or on Google Cloud Storage (`gs://BUCKET/PATH`).

Local paths are `pathlib.Path` and plain calls of the operating system, as if there were no other.
Paths on GCS are `etils.epath.Path`, which Orbax uses as well, over gcsfs; that is imported with the
first path on GCS. The bytes of arrays take another way, tensorstore's own client.

GCS is not a file system: an object is written whole or not at all, and the last writer wins; there
are no directories, only names that begin alike; nothing can be appended to or renamed as a tree.
"""

from __future__ import annotations

import functools
import logging
import os
import pathlib
import re
from typing import Any, NamedTuple

from launch import contract
from launch.spec import ConfigError

REMOTE = "gs://"
_BUCKET = re.compile(r"[a-z0-9][a-z0-9._-]{1,220}[a-z0-9]")
# Answers that no retry will change: what the user wrote cannot be.
_REFUSALS = {400, 401, 403, 404}

Path = Any  # pathlib.Path or epath.Path: they have no class in common that says so.


class Object(NamedTuple):
    """What GCS notes of an object: its size, and base64 of the CRC32C of the bytes that came."""

    bytes: int
    crc32c: str


def is_remote(path: str | os.PathLike[str]) -> bool:
    """Is it a path on GCS?"""
    return os.fspath(path).startswith(REMOTE)


def run_directory(workdir: str) -> str:
    """A run directory as every process understands it: absolute, or a whole gs:// path.

    Raises:
      ConfigError: it is a URL of another kind, no path in a bucket, or gcsfs is missing.
    """
    if not is_remote(workdir):
        if re.match(r"[a-z0-9+]+://", workdir):
            raise ConfigError("--workdir", "must be a directory or gs://BUCKET/PATH", workdir)
        return os.path.abspath(os.path.expanduser(workdir))
    bucket, _, name = workdir.removeprefix(REMOTE).partition("/")
    name = "/".join(part for part in name.split("/") if part)
    if not _BUCKET.fullmatch(bucket) or not name or {".", ".."} & set(name.split("/")):
        raise ConfigError("--workdir", "must be gs://BUCKET/PATH, with a valid bucket", workdir)
    if any(character in name for character in "*?[]#"):
        raise ConfigError("--workdir", "a path on GCS must not hold any of *?[]#", workdir)
    try:
        filesystem()
    except ImportError as error:
        raise ConfigError(
            "--workdir",
            f"Google Cloud Storage needs the package gcsfs, which cannot be imported ({error}); "
            "pip install 'muster[tpu]', or pip install gcsfs",
            workdir,
        ) from None
    return f"{REMOTE}{bucket}/{name}"


def path(name: str | os.PathLike[str]) -> Path:
    """A path to work with: pathlib's, or epath's for GCS."""
    if not is_remote(name):
        return pathlib.Path(name).absolute()
    from etils import epath

    filesystem()  # Its settings must be there before epath makes one.
    return epath.Path(os.fspath(name))


@functools.cache
def filesystem() -> Any:
    """gcsfs's filesystem; epath, and with it Orbax, get one with the same settings.

    Raises:
      ImportError: gcsfs is missing.
    """
    # Plain requests are all that is asked of gcsfs here. Otherwise it asks over gRPC, at every
    # operation until there is an answer, what kind of bucket it is: where gRPC does not get
    # through, each of them then takes a minute (gcsfs 2026.10.1). It reads this when imported.
    os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    import aiohttp
    import fsspec
    import gcsfs  # noqa: F401 (fsspec's own message would be about conda)

    # Listings must not be cached: other processes of the gang write too. Without the time limits,
    # a connection that died silently would never be given up.
    fsspec.config.conf["gcs"] = {
        **fsspec.config.conf.get("gcs", {}),
        "use_listings_cache": False,
        "requests_timeout": aiohttp.ClientTimeout(total=600, sock_connect=30, sock_read=60),
    }
    if "GCSFS_DEBUG" not in os.environ:
        # It logs every refusal with its traceback, and raises it as well: who catches it tells it.
        logging.getLogger("gcsfs").setLevel(logging.CRITICAL)
    return fsspec.filesystem("gcs")


def status(error: BaseException) -> int | None:
    """The HTTP status behind an error of gcsfs; None for an error of another kind."""
    if isinstance(error, FileNotFoundError):
        return 404
    if isinstance(error, OSError) and str(error).startswith("Forbidden"):
        return 403
    code = str(getattr(error, "code", ""))
    return int(code) if code.isdigit() else None


def reason(error: BaseException) -> str:
    """Why GCS refused, in a phrase of one line."""
    number = status(error)
    text = " ".join(str(error).split()) or type(error).__name__
    if number == 404:
        return "there is no such bucket"
    if number == 401:
        return (
            f"no valid credentials ({text[:200]}); give some, as by "
            "`gcloud auth application-default login` or a service account"
        )
    if number == 403:
        # gcsfs gives the request's URL on the first line, and Google's words below.
        return f"access is denied ({' '.join(str(error).splitlines()[1:])[:300]})"
    return text[:300]


def is_refusal(error: BaseException) -> bool:
    """Will GCS answer the same next time?"""
    return status(error) in _REFUSALS


def read_text(name: str | os.PathLike[str]) -> str:
    """A small file's text.

    Raises:
      FileNotFoundError: it is not there.
      ConfigError: GCS refuses access.
    """
    if not is_remote(name):
        with open(name, encoding="utf-8") as file:
            return file.read()
    return read_bytes(name).decode("utf-8")


def read_bytes(name: str | os.PathLike[str], start: int | None = None, end: int | None = None):
    """Bytes of an object on GCS, from `start` to before `end`.

    Raises:
      FileNotFoundError: it is not there.
      ConfigError: GCS refuses access.
    """
    try:
        return filesystem().cat_file(os.fspath(name), start, end)
    except FileNotFoundError:
        raise
    except Exception as error:
        if is_refusal(error):
            rule = f"cannot be read: {reason(error)}; see to access or choose another --workdir"
            raise ConfigError("--workdir", rule, os.fspath(name)) from None
        raise


def write_text(name: str | os.PathLike[str], text: str) -> None:
    """Write a small file so that a reader sees the old text or the new, never half of it."""
    if is_remote(name):
        filesystem().pipe_file(os.fspath(name), text.encode("utf-8"))
    else:
        contract.write_atomically(name, text)


def objects_below(directory: Path) -> dict[str, Object]:
    """All objects below a path on GCS by relative name: one request for every thousand of them."""
    top = os.fspath(directory).removeprefix(REMOTE) + "/"
    found = filesystem().find(os.fspath(directory), detail=True)
    return {
        name.removeprefix(top): Object(int(entry["size"]), entry["crc32c"])
        for name, entry in found.items()
        if not name.endswith("/")  # What the console's "create folder" leaves.
    }
