"""Real gangs for tests: run the `muster` command, and see what is left of it."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from launch import contract, rundir

ROOT = Path(__file__).resolve().parents[2]
# The kernel's doing: Python's own way, preexec_fn, is not safe in a process with JAX's threads.
_DIE_WITH_US = ["setpriv", "--pdeathsig=KILL"] if shutil.which("setpriv") else []
TIMEOUT_SECONDS = 120  # Against hanging only; nothing here is slow.


class MusterCommand:
    """`muster` with a run directory and a cluster file under a temporary directory."""

    def __init__(self, folder: Path, python: str = sys.executable, **cluster: Any):
        """Run by `python`; other keyword arguments are fields of the cluster config."""
        self.python = python
        self.folder = folder
        self.workdir = folder / "run"
        self.cluster_file = folder / "cluster.py"
        fields = {"backend": "local", "processes_per_host": 2, "env": {}, **cluster}
        self.cluster_file.write_text(f"def get_config():\n    return {fields!r}\n")

    def command(self, *flags: str, program: str | None = None) -> list[str]:
        """`muster run` of Python source text as a program of the user's own."""
        command = [self.python, "-m", "launch", "run", f"--cluster={self.cluster_file}"]
        command += [f"--workdir={self.workdir}", *flags]
        if program is not None:
            file = self.folder / "program.py"
            file.write_text(textwrap.dedent(program))
            command += ["--", sys.executable, str(file)]
        return command

    def start(
        self, *flags: str, program: str | None = None, **options: Any
    ) -> subprocess.Popen[str]:
        """Start it, output and errors in pipes; further options are Popen's. It dies with the
        thread that has called this: an interrupted test leaves nothing."""
        return subprocess.Popen(
            [*_DIE_WITH_US, *self.command(*flags, program=program)],
            cwd=self.folder,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            **{"env": environment(), **options},
        )

    def run(self, *flags: str, program: str | None = None) -> subprocess.CompletedProcess[str]:
        """Run it to its end."""
        process = self.start(*flags, program=program)
        try:
            out, err = process.communicate(timeout=TIMEOUT_SECONDS)
        except subprocess.TimeoutExpired:
            process.terminate()  # The launcher then takes its gang along.
            out, err = process.communicate(timeout=TIMEOUT_SECONDS)
            raise AssertionError(f"muster hung; it had said {out}\n{err}") from None
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    def other(self, *words: str) -> subprocess.CompletedProcess[str]:
        """Another `muster` command, run to its end."""
        return self.run_words([self.python, "-m", "launch", *words])

    def run_words(
        self, words: Sequence[str], cwd: Path | None = None, env: Mapping[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """A whole command line, run to its end."""
        return subprocess.run(
            words,
            cwd=cwd or self.folder,
            env=env or environment(),
            capture_output=True,
            text=True,
            timeout=TIMEOUT_SECONDS,
            check=False,
        )

    def attempt(self, number: int = 0) -> dict[str, Any]:
        """An attempt's record."""
        path = rundir.attempt_path(self.workdir, number) / rundir.ATTEMPT_RECORD
        return json.loads(path.read_text())

    def metrics(self, name: str = "loss") -> dict[int, Any]:
        """Step -> value, from metrics.jsonl."""
        lines = (self.workdir / contract.METRICS_FILE).read_text().splitlines()
        return {line["step"]: line[name] for line in map(json.loads, lines) if name in line}

    def log(self, process_id: int, number: int = 0) -> str:
        """A process's log, "" where there is none yet."""
        path = rundir.log_path(rundir.attempt_path(self.workdir, number), process_id)
        return path.read_text() if path.exists() else ""

    def wait_for_log(self, text: str, processes: int = 2, number: int = 0) -> None:
        """Wait until every process has logged `text`."""
        for process in range(processes):
            self.wait_for(text, process, number)

    def wait_for(self, text: str, process_id: int, number: int = 0) -> None:
        """Wait until one process has logged `text`."""
        wait_until(
            lambda: text in self.log(process_id, number),
            f"process {process_id} to log {text!r}",
        )

    def left(self) -> list[int]:
        """What is alive of this run: processes that carry its environment, and its agents."""
        return members_of(self.workdir) + self.agents()

    def check_nothing_is_left(self) -> None:
        """Fail if anything survives the run by ten seconds; kill it, so that no test leaves it."""
        try:
            wait_until(lambda: not self.left(), "the run to leave nothing", seconds=10)
        finally:
            for pid in self.left():
                os.kill(pid, signal.SIGKILL)

    def attempts_closed(self) -> int:
        """How many attempts have ended."""
        numbers = rundir.attempt_numbers(self.workdir)
        return sum(bool(rundir.attempt_record(self.workdir, n).get("cause")) for n in numbers)

    def agent_of(self, host: str) -> int:
        """The process id of a host's agent, waited for; its newborn children look like it."""
        name = f"agent-{host}.log"
        found: list[int] = []

        def look() -> bool:
            for pid in self.agents():
                with contextlib.suppress(OSError):
                    parent = int(
                        Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1]
                    )
                    if os.readlink(f"/proc/{pid}/fd/2").endswith(name) and parent not in found:
                        found.append(pid)
            return bool(found)

        wait_until(look, f"the agent of {host}")
        return min(found)

    def agents(self) -> list[int]:
        """Process ids of this run's agents."""
        lock = str(self.workdir / rundir.LOCK_FILE)
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    open_files = [os.readlink(fd) for fd in (entry / "fd").iterdir()]
                    command = (entry / "cmdline").read_bytes()
                except OSError:
                    continue
                if lock in open_files and b"launch.agent" in command:
                    found.append(int(entry.name))
        return found


def members_of(workdir: Path) -> list[int]:
    """Process ids of what is alive and carries a run's environment."""
    wanted = f"{contract.RUN_DIR}={workdir}\0".encode()
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                carries = wanted in (entry / "environ").read_bytes()
                zombie = not (entry / "cmdline").read_bytes()
            except OSError:
                continue
            if carries and not zombie:
                found.append(int(entry.name))
    return found


def environment() -> dict[str, str]:
    """This process's environment in which the packages under test are found, and no gang's."""
    env = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("MUSTER_") or name in ("MUSTER_STATE_DIR", "MUSTER_CACHE_DIR")
    }
    return {**env, "PYTHONPATH": str(ROOT)}


def wait_until(condition: Any, what: str, seconds: float = 60.0) -> None:
    """Poll until `condition()` holds; fail with `what` was waited for."""
    limit = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > limit:
            raise AssertionError(f"waited {seconds} s for {what}")
        time.sleep(0.02)


def command_line(pid: int) -> bytes:
    return Path(f"/proc/{pid}/cmdline").read_bytes()
