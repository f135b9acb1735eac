"""One run of a certificate: `muster run` of the user's own config, in a directory of its own."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from launch import command, contract, registry, rundir
from launch.certify import records
from launch.certify.interruptions import Interruption
from launch.certify.records import Records

# A run is started again after every interruption, at once.
_RESTARTS = (
    "--cluster.restart.max_failures=1000",
    "--cluster.restart.max_preemptions=1000",
    "--cluster.restart.max_attempts_without_progress=0",
    "--cluster.restart.backoff_seconds=0.0",
)
_ENDS = {"kill": "killed", "exception": "exception", "sigterm": "preempted"}
_SHOWN_LINES = 12


@dataclasses.dataclass(frozen=True)
class Hit:
    """What became of an interruption.

    Attributes:
      interruption: that was planned.
      delivered: whether it befell whom it was meant for, in the phase it was meant for, and ended
        the attempt.
      attempt: that it ended; None if it never came.
      phase, step: where it hit.
      where: in words; why it does not count, if it does not.
      resumed_at: the step that the next attempt went on from.
    """

    interruption: Interruption
    delivered: bool
    attempt: int | None = None
    phase: str | None = None
    step: int | None = None
    where: str = "its place was never reached"
    resumed_at: int | None = None


class Trial:
    """A run that is started, watched, and read.

    Args:
      name: of its directory.
      text: what it is, for people.
      folder: its directory, made anew.
      words: configs and overrides, each one word.
      plan: of `interruptions.plan_of` with this trial's `records`.
      interruptions: that the plan holds.
      num_processes: of its gang.
      backend: of the cluster.
    """

    def __init__(
        self,
        name: str,
        text: str,
        folder: Path,
        words: Sequence[str],
        *,
        interruptions: Sequence[Interruption] = (),
        num_processes: int = 1,
        backend: str = "local",
    ):
        self.name, self.text, self.folder = name, text, folder
        self.words = tuple(words)
        self.interruptions = tuple(interruptions)
        self.num_processes = num_processes
        self.seconds: float | None = None
        # Where the gang is a job, SIGTERM ends the looking on alone. A shell's `&` ignores SIGINT.
        self._stop_signal = signal.SIGINT if backend == "slurm" else signal.SIGTERM
        self._began = 0.0
        self._process: subprocess.Popen[bytes] | None = None
        self._told: set[int] = set()
        self._records: Records | None = None

    @property
    def run(self) -> Path:
        """Its run directory."""
        return self.folder / "run"

    @property
    def directory(self) -> Path:
        """Where its processes leave records and marks."""
        return self.folder / "records"

    def prepare(self, plan: Mapping[str, Any], checkpoints: Path | None = None) -> None:
        """Make its directory.

        Args:
          plan: for the trainer.
          checkpoints: of another run, up to the step that this one is to go on from.
        """
        for path in (self.folder, self.directory, self.run):
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
        rundir.write_private(self.folder / "plan.json", plan)
        if checkpoints is not None:
            target = self.run / contract.CHECKPOINTS / checkpoints.name
            shutil.copytree(checkpoints, target)

    def start(self, state: Path) -> None:
        """Start `muster run`.

        Args:
          state: where it is remembered, which is not the user's own list of runs.
        """
        argv = [sys.executable, "-m", "launch", "run", *self.words, *_RESTARTS]
        argv += [f"--cluster.env.{contract.CERTIFY_PLAN}={self.folder / 'plan.json'}"]
        argv += [f"--workdir={self.run}"]
        fd = os.open(self.folder / "output.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        self._began = time.monotonic()
        with open(fd, "wb") as out:
            env = {registry.STATE_DIR: str(state), "PYTHONPATH": _python_path()}
            self._process = command.start(argv, out=out, env=env)

    def poll(self) -> int | None:
        """Its exit code; None as long as it runs."""
        assert self._process is not None
        code = self._process.poll()
        if code is not None and self.seconds is None:
            self.seconds = time.monotonic() - self._began
        return code

    def stop(self, at_once: bool) -> None:
        """Have the gang stopped or, `at_once`, killed; its launcher ends after it."""
        assert self._process is not None
        if self._process.poll() is None:
            self._process.send_signal(self._stop_signal)
            if at_once:
                time.sleep(0.3)  # Two signals at the same moment would be one.
                if self._process.poll() is None:
                    self._process.send_signal(self._stop_signal)

    def wait(self, seconds: float) -> bool:
        """Wait for the launcher's end; whether it came in time."""
        assert self._process is not None
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            return False
        return True

    def kill(self) -> None:
        """Kill the launcher; its agents then stop the gang by themselves."""
        assert self._process is not None
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()

    def news(self) -> list[str]:
        """What has happened since the last call, for the terminal."""
        lines = []
        for hit in self.hits():
            if hit.delivered and hit.interruption.id not in self._told:
                self._told.add(hit.interruption.id)
                step = "" if hit.step is None else f" (step {hit.step})"
                again = "" if hit.resumed_at is None else f"; goes on from step {hit.resumed_at}"
                lines.append(f"{self.name}: {hit.interruption.text}{step}{again}")
        return lines

    def hits(self) -> list[Hit]:
        """What became of its interruptions so far."""
        found = records.marks(self.directory)
        return [self._hit(i, [m for m in found if m["fault"] == i.id]) for i in self.interruptions]

    def _hit(self, planned: Interruption, marks: Sequence[Mapping[str, Any]]) -> Hit:
        if not marks:
            return Hit(planned, delivered=False)
        first = marks[0]
        ended = rundir.attempt_record(self.run, first["attempt"]).get("cause")
        following = self._went_on_from(first["attempt"] + 1)
        whom = {mark["process"] for mark in marks}
        meant = set(range(self.num_processes)) if planned.process is None else {planned.process}
        where = first["where"]
        if whom != meant:
            where = f"it befell only {len(whom)} of {len(meant)} processes"
        elif ended is not None and ended != _ENDS[planned.kind]:
            where = f"the attempt ended as {ended!r}, not of it"
        delivered = whom == meant and ended == _ENDS[planned.kind]
        return Hit(
            planned, delivered, first["attempt"], first["phase"], first["step"], where, following
        )

    def _went_on_from(self, attempt: int) -> int | None:
        """The step that the run went on from in this attempt or, if that never came so far, in the
        next that did; None if there is none yet."""
        for number in rundir.attempt_numbers(self.run):
            if number >= attempt:
                reached = rundir.steps_reached(rundir.attempt_path(self.run, number))
                if reached["first_step"] is not None:
                    return reached["first_step"]
        return None

    def records(self) -> Records:
        """What its processes have written; once it has ended."""
        if self._records is None:
            self._records = records.read(self.directory)
        return self._records

    def last_words(self) -> str:
        """Why it ended, as far as its newest attempt says."""
        numbers = rundir.attempt_numbers(self.run)
        record = rundir.attempt_record(self.run, numbers[-1]) if numbers else {}
        if message := record.get("message"):
            return f"{record.get('cause')}: {message}"
        lines = [line for line in self.output().splitlines() if line.strip()]
        return "\n".join(lines[-_SHOWN_LINES:]) or "it has said nothing"

    def config_error(self) -> str:
        """What the trainer or the launcher refused, in one line."""
        marks = ("error: ", "muster: error: ")
        lines = [line for line in self.output().splitlines() if line.startswith(marks)]
        return lines[-1].partition("error: ")[2] if lines else self.last_words()

    def output(self) -> str:
        """What it printed."""
        try:
            return (self.folder / "output.log").read_text(errors="replace")
        except OSError:
            return ""

    def checkpoint(self, step: int) -> Path:
        """Where its checkpoint of a step is."""
        return self.run / contract.CHECKPOINTS / str(step)

    def forget_checkpoints(self) -> None:
        """Delete what takes space and proves nothing more."""
        shutil.rmtree(self.run / contract.CHECKPOINTS, ignore_errors=True)


def _python_path() -> str:
    """Where this very package is found; a config file finds what it does in this process."""
    root = str(Path(__file__).resolve().parents[2])
    before = os.environ.get("PYTHONPATH", "")
    return (
        before
        if root in before.split(os.pathsep)
        else os.pathsep.join(filter(None, [root, before]))
    )


def as_json(record: Any) -> str:
    """A record as it is written."""
    return json.dumps(record, indent=1, default=str) + "\n"
