"""What a process reports of itself."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
import textwrap
import threading

import pytest

from launch import contract
from tests.testing.gangs import ROOT


@pytest.fixture
def progress(tmp_path, monkeypatch):
    """A progress file, as a function that reads it."""
    path = tmp_path / "progress.json"
    monkeypatch.setenv(contract.PROGRESS_FILE, str(path))
    return lambda: json.loads(path.read_text())


class Clock:
    """A monotonic clock that is set by hand."""

    def __init__(self, monkeypatch):
        self.now = 100.0
        monkeypatch.setattr(contract.time, "monotonic", lambda: self.now)


def test_a_report_says_step_phase_and_where_the_time_went(progress, monkeypatch):
    clock = Clock(monkeypatch)
    for phase, step, seconds in (
        ("init", 0, 2.0),
        ("restore", 0, 3.0),
        ("compile", 40, 5.0),
        ("data", 40, 1.0),
        ("step", 40, 1.0),
        ("data", 41, 1.0),
        ("step", 41, 1.0),
    ):
        contract.report_progress(step, phase)
        clock.now += seconds
    contract.report_progress(42, "save", loss=1.5)
    clock.now += 1.0
    contract.report_progress(42, "save")
    found = progress()
    assert (found["step"], found["phase"], found["loss"]) == (42, "save", 1.5)
    assert found["first_step"] == 40  # Where it was resumed, not the 0 of before.
    assert found["seconds"] == {
        "init": 2.0,
        "restore": 3.0,
        "compile": 5.0,
        "data": 2.0,
        "step": 2.0,
        "save": 1.0,
    }


def test_a_report_that_is_shorter_than_the_last_leaves_nothing_of_it(progress):
    contract.report_progress(123456, "compile", note="x" * 500)
    contract.report_progress(1, "data", note="y")
    assert (progress()["step"], progress()["note"]) == (1, "y")


def test_a_forked_child_reports_with_a_file_of_its_own_descriptor(progress):
    program = """
        import os
        from launch import contract
        contract.report_progress(1, "step", note="the parent's")
        reporter = contract._reporters[os.environ[contract.PROGRESS_FILE]]
        reporter._lock.acquire()  # As another thread might have it at the fork.
        if os.fork() == 0:
            contract.report_progress(9)
            os._exit(0)
        os.wait()
    """
    subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=True,
        timeout=30,
    )
    assert (progress()["step"], progress()["first_step"]) == (9, 9)


def test_a_report_that_cannot_be_written_is_told_once_and_ends_nothing(
    tmp_path, monkeypatch, capfd
):
    monkeypatch.setenv(contract.PROGRESS_FILE, str(tmp_path / "no" / "progress.json"))
    for step in range(3):
        contract.report_progress(step)
    assert capfd.readouterr().err.count("progress is not reported") == 1


def test_two_threads_do_not_tear_a_report(progress):
    def report(phase):
        for step in range(2000):
            contract.report_progress(step, phase, **{f"{phase}_note": "x" * (step % 50)})

    threads = [threading.Thread(target=report, args=(phase,)) for phase in ("data", "step")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert progress()["step"] == 1999


def test_outside_of_a_gang_nothing_is_reported(monkeypatch, tmp_path):
    monkeypatch.delenv(contract.PROGRESS_FILE, raising=False)
    monkeypatch.delenv(contract.FAILURE_FILE, raising=False)
    contract.report_progress(1)
    contract.record_failure(ValueError("x"))
    assert list(tmp_path.iterdir()) == []


def test_the_first_exception_is_recorded_with_what_it_says(monkeypatch, tmp_path):
    path = tmp_path / "failure.json"
    monkeypatch.setenv(contract.FAILURE_FILE, str(path))
    error = json.JSONDecodeError("no good" + "x" * 5000, "", 0)
    try:
        raise error
    except ValueError as caught:
        contract.record_failure(caught, accuses=[1, 2])
    contract.record_failure(KeyError("later"))
    found = json.loads(path.read_text())
    assert found["type"] == "json.decoder.JSONDecodeError"
    assert found["accuses"] == [1, 2]
    assert found["message"].startswith("no good")
    assert 4000 < len(found["message"]) < 4100
    assert "characters ..." in found["message"]
    assert "test_contract.py" in found["traceback"]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_an_exception_that_cannot_be_recorded_is_told_and_raises_nothing(
    monkeypatch, tmp_path, capfd
):
    monkeypatch.setenv(contract.FAILURE_FILE, str(tmp_path / "no" / "failure.json"))
    contract.record_failure(ValueError("x"))
    assert "the exception is not recorded" in capfd.readouterr().err
    # Whoever has reported progress has a file that needs no more room.
    progress = tmp_path / "progress.json"
    monkeypatch.setenv(contract.PROGRESS_FILE, str(progress))
    contract.report_progress(7, "save")
    contract.record_failure(ValueError("x" * 5000))
    capfd.readouterr()
    contract.report_exit()
    found = json.loads(progress.read_text())
    assert (found["step"], found["phase"]) == (7, "exit")
    assert found["failure"]["type"] == "ValueError"
    assert len(found["failure"]["message"]) < 500
    assert progress.stat().st_size < 4096
