"""Between an agent and its owner: JSON, one object a line, on standard input and output."""

import contextlib
import json
import os
import select
import time


class Owner:
    """The owner, as its agent hears it and speaks to it."""

    def __init__(self, unread=b""):
        self.unsent = b""
        self._unread = unread

    def take(self, data):
        """The messages that are complete with this."""
        *lines, self._unread = (self._unread + data).split(b"\n")
        return [json.loads(line) for line in lines]

    def tell(self, **event):
        """Tell of an event that happens now."""
        self.unsent += json.dumps(dict({"time": time.monotonic()}, **event)).encode() + b"\n"
        self.flush()

    def flush(self):
        """Send what the owner takes. An owner that does not read must not keep the agent from
        its lease; without one nobody hears it, and end of input says that it is gone."""
        with contextlib.suppress(BlockingIOError):
            try:
                while self.unsent:
                    self.unsent = self.unsent[os.write(1, self.unsent) :]
            except (BrokenPipeError, ConnectionResetError):
                self.unsent = b""

    def say_the_rest(self, seconds):
        """Before leaving, give an owner that reads slowly some time."""
        limit = time.monotonic() + seconds
        while self.unsent and time.monotonic() < limit:
            select.select([], [1], [], 1.0)
            self.flush()
