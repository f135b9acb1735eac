"""Reading a step back: what is asked for is taken, and compared with what was saved."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import orbax.checkpoint as ocp

from launch.spec import ConfigError, RestoreSpec
from trainer import checkpoint_choice, device_digest, distributed, restore_plan, storage
from trainer.checkpoint_directory import META, STATE
from trainer.checkpoint_format import StateHandler, StateRestore, describe
from trainer.checksums import DamagedError
from trainer.ledger import human_bytes

Abstract = Mapping[str, jax.ShapeDtypeStruct]
# Given a step and its META, names wanted -> names saved; a wanted leaf without one is not restored.
Plan = Callable[[int, Mapping[str, Any]], Mapping[str, str]]

_NAMED = 8  # Damaged leaves that are told by name.


@dataclasses.dataclass(frozen=True)
class Restored:
    """A checkpoint read back.

    Attributes:
      step: completed updates.
      state: dotted name -> array, in the shardings asked for; what the plan left out is missing.
      meta: the step's META.
      checked: what verifying it has cost, in words.
    """

    step: int
    state: dict[str, jax.Array]
    meta: Mapping[str, Any]
    checked: str

    @property
    def data_position(self) -> Any:
        """The JSON value given to `save`."""
        return self.meta["data_position"]

    @property
    def config(self) -> Mapping[str, Any]:
        """The resolved config of the run that saved it."""
        return self.meta["config"]


def read_another(directory: str, step: int | None, abstract: Abstract, plan: Plan) -> Restored:
    """Read a step of another run's checkpoints, which stay as they are. Collective.

    Args:
      directory: of its checkpoints.
      step: the only one that will do; None for the newest that can be used.
      abstract: dotted name -> shape, dtype and sharding wanted.
      plan: which leaves to take.

    Raises:
      ConfigError: there is none, or its leaves are not those wanted.
    """
    began = time.perf_counter()
    place = storage.path(directory)
    found = place / str(checkpoint_choice.newest_usable_of_another(place, step))
    try:
        return read_step(found, abstract, plan, began)
    except DamagedError as error:
        raise ConfigError("config.init_from", str(error), str(found)) from None


def read_step(path: storage.Path, abstract: Abstract, plan: Plan | None, began: float) -> Restored:
    """Read a step whose files are intact. Collective.

    Args:
      path: its directory.
      abstract: dotted name -> shape, dtype and sharding wanted.
      plan: which leaves to take; None for all, under their own names.
      began: when the verification of its files did, by `time.perf_counter`.

    Raises:
      DamagedError: some arrays are not those that were to be saved.
      ConfigError: the step's leaves are not those wanted; the text lists them.
    """
    verified = time.perf_counter() - began
    meta = ocp.Checkpointer(ocp.JsonCheckpointHandler()).restore(
        path / META, args=ocp.args.JsonRestore()
    )
    step = int(meta["step"])
    if plan is None:
        wanted = {name: describe(leaf) for name, leaf in abstract.items()}
        names: Mapping[str, str] = restore_plan.make(
            meta["leaves"], wanted, RestoreSpec(), path
        ).names
    else:
        names = plan(step, meta)
    found = _read_state(path, {saved: abstract[name] for name, saved in names.items()})
    began = time.perf_counter()
    digests = device_digest.digests(found)
    saved_digests = meta.get("digests", {})  # Steps of older versions have none.
    wrong = [name for name, digest in digests.items() if saved_digests.get(name, digest) != digest]
    told = distributed.gather("checkpoint/leaves", wrong)
    wrong = list(dict.fromkeys(name for names in told for name in names))
    if wrong:
        more = f" and {len(wrong) - _NAMED} more" if len(wrong) > _NAMED else ""
        raise DamagedError(
            f"{', '.join(wrong[:_NAMED])}{more}: the numbers read are not those that were saved, "
            "though every file is as it was written"
        )
    size = sum(array.nbytes for array in found.values())
    checked = (
        f"checksums hold: of all files, read in {verified:.2f} s, and of {len(digests)} leaves "
        f"({human_bytes(size)}) on the devices, in {time.perf_counter() - began:.2f} s"
    )
    return Restored(step, {name: found[saved] for name, saved in names.items()}, meta, checked)


def _read_state(
    path: storage.Path, wanted: dict[str, jax.ShapeDtypeStruct]
) -> dict[str, jax.Array]:
    if not wanted:
        return {}
    handler = StateHandler(use_ocdbt=True, use_compression=False)
    return ocp.Checkpointer(handler).restore(
        path / STATE,
        args=StateRestore(
            wanted,
            restore_args=ocp.checkpoint_utils.construct_restore_args(wanted),
            partial_restore=True,
        ),
    )
