"""What launcher, agent and trained program agree on: environment, files and exit codes.

Standard library only, so that any program may import it. A program that does not wish to import
anything can read the same environment variables; they are a stable interface.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Mapping, Sequence

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
CERTIFY_PLAN = "CERTIFY_PLAN"  # the faults and records that `muster certify` asks a training for
DEADLINE_FILE = "MUSTER_DEADLINE_FILE"  # says when a process that was told to stop is killed
STORAGE_DIR = "MUSTER_STORAGE_DIR"  # where a run on machines that come and go keeps what lasts

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
PLAN_RECORD = "plan.json"  # what the step needs on a cluster (trainer.plan), and the same as text
PLAN_TEXT = "plan.txt"
CHECKPOINTS = "checkpoints"
DATA_INDEX = "data"  # Indices of the data: what a filter keeps, which documents share a row.
LOCAL_RECORD = "local_checkpoints.json"  # by which number the hosts' own storage knows the run
ATTEMPTS = "attempts"
STACKS = "stacks"  # in an attempt's directory
LIVE_RECORD = "live.json"  # how the gang stands, while there is one
CHANGES = "changes.jsonl"  # what was changed in the middle of a run, and after which step
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

    It takes a few microseconds, so a training may call it at every step: one write into a file that
    stays open. A file that cannot be written is told once and then left alone: progress is not
    worth a training.

    Args:
      step: completed optimizer updates (or any count that only grows).
      phase: what the process does now, until the next call: one of PHASES.
      **extra: JSON values that `muster status` shows beside it, until they are given anew.
    """
    path = os.environ.get(PROGRESS_FILE)
    if not path:
        return
    reporter = _reporters.get(path)
    if reporter is None or reporter.pid != os.getpid():  # Not the parent's, in a forked child.
        reporter = _reporters[path] = _ProgressReporter(path)
    reporter.report(step, phase, extra)


class _ProgressReporter:
    """Writes one process's progress, in place: a JSON object, padded so that it never shrinks.

    A reader may see half of one report and half of another; it reads twice.
    """

    # Between two renderings of what changes slowly, the seconds by phase.
    _RENDER_SECONDS = 0.25

    def __init__(self, path: str):
        self.pid = os.getpid()
        self._lock = threading.Lock()
        self._first_step: int | None = None
        self._phase = ""
        self._phase_since = time.monotonic()
        self._rendered_at = float("-inf")
        self._seconds: dict[str, float] = {}
        self._extra: dict[str, object] = {}
        self._rest = ""
        self._width = 0
        self._fd: int | None = None
        try:
            self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
            # What somebody wrote before, a parent say, must not show behind the first report.
            self._width = os.fstat(self._fd).st_size
        except OSError as error:
            self._give_up(error)

    def report(self, step: int, phase: str, extra: Mapping[str, object]) -> None:
        """Write a report."""
        with self._lock:
            if self._fd is None:
                return
            now = time.monotonic()
            if phase != self._phase:
                self._add_seconds(now)
                self._phase = phase
            if self._first_step is None and phase not in ("init", "restore"):
                self._first_step = step
                self._rendered_at = float("-inf")
            if extra or now > self._rendered_at + self._RENDER_SECONDS:
                self._render(now, extra)
            text = (
                f'{{"step": {step}, "phase": "{phase}", "time": {time.time():.3f}, {self._rest}}}'
            )
            self._width = max(self._width, len(text))
            try:
                os.pwrite(self._fd, text.ljust(self._width).encode("ascii") + b"\n", 0)
            except OSError as error:
                self._give_up(error)

    def _add_seconds(self, now: float) -> None:
        if self._phase:
            before = self._seconds.get(self._phase, 0.0)
            self._seconds[self._phase] = before + now - self._phase_since
        self._phase_since = now

    def _render(self, now: float, extra: Mapping[str, object]) -> None:
        """What most reports have in common, as the inside of a JSON object."""
        self._add_seconds(now)
        self._rendered_at = now
        self._extra.update(extra)
        rest = {
            "schema": SCHEMA,
            "first_step": self._first_step,
            "seconds": {name: round(seconds, 3) for name, seconds in self._seconds.items()},
            **self._extra,
        }
        self._rest = json.dumps(rest, default=str)[1:-1]

    def _give_up(self, error: OSError) -> None:
        print(f"muster: progress is not reported: {error}", file=sys.stderr, flush=True)
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None


