"""Plans that were made, by what they depend on.

One file a plan in `$XDG_CACHE_HOME/muster/plans` (`~/.cache/muster/plans`; MUSTER_CACHE_DIR names
another place than `.../muster`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from launch import contract, rundir
from launch.plan.code import digest
from launch.spec import Cluster, plain

CACHE_DIR = "MUSTER_CACHE_DIR"
_SCHEMA = 1  # Of an entry; raised when an older one must not be used.
_KEPT_SECONDS = 90 * 86400.0  # Since an entry was used last.
# They decide what is compiled, or how much memory is counted.
PACKAGES = ("jax", "jaxlib", "libtpu", "flax", "optax")
# How a step is run and looked at, not what it is.
_BESIDE_THE_STEP = ("log_every_steps", "compilation_cache", "init_from", "restore")
# Environment that changes what JAX and XLA make of a step. Where it runs is the cluster's to say.
_TELLING = ("JAX_", "XLA_", "LIBTPU_")
_NOT_TELLING = ("JAX_PLATFORMS", "JAX_NUM_CPU_DEVICES", "JAX_COMPILATION_CACHE_DIR")


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a training step needs on a cluster.

    Attributes:
      record: as `trainer.plan` gives it.
      text: the same for people.
      cached: whether it was there already.
    """

    record: Mapping[str, Any]
    text: str
    cached: bool

    @property
    def fits(self) -> bool:
        """Whether the step fits the memory of the cluster's devices, as far as that is known."""
        return self.record["fits"] is not False


def folder() -> Path:
    """Where plans are kept.

    Raises:
      RuntimeError: the user has no home.
    """
    own = os.environ.get(CACHE_DIR)
    if own:
        return Path(own).expanduser().absolute() / "plans"
    base = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(base):  # As the XDG standard has it, what is relative does not count.
        base = str(Path.home() / ".cache")
    return Path(base) / "muster" / "plans"


def key(config: Any, cluster: Cluster, env: Mapping[str, str] = os.environ) -> str:
    """What a plan is known by: a hash of all that it depends on.

    Args:
      config: the trainer's, resolved: a ConfigDict or a mapping.
      cluster: for which.
      env: this process's environment, which the cluster's goes over.
    """
    values = plain(config)
    ingredients = {
        "schema": _SCHEMA,
        "config": {name: value for name, value in values.items() if name not in _BESIDE_THE_STEP},
        "cluster": {
            name: getattr(cluster, name)
            for name in ("accelerator", "slices", "hosts", "processes_per_host")
        },
        "backend": cluster.backend,
        "devices_per_process": cluster.devices_per_process,
        "on_cpu": cluster.on_cpu,
        "env": telling_env({**env, **cluster.env}),
        "code": digest(str(values["task"])),
        "versions": {name: _version(name) for name in PACKAGES},
    }
    text = json.dumps(ingredients, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def telling_env(env: Mapping[str, str]) -> dict[str, str]:
    """Those variables that change what JAX and XLA make of a step."""
    return {
        name: value
        for name, value in env.items()
        if name.startswith(_TELLING) and name not in _NOT_TELLING
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def find(key: str) -> Plan | None:
    """The plan of this key; None if there is none, or none that can be read."""
    try:
        path = folder() / f"{key}.json"
        entry = rundir.read_record(path) or {}
    except RuntimeError:
        return None
    record, text = entry.get("plan"), entry.get("text")
    if entry.get("key") != key or not isinstance(record, dict) or not isinstance(text, str):
        return None
    if "fits" not in record:
        return None
    with contextlib.suppress(OSError):
        os.utime(path)
    return Plan(record, text, cached=True)


def keep(key: str, record: Mapping[str, Any], text: str) -> None:
    """Keep a plan; one that cannot be kept is made anew the next time."""
    entry = {"key": key, "plan": dict(record), "text": text}
    with contextlib.suppress(OSError, RuntimeError):
        place = folder()
        place.mkdir(mode=0o700, parents=True, exist_ok=True)
        # A config may say more than others on this machine should know.
        contract.write_atomically(place / f"{key}.json", json.dumps(entry), mode=0o600)
        for path in place.iterdir():
            if time.time() - path.stat().st_mtime > _KEPT_SECONDS:
                path.unlink()
