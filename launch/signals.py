"""Signals to a process that has something better to do than to die of them."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager


class Signals:
    """Signals that came, in order; `caught` makes a descriptor ready when one does.

    Attributes:
      suspensions: how often the terminal wanted to suspend this process (Ctrl-Z).
    """

    def __init__(self) -> None:
        self.suspensions = 0
        self._numbers: list[int] = []

    def take(self) -> list[int]:
        """Those that came since the last call."""
        taken = []
        while self._numbers:  # One by one: another may come at any moment.
            taken.append(self._numbers.pop(0))
        return taken

    @contextmanager
    def caught(self, numbers: Sequence[int]) -> Iterator[int]:
        """Note these signals; gives a descriptor that they make ready, to be read empty."""
        read_end, write_end = os.pipe()
        os.set_blocking(write_end, False)
        before = {}

        def note(number: int, _: object) -> None:
            self._numbers.append(number)

        def note_suspension(*_: object) -> None:
            self.suspensions += 1

        for number in numbers:
            if signal.getsignal(number) is not signal.SIG_IGN:  # nohup, or `&` in a script
                before[number] = signal.signal(number, note)
        before[signal.SIGTSTP] = signal.signal(signal.SIGTSTP, note_suspension)
        signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
        try:
            yield read_end
        finally:
            signal.set_wakeup_fd(-1)
            for number, handler in before.items():
                signal.signal(number, handler)
            os.close(read_end)
            os.close(write_end)
