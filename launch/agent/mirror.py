"""What an agent shows its owner of the files that only its own host sees: logs and records."""

import base64
import os
import time
from pathlib import Path

from launch.logfile import LogReader

_CHUNK_BYTES = 1 << 16  # Of a log, in one message.
_RECORD_BYTES = 1 << 20  # No record is longer.
_EVERY_SECONDS = 1.0  # Between two looks at the records.
_RECORDS = ("progress", "failure", "stacks", "exit_record")


class Mirror:
    """The files of one plan, and how much of each the owner has."""

    def __init__(self, plan):
        self._plan = plan
        self._readers = {}
        self._seen = {}  # Record -> what it looked like when it was shown.
        self._due = 0.0

    def start(self, positions):
        """Begin anew, for an owner that has so many bytes of each process's log.

        Args:
          positions: process id, as a string -> bytes; 0 where there is none.
        """
        for reader in self._readers.values():
            reader.close()
        self._readers = {
            process["process_id"]: LogReader(
                Path(process["log"]), int(positions.get(str(process["process_id"]), 0))
            )
            for process in self._plan["processes"]
        }
        self._seen = {}
        self._due = 0.0

    def new(self, whole=False):
        """What is new, as messages: at most one chunk of each log.

        Args:
          whole: look at the records at once.
        """
        now = time.monotonic()
        found = []
        if whole or now >= self._due:
            self._due = now + _EVERY_SECONDS
            found += self._new_records()
        for process_id, reader in self._readers.items():
            reader.look()
            data = reader.read(_CHUNK_BYTES)
            if data:
                text = base64.b64encode(data).decode("ascii")
                offset = reader.position - len(data)
                found.append(
                    {"event": "log", "process_id": process_id, "offset": offset, "data": text}
                )
        return found

    def _new_records(self):
        files = [process[name] for process in self._plan["processes"] for name in _RECORDS]
        if self._plan.get("complaints"):
            files.append(self._plan["complaints"])
        found = []
        for path in files:
            try:
                with open(path, "rb") as file:
                    stat = os.fstat(file.fileno())
                    looks = (stat.st_mtime_ns, stat.st_size, stat.st_ino)
                    if self._seen.get(path) == looks:
                        continue
                    data = file.read(_RECORD_BYTES)
            except OSError:
                continue
            self._seen[path] = looks
            text = data.decode("utf-8", "replace")
            found.append({"event": "file", "name": self._name(path), "text": text})
        return found

    def _name(self, path):
        """What a file is called in the owner's attempt directory."""
        return os.path.relpath(path, self._plan["folder"])
