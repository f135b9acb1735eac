"""Processes that are told to stop agree on one unit, wherever each of them is."""

from __future__ import annotations

import os
import random
import threading
import time

import pytest

from launch import contract
from trainer.preemption import Stopped, StopSignal


class Service:
    """A coordination service's keys and values."""

    def __init__(self) -> None:
        self._values: dict[str, str] = {}
        self._changed = threading.Condition()

    def key_value_set(self, key: str, value: str, allow_overwrite: bool = False) -> None:
        with self._changed:
            self._values[key] = value
            self._changed.notify_all()

    def key_value_try_get(self, key: str) -> str:
        return self._values[key]

    def blocking_key_value_get(self, key: str, timeout_ms: int) -> str:
        with self._changed:
            if not self._changed.wait_for(lambda: key in self._values, timeout_ms / 1000):
                raise TimeoutError(key)
            return self._values[key]


class Gang:
    """StopSignals of processes that are threads of this one: they hear of a stop by its key."""

    def __init__(self, num: int):
        self.service = Service()
        self.signals = [StopSignal() for _ in range(num)]
        for process, signal in enumerate(self.signals):
            signal._wakeup = os.pipe()
            signal.join(self.service, process, num)
            signal._thread.start()

    def stop(self) -> None:
        self.service.key_value_set("muster/stop/notice", "0")

    def end(self) -> None:
        for signal in self.signals:
            signal._closed.set()
            signal._thread.join()
            for fd in signal._wakeup:
                os.close(fd)


@pytest.mark.parametrize("seed", range(3))
def test_all_stop_at_the_same_unit_and_none_waits_for_one_that_cannot_end(seed):
    """A unit ends once all have begun it; a process waits for ends at places of its own."""
    rng = random.Random(seed)
    gang = Gang(5)
    begun = [0] * 5
    delays = [[rng.random() * 0.004 for _ in range(50)] for _ in range(5)]

    def main(process: int) -> None:
        signal = gang.signals[process]
        signal.enter_loop()
        while not signal.begin():
            begun[process] += 1
            time.sleep(delays[process][begun[process] % 50])
            if begun[process] % (process + 2) == 0:  # Reads metrics, say.
                while min(begun) < begun[process]:
                    time.sleep(0.0005)

    threads = [threading.Thread(target=main, args=(i,), daemon=True) for i in range(5)]
    for thread in threads:
        thread.start()
    time.sleep(rng.random() * 0.2)
    gang.stop()
    for thread in threads:
        thread.join(timeout=20)
    assert not any(thread.is_alive() for thread in threads), begun
    assert len(set(begun)) == 1, begun
    gang.end()


def heard(gang: Gang) -> None:
    """Stop, and wait until all have heard of it."""
    gang.stop()
    deadline = time.monotonic() + 20
    while not all(signal._frozen for signal in gang.signals) and time.monotonic() < deadline:
        time.sleep(0.01)


def test_what_one_has_begun_the_others_go_on_to_and_wait_for_nothing_more():
    gang = Gang(3)
    for signal in gang.signals:
        signal.enter_loop()
    assert not gang.signals[2].begin()
    heard(gang)
    assert [signal.begin() for signal in gang.signals] == [False, False, True]
    assert [signal.begin() for signal in gang.signals] == [True, True, True]
    for signal in gang.signals:
        with pytest.raises(Stopped), signal.waiting():
            raise AssertionError("it waits")
    gang.end()


def test_the_time_that_is_left_is_the_launchers_word(tmp_path, monkeypatch):
    assert StopSignal.seconds_left() is None
    monkeypatch.setenv(contract.DEADLINE_FILE, str(tmp_path / "deadline.json"))
    assert StopSignal.seconds_left() is None
    contract.record_deadline(str(tmp_path / "deadline.json"), 30.0)
    left = StopSignal.seconds_left()
    assert left is not None
    assert 0 < left <= 30
