"""`muster gc`: bring what was asked for together with what really exists, run by run."""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

from launch import contract, registry
from launch.backends.slurm import client, jobs
from launch.backends.tpu import ledger as ledgers
from launch.backends.tpu.gc import collect
from launch.backends.tpu.holdings import all_labelled
from launch.backends.tpu.ledger import Ledger


def gc(flags: Mapping[str, str]) -> int:
    """Look after every run of this user, and say what was done; returns the exit code.

    Args:
      flags: `dry_run` only says what would be done.

    Returns:
      EXIT_FAILED if something that should go is still there, or cannot be looked at.
    """
    dry_run = "dry_run" in flags
    wrong = [_settle_jobs(entry.path) for entry in registry.entries() if entry.is_there]
    labelled = functools.cache(all_labelled)
    wrong += [collect(ledger, dry_run, labelled) for ledger in _ledgers()]
    if not any(ledger.open for ledger in _ledgers()):
        print("nothing is held")
    return contract.EXIT_FAILED if any(wrong) else contract.EXIT_DONE


def _ledgers() -> Iterator[Ledger]:
    """Of every run that ever asked for machines, as far as it is known here."""
    seen = set()
    for ledger in ledgers.all_ledgers():
        seen.add(ledger.run_id)
        yield ledger
    for entry in registry.entries():
        found = ledgers.read(entry.path) if entry.is_there else None
        if found is not None and found.run_id not in seen:
            yield found


def _settle_jobs(run: Path) -> bool:
    """Write down the end of a run's SLURM job, if it has ended; whether that is not known."""
    if jobs.open_job(run) is None:
        return False
    try:
        found = jobs.settle(run)
    except client.UnavailableError as error:
        print(f"{run}: SLURM gives no answer: {error}", file=sys.stderr)
        return True
    if found is None:
        print(f"{run}: its SLURM job has ended")
    return False
