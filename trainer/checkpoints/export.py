"""Params of a step as one file in the safetensors format, which other programs read."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from launch import contract
from launch.spec import ConfigError
from trainer import storage
from trainer.checkpoints import verify
from trainer.checkpoints.leaves import read_leaf, read_meta
from trainer.checkpoints.steps import Step
from trainer.leaf_digest import leaf_digest
from trainer.storage import Path

_MODEL = "model."


def export(directory: Path, step: Step, file: str, *, ema: bool = False) -> dict[str, Any]:
    """Write the params of a step to a file, under their dotted paths and in their dtypes.

    The file is there whole or not at all. It takes the params' size in memory.

    Args:
      directory: of the checkpoints.
      step: a good one.
      file: path of the file; it must not be there.
      ema: the averages that the optimizer keeps (`optimizer.ema_decay`), in the params' dtypes.

    Returns:
      A report, as JSON.

    Raises:
      ConfigError: the step is damaged, has no averages, or the file cannot be written.
    """
    try:
        from safetensors import numpy as safetensors
    except ImportError:
        rule = "export needs the package safetensors; pip install 'muster[export]'"
        raise ConfigError("", rule) from None
    target = os.path.abspath(os.path.expanduser(file))
    if os.path.exists(target):
        raise ConfigError("", f"{target} is there already; give another file")
    if not os.path.isdir(os.path.dirname(target)):
        raise ConfigError("", f"no directory {os.path.dirname(target)}")
    place = directory / step.name
    found = verify.find(place)
    if not found.usable:
        raise ConfigError("", f"step {step.name} is damaged and not exported: {found.problem}")
    meta = read_meta(place)
    tensors = {}
    for name, source in sorted(names_of(meta, ema).items()):
        array = read_leaf(place, source)
        if meta.get("digests", {}).get(source, leaf_digest(array)) != leaf_digest(array):
            raise ConfigError("", f"{source} of step {step.name} is not what was saved")
        dtype = meta["leaves"][_MODEL + name]["dtype"]
        tensors[name] = _as_tensor(array, dtype)
    temporary = f"{target}.{os.getpid()}.tmp"
    try:
        safetensors.save_file(tensors, temporary, metadata_of(directory, meta, ema))
        fd = os.open(temporary, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
        os.replace(temporary, target)
    except BaseException as error:
        if os.path.exists(temporary):
            os.unlink(temporary)
        if isinstance(error, Exception):
            raise ConfigError("", f"{target} cannot be written: {error}") from None
        raise
    return {
        "step": step.step,
        "file": target,
        "tensors": len(tensors),
        "bytes": os.path.getsize(target),
    }


def names_of(meta: Mapping[str, Any], ema: bool) -> dict[str, str]:
    """Dotted path of a param -> name of the leaf that holds it, or its average. Pure.

    Raises:
      ConfigError: the optimizer keeps no averages.
    """
    leaves = meta["leaves"]
    # Steps of older versions do not say which leaves of the model are trained.
    params = meta.get("params") or [
        name
        for name, leaf in leaves.items()
        if name.startswith(_MODEL) and not leaf["dtype"].startswith("key<")
    ]
    paths = [name.removeprefix(_MODEL) for name in params if name in leaves]
    if not ema:
        return {path: _MODEL + path for path in paths}
    averages = {
        path: name
        for path in paths
        for name in leaves
        if name.startswith("optimizer.") and name.endswith(f".average.{path}")
    }
    if len(averages) < len(paths):
        rule = "this run's optimizer keeps no averages of params (config.optimizer.ema_decay)"
        raise ConfigError("--ema", rule)
    return averages


def metadata_of(directory: Path, meta: Mapping[str, Any], ema: bool) -> dict[str, str]:
    """What the file says of where it is from."""
    try:
        record = json.loads(storage.read_text(directory.parent / contract.RUN_RECORD))
    except (OSError, ValueError):
        record = {}
    config = {key: value for key, value in meta["config"].items() if key != "schema"}
    text = json.dumps(config, sort_keys=True)
    return {
        "format": "pt",  # What readers ask for: names and arrays, of no framework's own kind.
        "run": str(record.get("id") or os.fspath(directory.parent)),
        "step": str(meta["step"]),
        "params": "ema" if ema else "params",
        "config_sha256": hashlib.sha256(text.encode()).hexdigest(),
    }


def _as_tensor(array: np.ndarray, dtype: str) -> np.ndarray:
    """An array in the param's dtype, contiguous; safetensors knows bfloat16 by its name."""
    if str(array.dtype) != dtype:
        import ml_dtypes  # noqa: F401 (numpy then knows bfloat16 by name)

        array = array.astype(np.dtype(dtype))
    return np.ascontiguousarray(array).reshape(array.shape)
