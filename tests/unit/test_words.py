"""The last words on an attempt."""

from __future__ import annotations

from launch import rundir
from launch.events import Retry, Verdict
from launch.words import last_words

NO_MORE = Retry(again=False)


def test_a_config_error_is_told_in_the_programs_own_last_error_line(tmp_path):
    log = rundir.log_path(tmp_path, 1)
    log.write_text("noise\nerror: config.x=1: must be 2\n")
    verdict = Verdict("config", 2, "process 1/2 exited with code 2", 1, "h", "a long story")
    assert last_words(verdict, NO_MORE, tmp_path) == ["muster: error: config.x=1: must be 2"]
    log.write_text("noise\n")
    (text,) = last_words(verdict, NO_MORE, tmp_path)
    assert "process 1/2 exited with code 2" in text
    assert "    noise" in text


def test_the_guilty_process_is_told_with_its_own_lines_and_what_follows(tmp_path):
    story = "word " * 50
    verdict = Verdict("exception", 1, "process 1/2 raised", 1, "h", story, last_lines=("a", "b"))
    retry = Retry(again=True, why="failure 1 of 3, again in 2 s", delay_seconds=2.0)
    first, second = last_words(verdict, retry, tmp_path)
    assert first.splitlines()[0] == "muster: error: process 1/2 raised"
    assert first.splitlines()[-4:] == [
        "muster: last lines of process 1:",
        "    a",
        "    b",
        f"muster: full log: {rundir.log_path(tmp_path, 1)}",
    ]
    assert max(map(len, first.splitlines()[1:-1])) <= 100
    assert second == "muster: failure 1 of 3, again in 2 s"


def test_a_lost_host_is_told_with_what_its_agent_said(tmp_path):
    rundir.agent_log_path(tmp_path, "h7").write_text("cannot write\n")
    verdict = Verdict("host_lost", 1, "host h7 was lost", guilty_host="h7")
    (text,) = last_words(verdict, NO_MORE, tmp_path)
    assert "    cannot write" in text


def test_an_attempt_that_nobody_ruined_is_told_in_one_line(tmp_path):
    assert last_words(Verdict("completed", 0), NO_MORE, tmp_path) == ["muster: completed"]
