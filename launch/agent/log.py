"""One process's output on disk, bounded while it is being written."""

import ctypes
import os

_FALLOC_FL_COLLAPSE_RANGE = 8
_LAST_LINES = 80  # After an abort, C++ prints some 50 lines behind the traceback.
_LINE_CHARACTERS = 500
_TAIL_BYTES = 1 << 16
_COPY_BYTES = 1 << 20


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

    def trim(self):
        """Cut the live file where it has grown too long."""
        size = os.fstat(self.fd).st_size
        if size <= self._segment_bytes:
            return
        # Whole blocks, and not the last: so much can be cut from a file's beginning at once.
        block = os.fstatvfs(self.fd).f_bsize
        length = (size - 1) // block * block
        newest = self._keep(length)
        if not _collapse(self.fd, length):
            length = self._copy_and_truncate(newest, length)
        self._start += length

    def last_lines(self):
        """The last lines that are not empty."""
        size = os.fstat(self.fd).st_size
        data = os.pread(self.fd, _TAIL_BYTES, max(0, size - _TAIL_BYTES))
        if size < _TAIL_BYTES and self._start:
            with open(self._previous or self.path + ".0", "rb") as file:
                data = file.read()[-_TAIL_BYTES:] + data
        lines = data.decode("utf-8", "replace").splitlines()
        return [line[:_LINE_CHARACTERS] for line in lines if line.strip()][-_LAST_LINES:]

    def close(self):
        """Give the file back."""
        os.close(self.fd)

    def _keep(self, length):
        """Copy what is kept of the live file's first `length` bytes; the newest segment's name."""
        behind, newest = 0, self._previous or self.path + ".0"
        if self._start == 0:
            behind = min(length, self._segment_bytes)
            self._copy(self.path + ".0", 0, behind)
        first = max(behind, length - self._segment_bytes)
        if first < length:
            newest = "%s.%d" % (self.path, self._start + first)
            self._copy(newest, first, length)
            self.dropped += first - behind
            if self._previous:
                self.dropped += os.path.getsize(self._previous)
                os.unlink(self._previous)
            self._previous = newest
        return newest

    def _copy(self, path, first, last):
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "wb") as file:
            while first < last:
                data = os.pread(self.fd, min(_COPY_BYTES, last - first), first)
                if not data:
                    break
                file.write(data)
                first += len(data)

    def _copy_and_truncate(self, newest, length):
        """Where a file cannot be cut in front; what is written in the very moment is lost."""
        while True:
            size = os.fstat(self.fd).st_size
            if size <= length:
                os.ftruncate(self.fd, 0)
                return length
            self._copy(newest, length, size)
            length = size


def _collapse(fd, length):
    """Remove a file's first bytes, whatever is being appended to it; False if it cannot be."""
    fallocate = getattr(ctypes.CDLL(None), "fallocate", None)
    if fallocate is None:
        return False
    fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
    return fallocate(fd, _FALLOC_FL_COLLAPSE_RANGE, 0, length) == 0
