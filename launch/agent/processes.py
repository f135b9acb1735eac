"""Processes by their ids: who is below whom, and that nothing is left."""

import contextlib
import ctypes
import os
import signal
import time

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_SWEEP_SECONDS = 2.0  # How long a killed process may take to be gone; longer only in a stuck I/O.


def _find_prctl():
    """A call of prctl(2) where there is one (Linux)."""
    function = getattr(ctypes.CDLL(None), "prctl", None)
    return lambda option, value: function and function(option, value, 0, 0, 0)


def become_subreaper():
    """Make orphans among this process's descendants its own children."""
    _find_prctl()(_PR_SET_CHILD_SUBREAPER, 1)


def die_with_parent(parent):
    """A function for a new child to call: the kernel kills it when its parent dies, or the thread
    of it that has started the child."""

    prctl = _find_prctl()  # Before the fork: the child of a process with threads does little.

    def arrange():
        prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # It died before the line above took effect.
            os._exit(1)

    return arrange


def descendants(root, spare=()):
    """Process ids below `root`, found in /proc; those in `spare` and what is below them are not."""
    children: dict = {}
    for name in os.listdir("/proc") if os.path.isdir("/proc") else ():
        if name.isdigit():
            try:
                with open("/proc/%s/stat" % name, "rb") as file:
                    fields = file.read().rpartition(b")")[2].split()
            except OSError:
                continue  # It ended meanwhile.
            children.setdefault(int(fields[1]), []).append(int(name))
    found, queue = [], [root]
    while queue:
        below = [pid for pid in children.get(queue.pop(), ()) if pid not in spare]
        found += below
        queue += below
    return found


def kill_descendants(spare=()):
    """Kill whatever is below this process, and wait until it is gone.

    Returns:
      The process ids that would not go within a time limit.
    """
    limit = time.monotonic() + _SWEEP_SECONDS
    while True:
        left = descendants(os.getpid(), spare)
        for pid in left:
            send(os.kill, pid, signal.SIGKILL)
            # Not ours yet? It becomes ours when its parent has died.
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)
        if not left or time.monotonic() > limit:
            return left
        time.sleep(0.005)


def send(function, target, number):
    """Send a signal by os.kill or os.killpg to what may be gone already, or another user's."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        function(target, number)
