"""The run: `muster run`, started again whenever it has ended, and its processes, by their ids."""

from __future__ import annotations

import dataclasses
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from launch import contract, rundir
from launch.agent.processes import die_with_parent
from tests.testing.chaos import config, schedule, task
from tests.testing.chaos.storage import Disk
from tests.testing.gangs import environment

_POLL_SECONDS = 0.004
_PATIENCE_SECONDS = 180.0  # For anything at all; far more than it takes on a busy machine.
_HOOK = Path(__file__).parent / "hook"
_AGAIN_SECONDS = 0.1  # Between the end of `muster run` and the next: what a hand takes, and less.
_TEMPORARY = ".orbax-checkpoint-tmp"


class ChaosError(AssertionError):
    """Something did not come, or not go."""


@dataclasses.dataclass(frozen=True)
class Ended:
    """One `muster run` that has ended before the training was done.

    Attributes:
      code: its exit code; negative for the signal that killed it.
      attempt: the newest attempt's number then.
      last_words: the end of what it said.
    """

    code: int
    attempt: int
    last_words: str


class World:
    """One training in a folder: cluster and config files, control files, the run directory."""

    def __init__(self, folder: Path, num_steps: int, settings: Path, most_ends: int = 0):
        """Makes everything; nothing is started yet.

        Args:
          folder: empty, or not there.
          num_steps: of the training.
          settings: the folder for what runs share: the compile cache, the list of runs.
          most_ends: so many times `muster run` may end too early.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self._settings = settings
        self._most_ends = most_ends
        self.num_steps = num_steps
        self.control = folder / "control"
        self.felt = self.control / task.FELT
        self.felt.mkdir(parents=True)
        self.disk = Disk(folder / "disk")
        self.run = self.disk.path / "run"
        self.checkpoints = self.run / contract.CHECKPOINTS
        self._log = folder / "muster.log"
        self._cluster = folder / "cluster.py"
        self._cluster.write_text(f"def get_config():\n    return {_CLUSTER!r}\n")
        self.launcher: subprocess.Popen[bytes] | None = None
        self.ended: list[Ended] = []
        self.starts = 0
        self.done = False
        # What has to be done at some time, whatever happens meanwhile: (when, what).
        self._later: list[tuple[float, Callable[[], None]]] = []

    # ------------------------------------------------------------------ muster run

    def start(self) -> None:
        """Start `muster run`."""
        command = [sys.executable, "-m", "launch", "run", f"--workdir={self.run}"]
        command += [f"--cluster={self._cluster}", f"--config={config.__file__}:{self.num_steps}"]
        env = environment()
        env["PYTHONPATH"] = os.pathsep.join([str(_HOOK), env["PYTHONPATH"]])
        env |= {task.CONTROL: str(self.control), "JAX_PLATFORMS": "cpu"}
        env |= {f"MUSTER_{name}_DIR": str(self._settings / name) for name in ("STATE", "CACHE")}
        with open(self._log, "ab") as log:
            self.launcher = subprocess.Popen(
                command,
                cwd=self.folder,
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                preexec_fn=die_with_parent(os.getpid()),  # noqa: PLW1509 (there are no threads)
            )
        self.starts += 1

    def pump(self) -> None:
        """Do what is due, and start `muster run` again if it has ended too early."""
        now = time.monotonic()
        due = [item for item in self._later if item[0] <= now]
        self._later = [item for item in self._later if item[0] > now]
        for _, action in due:
            action()
        assert self.launcher is not None
        code = self.launcher.poll()
        if code == 0:
            self.done = True
        elif code is not None:
            self.ended.append(Ended(code, self.attempt, self.last_words()))
            if len(self.ended) > self._most_ends:
                raise ChaosError(
                    f"muster run has ended {len(self.ended)} times\n{self.last_words()}"
                )
            time.sleep(_AGAIN_SECONDS)
            self.start()

    @staticmethod
    def now() -> float:
        """Seconds of a steady clock."""
        return time.monotonic()

    def later(self, seconds: float, action: Callable[[], None]) -> None:
        """Do something when so many seconds are over."""
        self._later.append((time.monotonic() + seconds, action))

    def wait(
        self, condition: Callable[[], Any], what: str, seconds: float = _PATIENCE_SECONDS
    ) -> Any:
        """Keep the run going until `condition()` holds; its value.

        Raises:
          ChaosError: it did not come to that.
        """
        limit = time.monotonic() + seconds
        while True:
            self.pump()
            value = condition()
            if value:
                return value
            if self.done:
                raise ChaosError(f"the run is done, and there was no {what}")
            if time.monotonic() > limit:
                raise ChaosError(f"no {what} in {seconds:.0f} s\n{self.last_words()}")
            time.sleep(_POLL_SECONDS)

    def finish(self) -> None:
        """Let the run go to its end."""
        self.open_gate(None)
        limit = time.monotonic() + _PATIENCE_SECONDS
        while not self.done or self._later:
            self.pump()
            if time.monotonic() > limit:
                raise ChaosError(f"the run does not end\n{self.last_words()}")
            time.sleep(0.02)

    def last_words(self, length: int = 1500) -> str:
        """The end of what the launchers have said."""
        return self._log.read_text(errors="replace")[-length:] if self._log.exists() else ""

    def close(self) -> None:
        """End what still runs, and take the disk away."""
        if self.launcher is not None and self.launcher.poll() is None:
            self.launcher.terminate()
            try:
                self.launcher.wait(20)
            except subprocess.TimeoutExpired:
                self.launcher.kill()  # Its agents see that at once.
                self.launcher.wait()
                time.sleep(6)
        self.disk.close()

    # ------------------------------------------------------------------ control files

    def open_gate(self, step: int | None) -> None:
        """Let data come up to a step; None for all of it."""
        self.tell(task.GATE, step)

    def tell(self, name: str, value: Any) -> None:
        """Write a control file; None takes it away."""
        if value is None:
            (self.control / name).unlink(missing_ok=True)
        else:
            contract.write_atomically(self.control / name, json.dumps(value))

    def take_felt(self, name: str) -> int:
        """How many have felt something, and forget it."""
        found = list(self.felt.glob(f"{name}-*"))
        for path in found:
            path.unlink()
        return len(found)

    # ------------------------------------------------------------------ where it stands

    @property
    def attempt(self) -> int:
        """The newest attempt's number; -1 before there is one."""
        return rundir.next_attempt(self.run) - 1

    def progress(self, process: int = 0) -> tuple[int, str]:
        """Step and phase that a process of the newest attempt has reported; (-1, "") if none."""
        path = rundir.progress_path(rundir.attempt_path(self.run, self.attempt), process)
        record = rundir.read_record(path) or {}
        return record.get("step", -1), record.get("phase", "")

    def saving(self) -> bool:
        """Whether a save is being written."""
        try:
            return any(name.endswith(_TEMPORARY) for name in os.listdir(self.checkpoints))
        except OSError:
            return False

    def records(self) -> list[dict[str, Any]]:
        """Those of all attempts."""
        return [
            rundir.attempt_record(self.run, number) for number in rundir.attempt_numbers(self.run)
        ]

    # ------------------------------------------------------------------ processes

    def pid_of(self, who: str, process: int) -> int | None:
        """The process id of "launcher", or of the "agent" or "process" of a number; None if there
        is none now. They are found below the launcher that this world has started."""
        assert self.launcher is not None
        if who == "launcher":
            return self.launcher.pid
        for agent in _children(self.launcher.pid):
            for child in _children(agent):
                if variable_of(child, contract.PROCESS_ID) == str(process):
                    return agent if who == "agent" else child
        return None


