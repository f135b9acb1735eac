"""A wall clock that can jump: `time.time` of the launcher and of the gang's processes is off by
what a file says. Everything else, the monotonic clock and the kernel's times of files, goes on.

Agents run isolated and do not see this: theirs are hosts whose clocks are right.
"""

import os
import time

_LOOK_SECONDS = 0.02


def _install(control, felt):
    """Replace the clock."""
    real, real_ns, monotonic = time.time, time.time_ns, time.monotonic
    known = [0.0, float("-inf")]  # The offset, and when it was read.

    def offset():
        now = monotonic()
        if now > known[1] + _LOOK_SECONDS:
            known[1] = now
            try:
                with open(control) as file:
                    text = file.read()
            except OSError:
                text = ""
            value = float(text or 0.0)
            if value != known[0]:
                known[0] = value
                if value:
                    # The first word that somebody has seen it.
                    open(f"{felt}-{os.getpid()}", "w").close()
        return known[0]

    time.time = lambda: real() + offset()
    time.time_ns = lambda: real_ns() + int(offset() * 1e9)


_folder = os.environ.get("CHAOS_CONTROL")
if _folder:
    _install(os.path.join(_folder, "clock"), os.path.join(_folder, "felt", "clock"))
