"""The only place that starts an external command: argument lists, no shell, a limit in time."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from typing import IO

_LOOK_SECONDS = 0.1  # Between two looks whether a command is still wanted.
# By another interpreter, since Python's preexec_fn is not safe where there are threads.
_BOUND = """\
import ctypes, os, sys
ctypes.CDLL(None).prctl(1, 9, 0, 0, 0)
if os.getppid() == int(sys.argv[1]):
    os.execvp(sys.argv[2], sys.argv[2:])
"""


@dataclasses.dataclass(frozen=True)
class Done:
    """A command that has ended.

    Attributes:
      argv: what was run.
      exit_code: its own; None when it did not end in time, or could not be started.
      out: its standard output.
      err: its standard error; what kept it from starting or ending.
    """

    argv: tuple[str, ...]
    exit_code: int | None
    out: str
    err: str

    @property
    def ok(self) -> bool:
        """Whether it has done what it should."""
        return self.exit_code == 0

    @property
    def last_word(self) -> str:
        """The last line of what it complained of."""
        lines = [line.strip() for line in (self.err or self.out).splitlines() if line.strip()]
        return lines[-1] if lines else f"exit code {self.exit_code}"


def start(
    argv: Sequence[str], *, out: IO[bytes], env: Mapping[str, str] | None = None
) -> subprocess.Popen[bytes]:
    """Start a command in a session of its own, which is killed should this process be.

    Args:
      argv: the command and its arguments.
      out: where its output and errors go.
      env: over this process's own.
    """
    return subprocess.Popen(
        (sys.executable, "-I", "-S", "-c", _BOUND, str(os.getpid()), *argv),
        env={**os.environ, **(env or {})},
        stdin=subprocess.DEVNULL,
        stdout=out,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def run(
    argv: Sequence[str],
    *,
    timeout_seconds: float,
    env: Mapping[str, str] | None = None,
    bound: bool = False,
    over: threading.Event | None = None,
) -> Done:
    """Run a command to its end. It never raises; a command past its time is killed, and with it
    whatever it has started in its session.

    Args:
      argv: the command and its arguments.
      timeout_seconds: how long it may take.
      env: over this process's own.
      bound: whether it is to be killed should this process be: what it asks for must not happen
        when nobody is left who knows of it.
      over: its time is over when this is set, too.
    """
    words = tuple(argv)
    before = (sys.executable, "-I", "-S", "-c", _BOUND, str(os.getpid())) if bound else ()
    try:
        process = subprocess.Popen(
            (*before, *words),
            env={**os.environ, **(env or {})},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            start_new_session=True,
        )
    except OSError as error:
        return Done(words, None, "", f"{words[0]}: {error.strerror}")
    limit = time.monotonic() + timeout_seconds
    while True:
        left = max(0.0, limit - time.monotonic())
        try:
            out, err = process.communicate(
                timeout=left if over is None else min(left, _LOOK_SECONDS)
            )
        except subprocess.TimeoutExpired:
            if time.monotonic() < limit and not (over and over.is_set()):
                continue
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            why = f"gave no answer in {timeout_seconds:g} s"
            return Done(words, None, "", f"{words[0]} {why if left <= 0 else 'was killed'}")
        except BaseException:
            process.kill()
            raise
        return Done(words, process.returncode, out, err)
