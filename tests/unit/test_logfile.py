"""One process's output, read through the cuts that the agent makes in its log."""

from __future__ import annotations

import os

from launch.agent.log import Log
from launch.console import LogFollower
from launch.logfile import LogReader, segments


def written(log: Log, first: int, last: int) -> bytes:
    """Write numbered lines of ten bytes."""
    text = b"".join(b"%09d\n" % i for i in range(first, last))
    os.write(log.fd, text)
    return text


def read_all(reader: LogReader) -> bytes:
    end, data = reader.look(), b""
    while reader.position < end and (more := reader.read(1000)):
        data += more
    return data


def test_a_log_that_was_cut_once_is_read_as_if_it_had_not_been(tmp_path):
    log = Log(str(tmp_path / "log"), 60_000)
    text = written(log, 0, 2500)
    log.trim()
    assert len(segments(tmp_path / "log")) > 1
    reader = LogReader(tmp_path / "log")
    assert (read_all(reader), reader.left_out) == (text, 0)
    reader.close()
    log.close()


def test_what_was_cut_out_is_counted(tmp_path):
    log = Log(str(tmp_path / "log"), 60_000)
    text = b""
    for part in range(10):
        text += written(log, part * 2500, part * 2500 + 2500)
        log.trim()
    reader = LogReader(tmp_path / "log")
    found = read_all(reader)
    assert reader.left_out == log.dropped == len(text) - len(found) > 0
    assert text.startswith(found[:20_000])
    assert text.endswith(found[-20_000:])
    reader.close()
    log.close()


def test_a_follower_that_is_close_behind_loses_nothing(tmp_path):
    log = Log(str(tmp_path / "log"), 60_000)
    follower = LogFollower(tmp_path / "log")
    lines = []
    for part in range(60):
        written(log, part * 300, part * 300 + 300)
        lines += follower.read()
        log.trim()
    lines += follower.read(last=True)
    assert [int(line) for line in lines] == list(range(60 * 300))
    follower.close()
    log.close()


def test_a_follower_that_was_overtaken_says_so_and_goes_on_with_whole_lines(tmp_path):
    log = Log(str(tmp_path / "log"), 60_000)
    follower = LogFollower(tmp_path / "log")
    written(log, 0, 100)
    lines = follower.read()
    for part in range(10):
        written(log, 100 + part * 3000, 3100 + part * 3000)
        log.trim()
    lines += follower.read(last=True)
    notes = [line for line in lines if b"left out here" in line]
    numbers = [int(line) for line in lines if line not in notes]
    assert len(notes) == 1
    assert numbers[:100] == list(range(100))
    assert numbers[-1] == 30_099
    assert numbers == sorted(set(numbers))
    follower.close()
    log.close()


def test_a_log_that_is_not_there_yet_is_empty(tmp_path):
    reader = LogReader(tmp_path / "log")
    assert (reader.look(), reader.read(10), segments(tmp_path / "log")) == (0, b"", [])
