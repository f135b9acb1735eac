"""Files that grow in a local directory, kept on Google Cloud Storage as whole objects.

GCS cannot append, and a training must not wait for it: a thread of its own uploads what has
changed every few seconds. What a SIGKILL takes with it are the lines since the last upload; `flush`
before a checkpoint's commit sees to it that these are of steps which a resume does again.
"""

from __future__ import annotations

import logging
import os
import pathlib
import shutil
import tempfile
import threading
import time

from trainer import storage

log = logging.getLogger(__name__)

EVERY_SECONDS = 5.0
# A file that has grown large is uploaded whole each time: never for more than this share of time.
_MOST_OF_THE_TIME = 0.1
CLOSE_SECONDS = 60.0
CRASH_SECONDS = 10.0


class Mirror:
    """A local directory whose files are uploaded. Lead process only.

    Args:
      remote: where to, `gs://BUCKET/PATH`.
      fetch: names of files to go on with, fetched first if they are there.
      every_seconds: how often changed files are uploaded.
    """

    def __init__(self, remote: str, fetch: tuple[str, ...], every_seconds: float = EVERY_SECONDS):
        self.local = pathlib.Path(tempfile.mkdtemp(prefix="muster-metrics-"))
        self._remote = remote
        self._every = every_seconds
        self._uploaded: dict[str, tuple[int, int]] = {}  # name -> (size, change time) sent last
        self._changed = threading.Condition()
        self._asked = 0  # rounds asked for by `flush` and `close`
        self._done = 0  # of these, how many are done
        self._failing = False
        self._closing = False
        for name in fetch:
            try:
                self.local.joinpath(name).write_bytes(storage.read_bytes(f"{remote}/{name}"))
            except FileNotFoundError:
                continue
        self._thread = threading.Thread(target=self._run, name="metrics_upload", daemon=True)
        self._thread.start()

    def flush(self, limit_seconds: float = 30.0) -> bool:
        """Upload what is there now, and wait for it; says whether it is all there.

        Args:
          limit_seconds: no longer than this.
        """
        with self._changed:
            self._asked += 1
            wanted = self._asked
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._closing or self._done >= wanted, limit_seconds)
            return self._done >= wanted and not self._failing

    def close(self, limit_seconds: float = CLOSE_SECONDS) -> None:
        """Upload what is left and end; the files must not change any more.

        Args:
          limit_seconds: how long to try. What is not uploaded then stays in the local directory.
        """
        deadline = time.monotonic() + limit_seconds
        while not (whole := self.flush(max(0.0, deadline - time.monotonic()))):
            if time.monotonic() + 1.0 > deadline:
                break
            time.sleep(1.0)
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        if whole:
            self._thread.join()
            shutil.rmtree(self.local, ignore_errors=True)
        else:
            log.warning("not all metrics are in %s; they are in %s", self._remote, self.local)

    def _run(self) -> None:
        pause = self._every
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closing or self._asked > self._done, pause)
                if self._closing:
                    return
                asked = self._asked
            began = time.monotonic()
            error = self._upload()
            pause = max(self._every, (time.monotonic() - began) / _MOST_OF_THE_TIME)
            if error is not None and not self._failing:
                log.warning(
                    "metrics cannot be uploaded to %s: %s; training goes on, and so do the tries",
                    *(self._remote, storage.reason(error)),
                )
            with self._changed:
                self._failing, self._done = error is not None, asked
                self._changed.notify_all()

    def _upload(self) -> Exception | None:
        """Upload every file that has changed; what went wrong, if anything."""
        problem = None
        for name in sorted(os.listdir(self.local)):
            path = self.local / name
            try:
                found = path.stat()
                mark = (found.st_size, found.st_mtime_ns)
                if self._uploaded.get(name) == mark or name.endswith(".tmp"):
                    continue
                storage.filesystem().pipe_file(f"{self._remote}/{name}", path.read_bytes())
                self._uploaded[name] = mark
            except Exception as error:  # Metrics are not worth a training.
                problem = error
        return problem
