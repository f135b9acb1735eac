"""Who holds a machine's TPU chips: an earlier attempt's processes are ended, others are named."""

import contextlib
import glob
import os
import signal
import time

from launch import contract
from launch.agent.process import read
from launch.agent.processes import send

_DEVICES = ("/dev/accel*", "/dev/vfio/[0-9]*")
_LOCK_FILES = ("/tmp/libtpu_lockfile",)
_END_SECONDS = 10.0


class HeldError(Exception):
    """Somebody else holds the chips."""


def free(run):
    """Make sure that nobody holds the chips or their lock file.

    Args:
      run: the id of the run whose processes are ours to end.

    Returns:
      The processes that were ended.

    Raises:
      HeldError: somebody else's do.
    """
    ended = []
    for pid in sorted(_holders()):
        if not _is_ours(pid, run):
            command = read("/proc/%d/cmdline" % pid).replace(b"\0", b" ").decode("utf-8", "replace")
            raise HeldError("process %d holds the TPU chips: %s" % (pid, command.strip()[:200]))
        send(os.kill, pid, signal.SIGKILL)
        ended.append(pid)
    limit = time.monotonic() + _END_SECONDS
    while _holders() & set(ended):
        if time.monotonic() > limit:
            raise HeldError("processes %s hold the TPU chips and cannot be killed" % sorted(ended))
        time.sleep(0.05)
    for path in _LOCK_FILES:
        # Nobody has it open any more: left behind by a process that was killed.
        with contextlib.suppress(OSError):
            os.unlink(path)
    return ended


def _holders():
    """The processes that have a chip, or the lock file of libtpu, open."""
    wanted = {os.path.realpath(p) for pattern in _DEVICES for p in glob.glob(pattern)}
    wanted |= {path for path in _LOCK_FILES if os.path.exists(path)}
    if not wanted:
        return set()
    found = set()
    for name in os.listdir("/proc"):
        if not name.isdigit() or int(name) == os.getpid():
            continue
        with contextlib.suppress(OSError):
            folder = "/proc/%s/fd" % name
            for fd in os.listdir(folder):
                with contextlib.suppress(OSError):
                    if os.readlink("%s/%s" % (folder, fd)) in wanted:
                        found.add(int(name))
    return found


def _is_ours(pid, run):
    """Whether a process was started for this run, by its environment."""
    for word in read("/proc/%d/environ" % pid).split(b"\0"):
        name, _, value = word.decode("utf-8", "replace").partition("=")
        if name == contract.RUN_DIR:
            return os.path.basename(value) == run
    return False
