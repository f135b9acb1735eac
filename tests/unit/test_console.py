"""Following logs in bounded memory."""

from __future__ import annotations

from launch import rundir
from launch.console import Console, LogFollower, last_lines


def test_lines_come_once_and_an_unfinished_one_waits_for_its_end(tmp_path):
    log = tmp_path / "log"
    follower = LogFollower(log)
    assert follower.read() == []
    log.write_bytes(b"one\ntw")
    assert follower.read() == [b"one"]
    with log.open("ab") as file:
        file.write(b"o\nrest")
    assert follower.read() == [b"two"]
    assert follower.read(last=True) == [b"rest"]
    assert follower.read(last=True) == []
    follower.close()


def test_a_follower_that_is_far_behind_skips_to_whole_lines_and_says_how_much(tmp_path):
    log = tmp_path / "log"
    log.write_bytes(b"".join(b"%09d\n" % i for i in range(1_000_000)))
    follower = LogFollower(log)
    note, *lines = follower.read()
    assert note == b"[9.9 MB not shown; all of it is in %s]" % str(log).encode()
    assert [int(line) for line in lines] == list(range(1_000_000 - len(lines), 1_000_000))
    assert len(lines) > 1000
    follower.close()


def test_a_line_without_an_end_does_not_gather_in_memory(tmp_path):
    log = tmp_path / "log"
    log.write_bytes(b"x" * 1_000_000)
    follower = LogFollower(log)
    assert sum(map(len, follower.read())) == 1_000_000
    assert follower.read(last=True) == []
    follower.close()


def test_the_last_lines_of_a_large_log_are_found(tmp_path):
    log = tmp_path / "log"
    log.write_text("first\n" + "x" * 500_000 + "\nlast but one\n\nlast\n")
    assert last_lines(log, 2) == ["last but one", "last"]
    assert last_lines(tmp_path / "none", 2) == []


def test_lines_held_back_come_when_they_are_asked_for_and_not_before(tmp_path, capfdbinary):
    log = rundir.log_path(tmp_path, 0)
    log.parent.mkdir(parents=True, exist_ok=True)
    log.write_bytes(b"one\nerror: two\nthree\n")
    console = Console([0], prefixed=False, held_back=b"error: ")
    console.follow(tmp_path, 1)
    console.show_new(last=True)
    assert capfdbinary.readouterr().out == b"one\nthree\n"
    console.show_held()
    console.show_held()
    assert capfdbinary.readouterr().out == b"error: two\n"
