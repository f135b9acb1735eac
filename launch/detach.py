"""`muster run --detach`: the controller goes on by itself, and the terminal is free again."""

from __future__ import annotations

import os
import select
import sys
import traceback
from collections.abc import Callable

from launch import contract
from launch.ownership import RunDir
from launch.spec import ConfigError

_STARTED = b"started\n"


def run(run_dir: RunDir, control: Callable[[Callable[[], None]], int]) -> int:
    """Leave a controller behind, in a session of its own, that holds the run directory.

    Args:
      run_dir: held by this process, and by the one left behind.
      control: runs the gang to its end and calls its argument once the gang has started; returns
        the run's exit code.

    Returns:
      EXIT_DONE once the gang has started; the run's exit code if it has ended before that.
    """
    log = run_dir.path / contract.CONTROLLER_LOG
    log_fd = os.open(log, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
    said_before = os.fstat(log_fd).st_size
    read_end, write_end = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        os.close(read_end)
        os._exit(_be_controller(run_dir, control, log_fd, write_end))
    os.close(write_end)
    run_dir.release()
    select.select([read_end], [], [])
    said = os.read(read_end, len(_STARTED))
    os.close(read_end)
    if said == _STARTED:
        where = run_dir.path
        print(f"run {run_dir.name} ({run_dir.run_id}) goes on in the background, process id {pid}")
        print(f"  muster status {where}\n  muster logs {where} --follow\n  muster stop {where}")
        return contract.EXIT_DONE
    _, status = os.waitpid(pid, 0)
    os.lseek(log_fd, said_before, os.SEEK_SET)
    with open(log_fd, encoding="utf-8", errors="replace") as words:
        sys.stderr.write(words.read())
    return os.waitstatus_to_exitcode(status)


def _be_controller(
    run_dir: RunDir, control: Callable[[Callable[[], None]], int], log_fd: int, write_end: int
) -> int:
    """The process that was left behind; returns its exit code."""
    os.setsid()
    nowhere = os.open(os.devnull, os.O_RDWR)
    # What the gang's processes print is in their logs; what is said of them is the log.
    for source, target in ((nowhere, 0), (nowhere, 1), (log_fd, 2)):
        os.dup2(source, target)
    os.close(log_fd)
    os.close(nowhere)

    def started() -> None:
        os.write(write_end, _STARTED)
        os.close(write_end)

    try:
        run_dir.write_owner()
        return control(started)
    except ConfigError as error:
        print(f"muster: error: {error}", file=sys.stderr)
        return contract.EXIT_CONFIG
    except BaseException:
        traceback.print_exc()
        return contract.EXIT_FAILED
    finally:
        sys.stderr.flush()