_reporters: dict[str, _ProgressReporter] = {}  # By progress file.


def _report_again(**extra: object) -> None:
    """Add to the newest report of this process, if there is one."""
    path = os.environ.get(PROGRESS_FILE, "")
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
        with open(path, encoding="ascii") as file:
            record = json.load(file)
        if path in _reporters:
            report_progress(int(record["step"]), record["phase"], **extra)


def report_exit() -> None:
    """Say that this process is leaving, if it has reported anything, by whatever means."""
    path = os.environ.get(PROGRESS_FILE, "")
    try:
        with open(path, "r+b", buffering=0) as file:
            data = file.read()
            record = json.loads(data)
            step = int(record["step"])
            if path in _reporters:
                report_progress(step, "exit")
            else:
                text = json.dumps({**record, "phase": "exit"})
                os.pwrite(file.fileno(), text.ljust(len(data)).encode(), 0)
    except (OSError, ValueError, TypeError, KeyError):
        return  # It never reported, or in a form of its own.


def record_deadline(path: str, seconds: float) -> None:
    """Say when a process is killed that is about to be told to stop.

    Args:
      path: what its DEADLINE_FILE names, on its own host.
      seconds: from now.
    """
    record = {"schema": SCHEMA, "monotonic": time.monotonic() + seconds, "seconds": seconds}
    write_atomically(path, json.dumps(record))


def deadline() -> tuple[float, float] | None:
    """When this process is killed, if it was told to stop and its launcher has said so.

    Returns:
      The time on `time.monotonic()`, and how many seconds there were in all.
    """
    try:
        with open(os.environ.get(DEADLINE_FILE, ""), encoding="utf-8") as file:
            record = json.load(file)
        return float(record["monotonic"]), float(record["seconds"])
    except (OSError, ValueError, TypeError, KeyError):
        return None


def record_failure(error: BaseException, accuses: Sequence[int] = ()) -> None:
    """Tell the launcher which exception ends this process. Does nothing outside of a gang.

    The first one counts. Never raises.

    Args:
      error: the exception; its attribute `accuses` counts where the argument is empty.
      accuses: processes that it says are the reason.
    """
    path = os.environ.get(FAILURE_FILE)
    if not path or os.path.exists(path):
        return
    kind = type(error)
    module = "" if kind.__module__ in ("builtins", "__main__") else f"{kind.__module__}."
    lines = traceback.format_exception(kind, error, error.__traceback__)
    try:
        record = {
            "schema": SCHEMA,
            "pid": os.getpid(),
            "type": f"{module}{kind.__qualname__}",
            "message": _shortened(str(error), 4000),
            "traceback": _shortened("".join(lines), 20_000),
            "monotonic": time.monotonic(),
            "accuses": list(accuses or getattr(error, "accuses", ())),
        }
        try:
            write_atomically(path, json.dumps(record), mode=0o600)
        except OSError:
            # A full disk may be what ends it. The file of its progress is there, and stays as long.
            brief = {"message": _shortened(str(error), 400), "traceback": ""}
            _report_again(failure={**record, **brief})
            raise
    except Exception as problem:  # The program's own error must be seen, not this one.
        print(f"muster: the exception is not recorded: {problem}", file=sys.stderr, flush=True)


def _shortened(text: str, length: int) -> str:
    """A text with its middle left out if it is too long."""
    if len(text) <= length:
        return text
    half = length // 2
    return f"{text[:half]}\n[... {len(text) - 2 * half} characters ...]\n{text[-half:]}"


def utc(seconds: float) -> str:
    """Seconds since the epoch as ISO 8601 in UTC."""
    whole = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds))
    return f"{whole}.{int(seconds % 1 * 1e6):06d}Z"


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
    try:
        with open(fd, "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(temporary, path)
    except OSError:
        with contextlib.suppress(OSError):
            os.unlink(temporary)  # On a full disk, half of it.
        raise
