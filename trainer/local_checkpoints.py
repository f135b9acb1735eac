"""Checkpoints on the hosts' own storage, for when the shared one is too slow for the time left.

Every process writes what its own devices hold, so nothing goes over a network and a save takes
about as long as a copy in memory. At the next start the processes tell each other what their
hosts have; the newest step of which every part is somewhere is put together again, and what a
replaced host lacks comes from peers that hold a replica of it. docs/deadlines.md says what that
covers and what not.

Orbax's emergency managers (0.12.8) do the same for slices that are whole replicas of each other.
They save nothing locally with one slice, find a step where every process of one slice has a
directory of its number, agree by collectives that have no time limit, and the peer-to-peer one
serves the files to whoever can reach its port. Their reader gives zeros for what is not there, and
no checksum holds. So neither manager nor files are Orbax's here.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import secrets
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax

from launch import contract
from launch.spec import CheckpointSpec, ConfigError
from trainer import distributed, local_arrays, storage
from trainer.agreement import fail_together, settle
from trainer.checkpoint_format import describe
from trainer.local_catalogue import Catalogue
from trainer.local_directory import Entry, LocalDirectory

log = logging.getLogger(__name__)

State = Mapping[str, jax.Array]


class LocalCheckpoints:
    """Saves and restores a run's local checkpoints. Collective: every process must make one.

    Attributes:
      host: this one's name.
      directories: for each process the number of its local directory.
      me: this process.
      speaks: whether it is the one that speaks for its directory.
      kept: step and attempt that a restart would use; None for none.
      before_save: called on the lead before a save, so that no metrics of the step are lost.
      last_save_seconds: of the newest save, the agreement included; None before it.

    Args:
      spec: has a `local_dir`.
      workdir: the run directory, where the run's random number is kept.
      record: what a checkpoint is compared by: `config`, `code`, `versions`. A local one where
        any of it has changed is not used, unless that is harmless.

    Raises:
      ConfigError: the local directory cannot be used on some process.
    """

    def __init__(self, spec: CheckpointSpec, workdir: str, record: Mapping[str, Any]):
        self._every_steps = spec.local_every_steps
        self.record = record
        self.host = os.environ.get(contract.HOST) or os.uname().nodename
        run, self._attempt = distributed.broadcast(
            "local/run",
            (_run_number(workdir), secrets.token_hex(8)) if distributed.is_lead() else None,
        )
        where = spec.local_dir.replace("{host}", self.host)
        self._directory: LocalDirectory | None = None
        problem = None
        try:
            self._directory = LocalDirectory(where, run)
            self._directory.remove_unfinished()
        except OSError as error:
            problem = f"{where} on {self.host}: {error.strerror or error}"
        identity = None if self._directory is None else self._directory.identity
        answers = distributed.gather("local/directory", (problem, identity, self.host))
        seen = [process for process, answer in enumerate(answers) if answer[0]]
        if seen:
            rule = (
                f"cannot be used: {answers[seen[0]][0]} (process {seen[0]}); name a directory on "
                "every host's own storage, or leave it empty"
            )
            refused = ConfigError("config.checkpoint.local_dir", rule, spec.local_dir)
            fail_together(refused, accuses=seen)
        known: dict[str, int] = {}
        for _, found, _ in answers:
            known.setdefault(found, len(known))
        self.directories = [known[found] for _, found, _ in answers]
        self._hosts = [host for _, _, host in answers]
        self.me = jax.process_index()
        # One process speaks for each directory.
        self.speaks = self.directories.index(self.directories[self.me]) == self.me
        self._record: dict[str, Any] = {}
        self._layout: dict[str, Any] = {}
        self._catalogue: Catalogue | None = None  # of that layout
        self.kept: tuple[int, str] | None = None
        self.last_save_seconds: float | None = None
        self.before_save: Callable[[], None] | None = None
        if self.speaks:
            for path in self.files.remove_left_over():
                log.warning("deleted %s on %s: a dead run had left it", path, self.host)

    @property
    def files(self) -> LocalDirectory:
        assert self._directory is not None
        return self._directory

    def keep(self, **record: Any) -> None:
        """Keep more in every step from now on, JSON; the same on every process."""
        self._record |= record

    # ---- Saving ----

    def due(self, step: int) -> bool:
        """Is this a step to save? Not collective, and the same on every process."""
        return self._every_steps > 0 and step % self._every_steps == 0

    def save(
        self, step: int, state: State, data_position: Any, *, timeout_seconds: float = 300.0
    ) -> bool:
        """Write a step to the hosts' own storage, and wait until it is there.

        Collective: every process must call this, with the same step. The state is not donated
        and may be used right after.

        Args:
          step: completed updates.
          state: dotted name -> array, typed PRNG keys included; every process's part of it.
          data_position: JSON, the same on every process.
          timeout_seconds: how long to wait for the others.

        Returns:
          Whether all processes have written their part. What went wrong is said, and is not
          fatal: older steps, local and shared, are untouched.

        Raises:
          TimeoutError: some processes did not say in time whether they have; the text names them.
            Those that did write have their part on the disk.
        """
        if self.kept == (step, self._attempt):
            return True
        began = time.monotonic()
        if self.before_save is not None and distributed.is_lead():
            self.before_save()
        problem = None
        try:
            # Never more than two: what a restart would use, and the one being written.
            self.files.remove(
                entry
                for entry in self.files.entries()
                if self._is_mine(entry) and (entry.step, entry.attempt) != self.kept
            )
            self._write(step, state, data_position)
        except OSError as error:
            problem = f"process {self.me} on {self.host}: {error.strerror or error}"
        problem = settle(
            "local/saved",
            problem,
            lambda problems: next(filter(None, problems), None),
            timeout_seconds,
        )
        self.last_save_seconds = time.monotonic() - began
        if problem is None:
            self.kept = (step, self._attempt)
            return True
        self.files.remove([Entry(step, self.me, self._attempt)])
        if distributed.is_lead():
            log.warning("step %d is not saved on the hosts' own storage: %s", step, problem)
        return False

    def _write(self, step: int, state: State, data_position: Any) -> None:
        # The loop forbids transfers that nobody asked for by name; these are.
        with jax.transfer_guard("allow"):
            plain = local_arrays.plain(state)
            layout = {name: (leaf.shape, leaf.dtype, leaf.sharding) for name, leaf in plain.items()}
            if layout != self._layout:  # At the first save.
                self._layout = layout
                self._catalogue = local_arrays.catalogue(plain, self.directories)
            assert self._catalogue is not None
            pieces = self._catalogue.written_by(self.me)
            arrays = local_arrays.on_host(plain, self._catalogue, pieces)
        self.files.write(
            Entry(step, self.me, self._attempt),
            arrays,
            {
                "catalogue": self._catalogue.as_json(),
                "described": {name: describe(array) for name, array in state.items()},
                "data_position": data_position,
                "record": self.record,
                "kept": self._record,
                "hosts": self._hosts,
            },
        )

    def _is_mine(self, entry: Entry) -> bool:
        """Is it this process's to delete? Those of other gangs are of whoever speaks."""
        return entry.process == self.me if entry.attempt == self._attempt else self.speaks

    def committed(self, step: int | None) -> None:
        """Delete what nobody needs now that a shared checkpoint of `step` is there. Not collective.

        Steps of earlier attempts go too: they are older than what this one began with, or belong
        to a course of the run that it has left.
        """
        if step is None:
            return
        self.files.remove(
            entry
            for entry in self.files.entries()
            if self._is_mine(entry) and (entry.step <= step or entry.attempt != self._attempt)
        )

    def distrust(self) -> None:
        """Delete what this attempt has saved: copies of its state were found to differ.

        Not collective.
        """
        self.kept = None
        self.files.remove(
            entry
            for entry in self.files.entries()
            if self._is_mine(entry) and entry.attempt == self._attempt
        )

    def close(self, committed: int | None) -> None:
        """Delete what nobody needs, and the directory with it if nothing is left. Not collective.

        Args:
          committed: the newest step that is in a shared checkpoint.
        """
        self.committed(committed)
        self.files.close()


def _run_number(workdir: str) -> str:
    """The run's random number, made at its first start; another if it is a copy. Lead only.

    A path would not do: a run that was deleted and begun anew has the same.
    """
    path = os.path.join(workdir, contract.LOCAL_RECORD)
    with contextlib.suppress(FileNotFoundError, ValueError, KeyError, TypeError):
        record = json.loads(storage.read_text(path))
        if record["workdir"] == workdir and re.fullmatch("[0-9a-f]{32}", record["run"]):
            return record["run"]
    run = secrets.token_hex(16)
    record = {"schema": contract.SCHEMA, "run": run, "workdir": workdir}
    storage.write_text(path, json.dumps(record) + "\n")
    return run
