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
        self.is_new = False  # Whether it knows nothing yet of what it was not told again.
        self.gone = False  # Whether its end was seen, after which it does not come back.
        self._unread = unread
        os.set_blocking(1, False)

    def descriptors(self):
        """What to wait for: to be read, and to be written."""
        return [] if self.gone else [0], [1] if self.unsent else []

    def hear(self, readable, writable):
        """The messages that have come; `gone` is set at the end of input."""
        messages = self.take(b"")  # What came right behind the plan.
        if 0 in readable:
            data = os.read(0, 65536)
            messages += self.take(data)
            self.gone = not data
        if 1 in writable:
            self.flush()
        return messages

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

    def look(self):
        """It sees the processes' files itself."""

    def part(self, leftover, seconds):
        """Say that all is done; give an owner that reads slowly some time."""
        self.tell(event="done", leftover=leftover)
        limit = time.monotonic() + seconds
        while self.unsent and time.monotonic() < limit:
            select.select([], [1], [], 1.0)
            self.flush()