def _children(parent: int) -> list[int]:
    found = []
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                fields = Path("/proc", name, "stat").read_bytes().rpartition(b")")[2].split()
            except OSError:
                continue
            if int(fields[1]) == parent and fields[0] not in (b"Z", b"X"):
                found.append(int(name))
    return found


def variable_of(pid: int, name: str) -> str | None:
    """A variable of a process's environment; None if it is not there, or the process is not."""
    try:
        data = Path("/proc", str(pid), "environ").read_bytes()
    except OSError:
        return None
    found = [line for line in data.split(b"\0") if line.startswith(f"{name}=".encode())]
    return found[0].partition(b"=")[2].decode() if found else None


class Victim:
    """A process that is meant, and no other that may get its id later."""

    def __init__(self, pid: int):
        self.pid = pid
        self._fd: int | None = os.pidfd_open(pid)

    def send(self, number: signal.Signals) -> bool:
        """Send a signal; whether it was still there."""
        if self._fd is None:
            return False
        try:
            signal.pidfd_send_signal(self._fd, number)
        except ProcessLookupError:
            return False
        return True

    @property
    def state(self) -> str:
        """The letter of its state; "" once it is gone, "Z" when it has ended."""
        try:
            data = Path("/proc", str(self.pid), "stat").read_bytes()
        except OSError:
            return ""
        return data.rpartition(b")")[2].split()[0].decode()

    @property
    def ended(self) -> bool:
        """Whether it has ended; its descriptor then becomes readable."""
        return self._fd is None or bool(select.select([self._fd], [], [], 0)[0])

    def close(self) -> None:
        """Let go of it."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None


_CLUSTER = {
    "backend": "local",
    "hosts": schedule.NUM_PROCESSES,
    "processes_per_host": 1,
    "lease_seconds": 12.0,
    "grace_seconds": 60.0,
    "restart": {
        "max_failures": 10_000,
        "max_preemptions": 10_000,
        "backoff_seconds": 0.05,
        "max_backoff_seconds": 0.2,
        "max_attempts_without_progress": 0,
    },
    # Of a tiny training that is known well: a process that is frozen is found within seconds.
    "watch": {
        "start_seconds": 60.0,
        "init_seconds": 60.0,
        "restore_seconds": 60.0,
        "compile_seconds": 60.0,
        "data_seconds": 8.0,
        "step_min_seconds": 8.0,
        "save_seconds": 10.0,
        "exit_seconds": 60.0,
    },
}
