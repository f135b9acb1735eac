"""The only place that starts an external command: argument lists, no shell, a limit in time."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence

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


def run(
    argv: Sequence[str],
    *,
    timeout_seconds: float,
    env: Mapping[str, str] | None = None,
    bound: bool = False,
) -> Done:
    """Run a command to its end. It never raises; a command past its time is killed.

    Args:
      argv: the command and its arguments.
      timeout_seconds: how long it may take.
      env: over this process's own.
      bound: whether it is to be killed should this process be: what it asks for must not happen
        when nobody is left who knows of it.
    """
    words = tuple(argv)
    before = (sys.executable, "-I", "-S", "-c", _BOUND, str(os.getpid())) if bound else ()
    try:
        done = subprocess.run(
            (*before, *words),
            env={**os.environ, **(env or {})},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout_seconds,
            check=False,
            start_new_session=True,
        )
    except subprocess.TimeoutExpired:
        return Done(words, None, "", f"{words[0]} gave no answer in {timeout_seconds:g} s")
    except OSError as error:
        return Done(words, None, "", f"{words[0]}: {error.strerror}")
    return Done(words, done.returncode, done.stdout, done.stderr)
