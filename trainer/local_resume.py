"""Which local checkpoint a run goes on from, decided by all processes together."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import Any

import jax

from trainer import distributed, local_arrays, local_transfer, storage
from trainer.agreement import settle
from trainer.checkpoint import Checkpointer
from trainer.checkpoints.places import files_of
from trainer.checksums import DamagedError
from trainer.local_catalogue import Catalogue, Piece, make_plan
from trainer.local_checkpoints import LocalCheckpoints
from trainer.local_directory import Entry
from trainer.local_restore import (
    Candidate,
    Damage,
    LocalRestored,
    fetch,
    lacking_in_words,
    newest,
    unfit,
)
from trainer.resume import OPTIMIZER_BEGAN, Beginning
from trainer.state import StateLayout

log = logging.getLogger(__name__)

# The slowest host may have that much more to read and to check than the others.
_READ_SECONDS = 1800.0


def begin_locally(
    local: LocalCheckpoints, saver: Checkpointer, layout: StateLayout
) -> Beginning | None:
    """Begin with a local checkpoint, if there is one newer than the newest shared one.

    Collective: every process must call this.

    Args:
      local: the run's local checkpoints.
      saver: the run's shared ones.
      layout: of the train state.

    Returns:
      None where the shared ones are to be asked.
    """
    found = restore(local, layout.as_dict(layout.abstract), newest_shared(saver.directory))
    if found is None:
        return None
    saver.keep(**found.kept)
    leaves = layout.from_dict(found.state)
    return Beginning(found.step, leaves, found.data_position, found.kept.get(OPTIMIZER_BEGAN, 0))


def restore(
    local: LocalCheckpoints,
    abstract: Mapping[str, jax.ShapeDtypeStruct],
    newer_than: int | None,
) -> LocalRestored | None:
    """Put the newest step together that can be. Collective: every process must call this.

    What cannot be used is said in one line each, by the lead.

    Args:
      local: the run's local checkpoints.
      abstract: dotted name -> shape, dtype and sharding wanted; any mesh, any number of
        processes.
      newer_than: the newest shared checkpoint; only later steps are looked at.

    Returns:
      The state, or None when there is no later step or none can be put together.
    """
    newer_than = distributed.broadcast("local/newer_than", newer_than)
    offered = _offered(local)
    damaged: set[Damage] = set()
    rejected: list[tuple[int, str]] = []
    while True:
        mine = [entry for entry in offered if Damage(*entry, "", 0) not in damaged]
        answer = settle(
            "local/offers",
            mine,
            lambda offers: newest(offers, local.directories, newer_than, rejected),
        )
        if answer is None:
            return None
        chosen = Candidate.from_json(answer)
        index = next((offered[e] for e in mine if (e.step, e.attempt) == chosen.key), None)
        found = _put_together(local, chosen, index, abstract, damaged)
        if isinstance(found, LocalRestored):
            local.kept = chosen.key
            return found
        if found - damaged:
            damaged |= found  # Perhaps others have what is damaged there.
        else:
            rejected.append(chosen.key)


def _offered(local: LocalCheckpoints) -> dict[Entry, Any]:
    """The indexes of everything that this process speaks for, but for damaged ones."""
    offered = {}
    for entry in local.files.entries() if local.speaks else []:
        try:
            offered[entry] = {**local.files.index(entry), "pieces": None}
        except DamagedError as error:
            log.warning("a local checkpoint on %s is damaged: %s", local.host, error)
    return offered


def _put_together(
    local: LocalCheckpoints,
    chosen: Candidate,
    index: Any,
    abstract: Mapping[str, jax.ShapeDtypeStruct],
    damaged: Iterable[Damage],
) -> LocalRestored | set[Damage]:
    """The state; or what of it was found damaged, which is nothing where it is of no use."""
    index, why = settle(
        "local/index",
        index if chosen.speaker == local.me else None,
        lambda indexes: _judged(indexes[chosen.speaker], abstract, local.record),
    )
    name = f"local checkpoint of step {chosen.step}"
    if why is None:
        saved = Catalogue.from_json(index["catalogue"])
        wanted = local_arrays.catalogue(abstract, local.directories)
        plan = make_plan(
            saved,
            wanted,
            chosen.available,
            local.me,
            {
                (known.process, Piece(known.leaf, known.box))
                for known in damaged
                if (known.step, known.attempt) == chosen.key
            },
        )
        if plan.lacking:
            why = lacking_in_words(index, saved, plan)
        elif plan.transfers and not local_transfer.possible():
            why = "not every host has all of it, and the processes' numbers of devices differ"
    if why is not None:
        distributed.say(f"{name} is not used: {why}")
        return set()
    fetched = fetch(local.files, chosen, saved, wanted, plan)
    report = [[list(broken), text] for broken, text in fetched.problems.items()]
    reports = settle(
        "local/read", [report, fetched.received_bytes], lambda values: values, _READ_SECONDS
    )
    problems = {Damage(*broken): text for found, _ in reports for broken, text in found}
    if problems:
        distributed.say(f"{name}: not all can be read: {'; '.join(sorted(problems.values()))}")
        return set(problems)
    state = local_arrays.on_devices(abstract, wanted, fetched.buffers)
    given = [count for _, count in reports if count]
    distributed.say(
        f"resumed from step {chosen.step}, from the hosts' own storage"
        + (f"; {len(given)} process(es) got {sum(given):,} bytes from peers" if given else "")
    )
    return LocalRestored(chosen.step, state, index["data_position"], index["kept"])


def newest_shared(directory: storage.Path) -> int | None:
    """The newest shared checkpoint that is there by its name. Collective."""
    steps = None
    if distributed.is_lead():
        files = files_of(directory)
        files.remove_unfinished(directory)
        steps = files.steps_in(directory)[:1]
    return next(iter(distributed.broadcast("local/shared", steps)), None)


def _judged(index: Any, abstract: Mapping[str, Any], record: Any) -> list[Any]:
    return [index, unfit(index, abstract, record)]
