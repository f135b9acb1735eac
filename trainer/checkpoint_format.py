"""What a checkpoint's step directory holds, and how Orbax is brought to write it.

    state/            every leaf by its dotted name, in Orbax's OCDBT format, not compressed
    meta/             JSON: data position; config, digests of code, versions; names, shapes, dtypes
                      and digests of the leaves; which of them are params
    checksums.json    the manifest of all files above
    checksums.commit.json  of what the commit writes beside it; see checkpoint_seal

The manifest is written before the commit (each process digests what it wrote, and the lead adds
the rest; on Google Cloud Storage the lead asks for the checksums that are known there), so a step
that is there at all has one, and one without it is damaged.
"""

from __future__ import annotations

import dataclasses
import pathlib
import time
from collections.abc import Callable
from typing import Any

import jax
import orbax.checkpoint as ocp

from trainer import checkpoint_gcs, checksums, storage
from trainer.checkpoint_directory import MANIFEST, META, STATE

_PROCESS_MANIFEST = "checksums.process_{}.json"


def describe(array: Any) -> dict[str, Any]:
    """Shape and dtype of an array or its abstract, as JSON."""
    return {"shape": list(array.shape), "dtype": str(array.dtype)}


class StateHandler(ocp.PyTreeCheckpointHandler):
    """Orbax's handler of array trees; each process also digests the files that it has written.

    The digests are part of what the commit waits for. A lead that read everything back by itself
    would do it for the whole gang's bytes, through the network.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.digest_seconds = 0.0  # Spent on digests of files since the start, beside the training.

    async def async_save(self, directory: Any, args: Any) -> Any:
        futures = await super().async_save(directory, args=args)
        if storage.is_remote(directory):
            return futures
        return [_Then(futures or [], lambda: self._digest(pathlib.Path(directory)))]

    def _digest(self, directory: pathlib.Path) -> None:
        began = time.perf_counter()
        process = jax.process_index()
        own = directory / f"ocdbt.process_{process}"
        names = checksums.files_below(own) if own.is_dir() else []
        digests = checksums.digest_files(directory, [f"{own.name}/{name}" for name in names])
        checksums.write_manifest(directory / _PROCESS_MANIFEST.format(process), digests)
        self.digest_seconds += time.perf_counter() - began


@ocp.args.register_with_handler(StateHandler, for_save=True)
@dataclasses.dataclass
class StateSave(ocp.args.PyTreeSave):
    """Arguments of `StateHandler.save`."""


@ocp.args.register_with_handler(StateHandler, for_restore=True)
@dataclasses.dataclass
class StateRestore(ocp.args.PyTreeRestore):
    """Arguments of `StateHandler.restore`."""


class _Then:
    """A commit future: wait for others, then call a function."""

    def __init__(self, futures: Any, function: Callable[[], None]):
        self._futures = futures
        self._function = function

    def result(self, timeout: float | None = None) -> None:
        deadline = None if timeout is None else time.monotonic() + timeout
        for future in self._futures:
            future.result(None if deadline is None else max(0.0, deadline - time.monotonic()))
        self._function()


def complete_manifest(temporary: storage.Path) -> None:
    """Join the processes' checksums and add the rest, just before the commit. Lead process only.

    Args:
      temporary: the step's directory under its temporary name; nobody writes its items any more.
    """
    if storage.is_remote(temporary):
        checkpoint_gcs.complete_manifest(temporary, (STATE, META), MANIFEST)
        return
    digests: checksums.Digests = {}
    for process in range(jax.process_count()):
        own = temporary / STATE / _PROCESS_MANIFEST.format(process)
        for name, digest in checksums.read_manifest(own).items():
            digests[f"{STATE}/{name}"] = digest
        own.unlink()
    # Orbax changes the two files beside these until the commit; no restore needs them.
    rest = [
        name
        for name in checksums.files_below(temporary)
        if name not in digests and name.startswith((f"{STATE}/", f"{META}/"))
    ]
    digests |= checksums.digest_files(temporary, rest)
    checksums.write_manifest(temporary / MANIFEST, digests)
