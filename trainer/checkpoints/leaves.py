"""Arrays of a step, one by one, read by tensorstore as Orbax wrote them; no jax is needed."""

from __future__ import annotations

import json
import os
from typing import Any

import numpy as np

from trainer import storage
from trainer.checkpoint_directory import META, META_FILE, STATE
from trainer.leaf_digest import can_digest, leaf_digest
from trainer.storage import Path


def read_meta(step: Path) -> dict[str, Any]:
    """A step's META: `leaves`, `digests`, `params`, `config`, ...

    Raises:
      OSError, ValueError: it cannot be read.
    """
    return json.loads(storage.read_text(step / META / META_FILE))


def read_leaf(step: Path, name: str) -> np.ndarray:
    """One array, whole, with its dtype; keys of random numbers as their uint32 data.

    Raises:
      ValueError: it is not there, or its bytes cannot be decoded.
    """
    import tensorstore

    base = os.fspath(step / STATE) + "/"
    if not storage.is_remote(step):
        base = f"file://{base}"
    kvstore = {"driver": "ocdbt", "base": base, "path": f"{name}/"}
    spec = {"driver": "zarr", "kvstore": kvstore}
    return np.asarray(tensorstore.open(spec, open=True).result().read().result())


def damaged_leaves(step: Path) -> list[str] | None:
    """The leaves that are not what they were when they were saved, by their digests.

    Args:
      step: its directory, of which some files are damaged.

    Returns:
      Their names; None where the step's META, which has the digests, cannot be read.
    """
    try:
        digests = read_meta(step)["digests"]
    except (OSError, ValueError, KeyError):
        return None
    return [name for name in digests if not _holds(step, name, digests)]


def _holds(step: Path, name: str, digests: dict[str, str]) -> bool:
    try:
        array = read_leaf(step, name)
    except Exception:  # tensorstore's errors have nothing in common.
        return False
    return not can_digest(str(array.dtype)) or leaf_digest(array) == digests[name]
