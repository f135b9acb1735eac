"""A real agent at the other end of two pipes, and the test as its owner."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from launch import contract, rundir
from launch.backends import host_plan

PATIENCE_SECONDS = 30.0


class Owner:
    """Starts an agent, keeps up its lease, and takes in what it says.

    Attributes:
      events: all that the agent has said.
      folder: the attempt's directory.
    """

    def __init__(self, folder: Path, programs: list[Any], behind: Any = None, **plan: Any):
        """Takes for each process its argv, or a Python program; `behind` goes together with the
        plan; other arguments are the plan's."""
        self.folder = folder
        self.events: list[dict[str, Any]] = []
        self._unread = b""
        self._renewing: threading.Event | None = None
        (folder / contract.STACKS).mkdir(parents=True)
        self._plan = {
            "schema": 1,
            "host": "here",
            "lease_seconds": 60.0,
            "max_grace_seconds": 1.0,
            "max_log_bytes": 1 << 26,
            "hook": str(host_plan.HOOK_DIRECTORY),
            "processes": [self._process(i, program) for i, program in enumerate(programs)],
            **plan,
        }
        self.popen = subprocess.Popen(
            [sys.executable, *host_plan.AGENT[1:]],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
            bufsize=0,
        )
        self.send(self._plan, *([] if behind is None else [behind]))

    def _process(self, process_id: int, program: Any) -> dict[str, Any]:
        if isinstance(program, str):
            program = [sys.executable, "-c", textwrap.dedent(program)]
        files = host_plan.files_of(self.folder, process_id)
        names = {
            "progress": contract.PROGRESS_FILE,
            "failure": contract.FAILURE_FILE,
            "stacks": contract.STACKS_FILE,
        }
        env = {variable: files[name] for name, variable in names.items()}
        root = str(host_plan.HOOK_DIRECTORY.parents[1])
        env |= {"PYTHONPATH": root, "PYTHONUNBUFFERED": "1"}
        return {"process_id": process_id, "argv": program, "env": env, **files}

    def send(self, *messages: Any) -> None:
        """Say lines, all at once."""
        assert self.popen.stdin is not None
        self.popen.stdin.write(b"".join(json.dumps(one).encode() + b"\n" for one in messages))

    def tell(self, command: str, **more: Any) -> None:
        """Give a command."""
        self.send({"command": command, **more})

    def wait_for(self, event: str, count: int = 1, **fields: Any) -> dict[str, Any]:
        """The `count`-th event of a kind with these fields, waited for."""
        return self.wait_until(lambda: self._find(event, count, fields), f"{count} × {event}")

    def _find(self, event: str, count: int, fields: dict[str, Any]) -> dict[str, Any] | None:
        wanted = {"event": event, **fields}
        found = [e for e in self.events if {name: e.get(name) for name in wanted} == wanted]
        return found[count - 1] if len(found) >= count else None

    def wait_until(self, condition: Callable[[], Any], what: str) -> Any:
        """Hear the agent until something holds."""
        limit = time.monotonic() + PATIENCE_SECONDS
        while not (found := condition()):
            assert time.monotonic() < limit, f"waited for {what}; heard {self.events}"
            self.hear(0.02)
        return found

    def hear(self, seconds: float) -> None:
        """Take in what the agent says within a time."""
        assert self.popen.stdout is not None
        if select.select([self.popen.stdout], [], [], seconds)[0]:
            data = os.read(self.popen.stdout.fileno(), 1 << 16)
            *lines, self._unread = (self._unread + data).split(b"\n")
            self.events += [json.loads(line) for line in lines]

    def wait_for_log(self, text: str, process_id: int = 0) -> None:
        """Wait until a process has printed something."""
        log = rundir.log_path(self.folder, process_id)
        self.wait_until(lambda: log.exists() and text in log.read_text(), f"{text!r} in {log}")

    def end(self) -> list[dict[str, Any]]:
        """Wait for the agent's own end; the exit records by process."""
        done = self.wait_for("done")
        assert done["leftover"] == []
        self.popen.wait(timeout=PATIENCE_SECONDS)
        ids = range(len(self._plan["processes"]))
        return [rundir.read_record(rundir.exit_path(self.folder, i)) or {} for i in ids]


@contextmanager
def owner(folder: Path, *programs: Any, **plan: Any) -> Iterator[Owner]:
    """An agent that is gone at the end, and with it all that it started."""
    made = Owner(folder, list(programs), **plan)
    try:
        yield made
    finally:
        if made.popen.poll() is None:
            os.kill(made.popen.pid, 18)  # SIGCONT
        assert made.popen.stdin is not None
        made.popen.stdin.close()
        try:
            made.popen.wait(timeout=10)
        except subprocess.TimeoutExpired:
            made.popen.kill()
            made.popen.wait()
        assert made.popen.stdout is not None
        made.popen.stdout.close()


def alive(pid: int) -> bool:
    """Whether a process is there and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
