"""Records that a run cannot go on without, and a disk that takes nothing for a while."""

from __future__ import annotations

import errno
import sys
import time
from collections.abc import Callable
from pathlib import Path

from launch.spec import ConfigError

PATIENCE_SECONDS = 120.0
_AGAIN_SECONDS = 0.5
_OF_THE_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.ESTALE)


def patiently(action: Callable[[], None], path: Path) -> None:
    """Do what writes to the disk; one that takes nothing for a while must not end a run.

    Only while no gang is alive: it would hear nothing of its launcher meanwhile.

    Args:
      action: may be called several times.
      path: what it writes.

    Raises:
      ConfigError: the disk still takes nothing after PATIENCE_SECONDS.
    """
    limit = time.monotonic() + PATIENCE_SECONDS
    told = False
    while True:
        try:
            action()
            return
        except OSError as error:
            if error.errno not in _OF_THE_DISK:
                raise
            if time.monotonic() > limit:
                rule = f"cannot be written: {error.strerror}; make room, then start it again"
                raise ConfigError("workdir", rule, str(path)) from None
            if not told:
                told = True
                print(
                    f"muster: cannot write {path}: {error.strerror}; trying for "
                    f"{PATIENCE_SECONDS:.0f} s",
                    file=sys.stderr,
                    flush=True,
                )
        time.sleep(_AGAIN_SECONDS)
