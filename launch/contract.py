"""What launcher, agent and trained program agree on: environment, files and exit codes.

Standard library only, so that any program may import it. A program that does not wish to import
anything can read the same environment variables; they are a stable interface.
"""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections.abc import Mapping

SCHEMA = 1  # Of every record that Muster writes; raised when a reader must be changed.

# Exit codes.
EXIT_DONE = 0
EXIT_FAILED = 1
EXIT_CONFIG = 2  # The command or the config is wrong: never retried.
EXIT_RESUMABLE = 75  # Stopped early with a checkpoint (preempted, time limit, stopped by hand).

# Environment of every process of a gang.
RUN_DIR = "MUSTER_RUN_DIR"
ATTEMPT = "MUSTER_ATTEMPT"
COORDINATOR_ADDRESS = "MUSTER_COORDINATOR_ADDRESS"  # host:port of process 0's service
NUM_PROCESSES = "MUSTER_NUM_PROCESSES"
PROCESS_ID = "MUSTER_PROCESS_ID"
LOCAL_PROCESS_ID = "MUSTER_LOCAL_PROCESS_ID"
HOST = "MUSTER_HOST"  # the host's name in messages
DEVICES_PER_PROCESS = "MUSTER_DEVICES_PER_PROCESS"
PROGRESS_FILE = "MUSTER_PROGRESS_FILE"
FAILURE_FILE = "MUSTER_FAILURE_FILE"  # where a process says which exception ends it
STACKS_FILE = "MUSTER_STACKS_FILE"  # where its Python stacks are written when they are asked for

# What a process may say it is doing, in the order in which a step goes through it; `exit` is said
# by Python itself on its way out.
PHASES = ("init", "restore", "compile", "data", "step", "save", "eval", "exit")

# How an attempt can end.
CAUSES = (
    "completed",
    "config",
    "exception",
    "oom",
    "killed",
    "hang",
    "preempted",
    "time_limit",
    "host_lost",
    "start_timeout",
    "stopped",
)

# A line that the lead process prints and that starts so is progress: on a terminal the launcher
# shows the newest one in place instead of scrolling.
PROGRESS_PREFIX = "step "

# The run directory.
RUN_RECORD = "run.json"
CONFIG_RECORD = "config.json"
METRICS_FILE = "metrics.jsonl"
LEDGER_RECORD = "ledger.json"
CHECKPOINTS = "checkpoints"
ATTEMPTS = "attempts"
STACKS = "stacks"  # in an attempt's directory
LIVE_RECORD = "live.json"  # how the gang stands, while there is one
STOP_REQUEST = "stop.json"  # from `muster stop` to whoever runs the gang
CONTROLLER_LOG = "controller.log"  # what `muster run --detach` says


@dataclasses.dataclass(frozen=True)
class Membership:
    """A process's place in its gang.

    Attributes:
      coordinator_address: `host:port` where process 0 serves `jax.distributed`.
      num_processes: processes in the gang.
      process_id: in `[0, num_processes)`; 0 is the lead process.
      local_process_id: its number on its own host.
      devices_per_process: how many devices the cluster config promises it; None if not said.
    """

    coordinator_address: str
    num_processes: int
    process_id: int
    local_process_id: int
    devices_per_process: int | None


def membership(env: Mapping[str, str] | None = None) -> Membership | None:
    """Read this process's place in its gang; None when Muster did not start it.

    Raises:
      ValueError: the environment is only half there, so that going on would mean going on alone.
    """
    env = os.environ if env is None else env
    names = (COORDINATOR_ADDRESS, NUM_PROCESSES, PROCESS_ID)
    missing = [name for name in names if not env.get(name)]
    if len(missing) == len(names):
        return None
    if missing:
        raise ValueError(
            f"{', '.join(missing)} not set while other MUSTER_ variables are: a gang member must "
            "know its whole place; pass the environment on unchanged"
        )
    devices = env.get(DEVICES_PER_PROCESS)
    return Membership(
        coordinator_address=env[COORDINATOR_ADDRESS],
        num_processes=int(env[NUM_PROCESSES]),
        process_id=int(env[PROCESS_ID]),
        local_process_id=int(env.get(LOCAL_PROCESS_ID, "0")),
        devices_per_process=int(devices) if devices else None,
    )


def report_progress(step: int, phase: str = "step", **extra: object) -> None:
    """Tell the launcher how far this process is. Does nothing outside of a gang.

    Args:
      step: completed optimizer updates (or any count that only grows).
      phase: what the process is doing: init, restore, compile, data, step, eval or save.
      **extra: JSON values that `muster status` shows beside it.
    """
    path = os.environ.get(PROGRESS_FILE)
    if not path:
        return
    first_step = _first_step.setdefault(path, step)
    record = {"schema": SCHEMA, "step": step, "first_step": first_step, "phase": phase}
    write_atomically(path, json.dumps({**record, "time": time.time(), **extra}))


_first_step: dict[str, int] = {}  # Progress file -> the first step reported to it.


def write_atomically(path: str | os.PathLike[str], text: str, mode: int = 0o666) -> None:
    """Write a small file so that a reader sees the old text or the new, never half of it.

    Args:
      path: the file.
      text: its new content.
      mode: permission bits of a new file, less the umask.
    """
    # The process id keeps two writers of one path from meeting in the temporary file.
    temporary = f"{os.fspath(path)}.{os.getpid()}.tmp"
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)
    with open(fd, "w", encoding="utf-8") as file:
        file.write(text)
    os.replace(temporary, path)
