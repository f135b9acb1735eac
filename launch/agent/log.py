"""One process's output on disk, bounded while it is being written."""

import ctypes
import os

_FALLOC_FL_COLLAPSE_RANGE = 8
_LAST_LINES = 80  # After an abort, C++ prints some 50 lines behind the traceback.
_LINE_CHARACTERS = 500
_TAIL_BYTES = 1 << 16
_COPY_BYTES = 1 << 20
# What Python's faulthandler writes when a signal ends the process.
_ABORT = "Fatal Python error:"
_STACKS = (
    *("Thread 0x", "Current thread 0x", "  File ", "  <no Python frame>", "  ..."),
    *("Python runtime state:", "Extension modules:"),
)


class Log:
    """One process's log, to which the process itself writes: its beginning and its end are kept.

    What is cut out of the live file goes to segments beside it, named by the offset of their first
    byte in the whole output: `LOG.0`, the beginning, and the last one before the live file.
    """

    def __init__(self, path, max_bytes):
        self.path = path
        self.dropped = 0  # Bytes of the output that are kept nowhere.
        self._segment_bytes = max_bytes // 3
        self._start = 0  # Offset of the live file's first byte in the whole output.
        self._previous = None  # The newest segment but `LOG.0`.
        self.fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
        self._find_segments()

    def _find_segments(self):
        """Go on with a log that somebody has begun."""
        folder, name = os.path.split(self.path)
        ends = [other[len(name) + 1 :] for other in os.listdir(folder) if other.startswith(name)]
        offsets = [int(end) for end in ends if end.isdigit()]
        if offsets:
            newest = "%s.%d" % (self.path, max(offsets))
            self._start = max(offsets) + os.path.getsize(newest)
            self._previous = newest if max(offsets) else None

    @property
    def end(self):
        """How much of the output there has been."""
        return self._start + os.fstat(self.fd).st_size

    def skip_to(self, offset):
        """Leave out what comes before this byte of the output; for a log that nobody else writes
        to."""
        self._keep(0, os.fstat(self.fd).st_size)
        os.ftruncate(self.fd, 0)
        # An empty segment: where the log itself begins is where the one before it ends.
        self._previous = "%s.%d" % (self.path, offset)
        os.close(os.open(self._previous, os.O_WRONLY | os.O_CREAT, 0o600))
        self.dropped += offset - self._start
        self._start = offset

    def trim(self):
        """Cut the live file where it has grown too long."""
        size = os.fstat(self.fd).st_size
        if size <= self._segment_bytes:
            return
        # Whole blocks, and not the last: so much can be cut from a file's beginning at once.
        block = os.fstatvfs(self.fd).f_bsize
        length = (size - 1) // block * block
        self._keep(0, length)
        if not _collapse(self.fd, length):
            length = self._copy_and_truncate(length)
        self._start += length

    def last_lines(self):
        """The last lines that are not empty, without the stacks of an abort: they would be all, and
        what was said before them is the reason."""
        size = os.fstat(self.fd).st_size
        data = os.pread(self.fd, _TAIL_BYTES, max(0, size - _TAIL_BYTES))
        if size < _TAIL_BYTES and self._start:
            with open(self._previous or self.path + ".0", "rb") as file:
                data = file.read()[-_TAIL_BYTES:] + data
        lines = data.decode("utf-8", "replace").splitlines()
        said = [line[:_LINE_CHARACTERS] for line in lines if line.strip()]
        return list(_without_stacks(said))[-_LAST_LINES:]

    def close(self):
        """Give the file back."""
        os.close(self.fd)

    def _keep(self, begin, end):
        """Copy what is kept of these bytes of the live file."""
        behind = begin
        if self._start + begin == 0:
            behind = min(end, self._segment_bytes)
            self._copy(self.path + ".0", 0, behind)
        first = max(behind, end - self._segment_bytes)
        if first < end:
            newest = "%s.%d" % (self.path, self._start + first)
            self._copy(newest, first, end)
            self.dropped += first - behind
            if self._previous:
                self.dropped += os.path.getsize(self._previous)
                os.unlink(self._previous)
            self._previous = newest

    def _copy(self, path, first, last):
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "wb") as file:
            while first < last:
                data = os.pread(self.fd, min(_COPY_BYTES, last - first), first)
                if not data:
                    break
                file.write(data)
                first += len(data)

    def _copy_and_truncate(self, length):
        """Where a file cannot be cut in front; what is written in the very moment is lost."""
        while True:
            size = os.fstat(self.fd).st_size
            if size <= length:
                os.ftruncate(self.fd, 0)
                return length
            # Written meanwhile. Whoever writes much must not make the newest segment grow for ever.
            newest = self._previous or self.path + ".0"
            if os.path.getsize(newest) + size - length <= 1.5 * self._segment_bytes:
                self._copy(newest, length, size)
            else:
                self._keep(length, size)
            length = size


def _without_stacks(lines):
    within = False
    for line in lines:
        within = line.startswith(_ABORT) or (within and line.startswith(_STACKS))
        if not within or line.startswith(_ABORT):
            yield line


def _collapse(fd, length):
    """Remove a file's first bytes, whatever is being appended to it; False if it cannot be."""
    fallocate = getattr(ctypes.CDLL(None), "fallocate", None)
    if fallocate is None:
        return False
    fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
    return fallocate(fd, _FALLOC_FL_COLLAPSE_RANGE, 0, length) == 0
