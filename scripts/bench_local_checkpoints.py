#!/usr/bin/env python
"""What a checkpoint on a host's own storage takes, beside a shared one of the same state.

    PYTHONPATH=. python scripts/bench_local_checkpoints.py [--gigabytes=0.5] [--rounds=5]
        [--local=/dev/shm] [--shared=/tmp]

One process, a minute or two; needs twice the state in `--local` and in `--shared`, and gives it
back. A round is a save to each, waited for until it is durable, the order changing from round to
round, and as many bytes written raw (and fsync'd) to `--local`. The shared one is on a local disk
here, which is the fastest that it can be: to a file system over a network it is slower, and the
local one is not. Then a restore from each, every byte verified; and what Orbax's own writer and
reader for local checkpoints (those of its emergency managers) take for the same, without checksums.

Prints medians of seconds and, in brackets, the lowest and the highest round.
"""

from __future__ import annotations

import argparse
import logging
import os
import pathlib
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from launch.spec import CheckpointSpec
from trainer import local_resume
from trainer.checkpoint import Checkpointer
from trainer.local_checkpoints import LocalCheckpoints

LEAVES = 24
COLUMNS = 1024


def make_state(num_bytes: int) -> dict[str, jax.Array]:
    rows = num_bytes // (4 * LEAVES * COLUMNS)
    where = NamedSharding(Mesh(np.array(jax.devices()), ("fsdp",)), P("fsdp"))
    keys = jax.random.split(jax.random.key(0), LEAVES)
    make = jax.jit(lambda key: jax.random.normal(key, (rows, COLUMNS)), out_shardings=where)
    return {f"layer{i}.kernel": make(keys[i]) for i in range(LEAVES)}


def timed(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def raw_write(path: pathlib.Path, data: np.ndarray) -> None:
    with open(path, "wb", buffering=0) as file:
        left = memoryview(data).cast("B")
        while left:
            left = left[file.write(left[: 2**26]) :]
        os.fsync(file.fileno())
    path.unlink()


def show(name: str, values: list[float]) -> None:
    print(
        f"{name:44s} {statistics.median(values):7.3f} [{min(values):.3f} .. {max(values):.3f}]",
        flush=True,
    )


def orbax_local() -> ocp.PyTreeCheckpointHandler:
    """As `orbax.checkpoint.experimental.emergency` makes it."""
    from orbax.checkpoint._src.serialization import type_handler_registry, type_handlers

    registry = type_handler_registry.create_type_handler_registry(
        (
            jax.Array,
            type_handlers.ArrayHandler(
                primary_host=None, replica_id=None, use_replica_parallel=False
            ),
        )
    )
    return ocp.PyTreeCheckpointHandler(
        use_ocdbt=True,
        use_zarr3=True,
        multiprocessing_options=ocp.options.MultiprocessingOptions(primary_host=None),
        type_handler_registry=registry,
    )


def run(local_dir: pathlib.Path, shared_dir: pathlib.Path, num_bytes: int, rounds: int) -> None:
    state = jax.block_until_ready(make_state(num_bytes))
    abstract: Mapping[str, Any] = {
        name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)
        for name, leaf in state.items()
    }
    raw = np.ones(num_bytes, np.uint8)
    spec = CheckpointSpec(keep_last=1, local_dir=str(local_dir / "local"))
    shared = Checkpointer(shared_dir / "checkpoints", spec, config={})
    local = LocalCheckpoints(spec, str(shared_dir), {"config": {}})
    handler = orbax_local()
    orbax = ocp.Checkpointer(handler)
    seconds: dict[str, list[float]] = {name: [] for name in ("local", "shared", "raw", "orbax")}
    for number in range(rounds + 1):  # The first one warms up.
        theirs = local_dir / "orbax" / str(number)
        calls = {
            "local": lambda step=number: local.save(step, state, None),
            "shared": lambda step=number: shared.save(step, state, None, final=True),
            "raw": lambda: raw_write(local_dir / "raw", raw),
            "orbax": lambda path=theirs: orbax.save(path, args=ocp.args.PyTreeSave(state)),
        }
        for name in list(calls) if number % 2 else reversed(calls):
            took = timed(calls[name])
            if number:
                seconds[name].append(took)
        if number < rounds:
            shutil.rmtree(theirs)
    show("save to the host's own storage, s", seconds["local"])
    show("shared save on a local disk, durable, s", seconds["shared"])
    show("raw write there, s", seconds["raw"])
    show("Orbax's writer there, no checksums, s", seconds["orbax"])
    ratios = [a / b for a, b in zip(seconds["local"], seconds["shared"], strict=True)]
    show("local to shared, ratio of pairs", ratios)
    show(
        "local to raw, ratio of pairs",
        [a / b for a, b in zip(seconds["local"], seconds["raw"], strict=True)],
    )
    args = ocp.checkpoint_utils.construct_restore_args(dict(abstract))
    reads: dict[str, list[float]] = {"local": [], "shared": [], "orbax": []}
    for number in range(rounds):
        restores: dict[str, Callable[[], Any]] = {
            "local": lambda: local_resume.restore(local, abstract, None).state,
            "shared": lambda: shared.restore(abstract).state,
            "orbax": lambda path=theirs: orbax.restore(
                path, args=ocp.args.PyTreeRestore(dict(abstract), restore_args=args)
            ),
        }
        for name in list(restores) if number % 2 else reversed(restores):
            reads[name].append(timed(lambda call=restores[name]: jax.block_until_ready(call())))
    show("restore from the host's own storage, s", reads["local"])
    show("restore from the shared one, s", reads["shared"])
    show("Orbax's reader there, not verified, s", reads["orbax"])
    lacking(theirs, abstract, args, orbax)
    shared.close()
    local.close(None)


def lacking(path: pathlib.Path, abstract: Any, args: Any, orbax: ocp.Checkpointer) -> None:
    """What Orbax's reader gives for a leaf twice as long as what this host has written."""
    name = next(iter(abstract))
    leaf = abstract[name]
    longer = {
        **abstract,
        name: jax.ShapeDtypeStruct(
            (2 * leaf.shape[0], *leaf.shape[1:]), leaf.dtype, sharding=leaf.sharding
        ),
    }
    args = {
        **args,
        name: ocp.ArrayRestoreArgs(
            sharding=leaf.sharding, global_shape=longer[name].shape, strict=False
        ),
    }
    found = orbax.restore(path, args=ocp.args.PyTreeRestore(longer, restore_args=args))
    rest = np.asarray(found[name])[leaf.shape[0] :]
    print(f"Orbax's reader for what was never written: {'zeros' if not rest.any() else 'others'}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=0.5)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--local", default="/dev/shm")
    parser.add_argument("--shared", default=tempfile.gettempdir())
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    with (
        tempfile.TemporaryDirectory(dir=args.local) as local,
        tempfile.TemporaryDirectory(dir=args.shared) as shared,
    ):
        run(pathlib.Path(local), pathlib.Path(shared), int(args.gigabytes * 1e9), args.rounds)


if __name__ == "__main__":
    main()
