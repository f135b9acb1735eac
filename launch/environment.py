"""What a program would find on this machine: packages and devices. Standard library only."""

from __future__ import annotations

import json

from launch import command

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "ml-collections")
_IMPORT_SECONDS = 120.0
_LOOK = """
import importlib, importlib.metadata, json, sys
versions = {}
for name in %r:
    try:
        versions[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        versions[name] = None
jax = importlib.import_module("jax")
devices = [str(device) for device in jax.local_devices()]
print(json.dumps({"versions": versions, "devices": devices, "python": sys.version.split()[0]}))
"""


def look(python: str, env: dict[str, str]) -> dict[str, object]:
    """What a program would find: versions of packages and JAX's devices.

    Args:
      python: the interpreter.
      env: over this process's own.
    """
    done = command.run(
        [python, "-c", _LOOK % (PACKAGES,)], timeout_seconds=_IMPORT_SECONDS, env=env
    )
    if not done.ok:
        return {"error": done.last_word}
    return json.loads(done.out.strip().splitlines()[-1])
