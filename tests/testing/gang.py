"""Start a gang of real processes on this machine, and leave none behind."""

from __future__ import annotations

import contextlib
import os
import pathlib
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator, Mapping

from launch import contract

ROOT = pathlib.Path(__file__).parents[2]


def free_port() -> int:
    """A TCP port of the loopback interface that nobody uses right now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Gang:
    """Processes that run one script, each with its place in the environment and its own log."""

    def __init__(self, directory: pathlib.Path, processes: dict[int, subprocess.Popen[bytes]]):
        self.directory = directory
        self.processes = processes

    def log(self, process: int) -> str:
        return self._path(process).read_text(errors="replace")

    def logs(self) -> str:
        return "\n".join(
            f"----- process {process} (exit {popen.poll()})\n{self.log(process)}"
            for process, popen in self.processes.items()
        )

    def _path(self, process: int) -> pathlib.Path:
        return self.directory / f"process-{process}.log"

    def wait(self, timeout_seconds: float = 120.0) -> dict[int, int]:
        """Exit codes by process id.

        Raises:
          AssertionError: some ran on for longer; all logs are in the text.
        """
        deadline = time.monotonic() + timeout_seconds
        try:
            return {
                process: popen.wait(max(0.01, deadline - time.monotonic()))
                for process, popen in self.processes.items()
            }
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running:\n{self.logs()}") from None

    def succeed(self, timeout_seconds: float = 120.0) -> None:
        """Wait for all of them to exit with 0."""
        codes = self.wait(timeout_seconds)
        assert not any(codes.values()), f"exit codes {codes}\n{self.logs()}"

    def wait_for(self, text: str, process: int = 0, timeout_seconds: float = 120.0) -> None:
        """Wait until a process's log contains `text`."""
        deadline = time.monotonic() + timeout_seconds
        while text not in self.log(process):
            ended = self.processes[process].poll() is not None and text not in self.log(process)
            assert not ended, f"process {process} ended without {text!r}\n{self.logs()}"
            assert time.monotonic() < deadline, f"no {text!r} in time\n{self.logs()}"
            time.sleep(0.02)

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Send a signal to every process that is left, and everything that it started."""
        for popen in self.processes.values():
            if popen.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(popen.pid, number)
        if number == signal.SIGKILL:
            for popen in self.processes.values():
                popen.wait()


@contextlib.contextmanager
def gang(
    script: str,
    num_processes: int,
    directory: pathlib.Path,
    *,
    devices_per_process: int = 1,
    absent: tuple[int, ...] = (),
    env: Mapping[str, str] | None = None,
) -> Iterator[Gang]:
    """Start `num_processes` of `python -c script`; kill what is left on the way out.

    Args:
      script: Python source; dedented.
      num_processes: what each of them is told.
      directory: for the logs; made if missing.
      devices_per_process: CPU devices of each.
      absent: ids of processes that are not started.
      env: more environment variables.
    """
    directory.mkdir(parents=True, exist_ok=True)
    port = free_port()
    processes = {}
    started = Gang(directory, processes)
    try:
        for process in range(num_processes):
            if process in absent:
                continue
            with open(directory / f"process-{process}.log", "wb") as log:
                processes[process] = subprocess.Popen(
                    [sys.executable, "-u", "-c", textwrap.dedent(script)],
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    stdin=subprocess.DEVNULL,
                    start_new_session=True,
                    cwd=ROOT,
                    env={
                        **os.environ,
                        "PYTHONPATH": str(ROOT),
                        "JAX_PLATFORMS": "cpu",
                        "JAX_NUM_CPU_DEVICES": str(devices_per_process),
                        "NPROC": "16",  # gloo's threads: fewer may deadlock on few cores
                        contract.RUN_DIR: str(directory),
                        contract.ATTEMPT: "0",
                        contract.COORDINATOR_ADDRESS: f"127.0.0.1:{port}",
                        contract.NUM_PROCESSES: str(num_processes),
                        contract.PROCESS_ID: str(process),
                        contract.LOCAL_PROCESS_ID: str(process),
                        contract.DEVICES_PER_PROCESS: str(devices_per_process),
                        **(env or {}),
                    },
                )
        yield started
    finally:
        started.kill()
