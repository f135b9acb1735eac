"""How far the states of two runs are apart: `python -m trainer.certify.drift REQUEST ANSWER`.

The measure is relative to the way: of all params together, the norm of what one run differs by, in
parts of the norm of what the reference has changed them by since the two parted. It has no unit,
does not depend on the size of the model, and is of the order of 1 for another training.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from launch import contract
from trainer.checkpoint_format import META, STATE, StateHandler, StateRestore

_GROUP_BYTES = 1 << 28  # Of leaves that are read at a time.

Leaves = Mapping[str, np.ndarray]


def measure(
    parted: Path, reference: Path, runs: Mapping[str, Path], kinds: Mapping[str, str]
) -> dict[str, Any]:
    """Measure each run's state against the reference's.

    Args:
      parted: the checkpoint that all went on from.
      reference: the reference's last checkpoint.
      runs: the last checkpoints of the others, by name.
      kinds: of leaves, as `trainer.certify.recorder.kinds_of` gives them.

    Returns:
      By run: `exact`, whether all is the same bit for bit; `params`, `state`: the drift of the
      params and of all other floating-point leaves, in parts of the way; `worst`: the leaf with
      the largest part of its own way; `unequal`: leaves of whole numbers or keys that differ.
    """
    shapes = _read_meta(reference)["leaves"]
    sums = {name: _Sums() for name in runs}
    for names in _groups(shapes):
        start, end = _read(parted, names, shapes), _read(reference, names, shapes)
        for run, path in runs.items():
            sums[run].add(names, kinds, start, end, _read(path, names, shapes))
    return {name: found.result() for name, found in sums.items()}


class _Sums:
    """Of one run, over groups of leaves."""

    def __init__(self) -> None:
        self._exact = True
        self._unequal: list[str] = []
        self._squares = {"params": [0.0, 0.0], "state": [0.0, 0.0]}  # Of drift and way.
        self._worst = (0.0, "")

    def add(
        self,
        names: Sequence[str],
        kinds: Mapping[str, str],
        start: Leaves,
        end: Leaves,
        found: Leaves,
    ) -> None:
        for name in names:
            same = end[name].tobytes() == found[name].tobytes()
            self._exact &= same
            if not jnp.issubdtype(end[name].dtype, jnp.floating):
                if not same:
                    self._unequal.append(name)
                continue
            wanted: np.ndarray = end[name].astype(np.float64)
            drift, way = _square(found[name] - wanted), _square(wanted - start[name])
            sums = self._squares["params" if kinds.get(name) == "params" else "state"]
            sums[0] += drift
            sums[1] += way
            own = math.sqrt(drift / way) if way else (math.inf if drift else 0.0)
            self._worst = max(self._worst, (own, name))

    def result(self) -> dict[str, Any]:
        parts = {
            name: math.sqrt(drift / way) if way else (math.inf if drift else 0.0)
            for name, (drift, way) in self._squares.items()
        }
        return {
            "exact": self._exact,
            **{name: _finite(part) for name, part in parts.items()},
            "worst": {"leaf": self._worst[1], "drift": _finite(self._worst[0])},
            "unequal": self._unequal,
        }


def _square(array: np.ndarray) -> float:
    return float(np.sum(np.square(array)))


def _finite(value: float) -> float | None:
    """A number that JSON has; None for one that is not finite."""
    return value if math.isfinite(value) else None


def _groups(shapes: Mapping[str, Mapping[str, Any]]) -> Iterator[list[str]]:
    """Names of leaves that are read together."""
    group: list[str] = []
    size = 0
    for name, leaf in shapes.items():
        group.append(name)
        size += math.prod(leaf["shape"]) * 8
        if size > _GROUP_BYTES:
            yield group
            group, size = [], 0
    if group:
        yield group


def _read_meta(path: Path) -> dict[str, Any]:
    reader = ocp.Checkpointer(ocp.JsonCheckpointHandler())
    return reader.restore(path / META, args=ocp.args.JsonRestore())


def _read(path: Path, names: Sequence[str], shapes: Mapping[str, Any]) -> dict[str, np.ndarray]:
    where = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    wanted = {
        name: jax.ShapeDtypeStruct(
            tuple(shapes[name]["shape"]), _dtype(shapes[name]["dtype"]), sharding=where
        )
        for name in names
    }
    state = ocp.Checkpointer(StateHandler(use_ocdbt=True)).restore(
        path / STATE,
        args=StateRestore(
            wanted,
            restore_args=ocp.checkpoint_utils.construct_restore_args(wanted),
            partial_restore=True,
        ),
    )
    return {name: _plain(state[name]) for name in names}


def _dtype(name: str) -> Any:
    """A dtype by its name; that of a PRNG key by its own implementation."""
    if name.startswith("key<"):
        for implementation in ("threefry2x32", "rbg", "unsafe_rbg"):
            dtype = jax.random.key(0, impl=implementation).dtype
            if str(dtype) == name:
                return dtype
    return jnp.dtype(name)


def _plain(array: Any) -> np.ndarray:
    if jax.dtypes.issubdtype(array.dtype, jax.dtypes.prng_key):
        array = jax.random.key_data(array)
    return np.asarray(array)


def main(request: str, answer: str) -> None:
    """Answer a request file of `launch.certify.drift`."""
    asked = json.loads(Path(request).read_bytes())
    runs = {name: Path(path) for name, path in asked["runs"].items()}
    found = measure(Path(asked["parted"]), Path(asked["reference"]), runs, asked["kinds"])
    contract.write_atomically(answer, json.dumps(found), mode=0o600)


if __name__ == "__main__":
    main(*sys.argv[1:])
