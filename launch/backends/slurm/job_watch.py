"""What SLURM says of a job, asked again and again beside what else is done."""

from __future__ import annotations

import threading
import time

from launch.backends.slurm import client
from launch.backends.slurm.client import Job


class JobWatch:
    """Asks SLURM for a job again and again, in a thread of its own: an answer may take long.

    Attributes:
      limit_at: the end of the time limit, while the job ran; of one that was cancelled, SLURM says
        in its place when that was.
      job: the newest answer; None before the first, or when SLURM knows the job no more.
      gone: SLURM knows it no more.
      silent_since: since when (monotonic) there was no answer; None while there are.
    """

    def __init__(
        self,
        job_id: str,
        every_seconds: float = 5.0,
    ):
        self._id = job_id
        self._every = every_seconds
        self._wake = threading.Event()
        self._end = False
        self.job: Job | None = None
        self.limit_at: float | None = None
        self.gone = False
        self.silent_since: float | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    @property
    def over(self) -> bool:
        """Whether the job has certainly come to its end."""
        return self.gone or (self.job is not None and not self.job.active)

    def look_again(self) -> None:
        """Ask soon."""
        self._wake.set()

    def close(self) -> None:
        """Ask no more."""
        self._end = True
        self._wake.set()

    def _run(self) -> None:
        wait = self._every
        while not self._end:
            try:
                found = client.job(self._id)
            except client.UnavailableError:
                self.silent_since = self.silent_since or time.monotonic()
                wait = min(2 * wait, 60.0)
            else:
                wait, self.silent_since = self._every, None
                if found is None:
                    self.gone = True
                    return
                if found.state == "RUNNING":
                    self.limit_at = found.end_at
                self.job = found
            self._wake.wait(wait)
            self._wake.clear()
