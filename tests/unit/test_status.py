"""How a run directory is told, for people and for programs."""

from __future__ import annotations

import json
import time

import pytest

from launch import live, ownership, rundir, stop
from launch.contract import utc
from launch.events import Failure, Retry, Verdict
from launch.main import main
from launch.standing import standing
from launch.status import status_report
from launch.status_text import as_text, ranges

VERDICT = Verdict(
    "exception",
    1,
    "process 1/2 on local0 failed at step 7 (data): ValueError: bad row",
    1,
    "local0",
    "Process 1/2 on local0 failed at step 7 (data): ValueError: bad row. One other ended.",
    Failure("ValueError", "bad row", "Traceback\n  deep\nValueError: bad row\n", 0.0),
    ("noise", "its last line"),
    (0,),
)


def report(attempt: ownership.Attempt, process_id: int, step: int, phase: str) -> None:
    record = {"step": step, "phase": phase, "first_step": 0, "seconds": {"step": 1.0}}
    rundir.progress_path(attempt.path, process_id).write_text(json.dumps(record))


@pytest.fixture
def run(tmp_path):
    """A run whose first attempt failed and whose second one runs."""
    made = ownership.RunDir(tmp_path / "run")
    cluster = {"backend": "local", "hosts": 1, "processes_per_host": 2, "devices_per_process": 1}
    made.write_run(command=["muster", "run", "--cluster.env.TOKEN=abc"], cluster=cluster)
    first = made.new_attempt(["local0"], 2)
    for i in range(2):
        report(first, i, 7, "data")
        rundir.log_path(first.path, i).write_text(f"output of {i}\n")
    first.close(VERDICT, Retry(True, "failure 1 of 3, again in 2.0 s", 2.0))
    second = made.new_attempt(["local0"], 2)
    report(second, 0, 9, "step")
    live.write(
        made.path,
        1,
        live.RUNNING,
        [
            live.LiveProcess(0, "local0", 11, 9, "step", 3.0),
            live.LiveProcess(1, "local0", 12, 8, "data", 63.0),
        ],
    )
    yield made
    made.release()


def test_a_running_run_is_told_with_its_gang_and_what_became_of_the_attempt_before(run, capsys):
    assert main(["status", str(run.path)]) == 0
    out = capsys.readouterr().out
    for words in (
        f"run ({run.run_id}): running",
        "local: 1 host × 2 processes × 1 device",
        "process 1 on local0 (pid 12) at step 8 (data), for 1 min",
        "attempt 0: exception",
        "ValueError: bad row",
        "its last line",
        "process 1 on local0  again",
        "--cluster.env.TOKEN=***",
    ):
        assert words in out, out
    assert "abc" not in out


def test_programs_get_the_same_as_json(run, capsys):
    assert main(["status", str(run.path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["state"], found["live"]["state"], found["owner"]["id"]) == (
        "running",
        "running",
        run.run_id,
    )
    first, second = found["attempts"]
    assert (first["cause"], first["last_step"], first["retry"]["again"]) == ("exception", 7, True)
    assert first["exception"]["type"] == "ValueError"
    assert [p["step"] for p in second["processes"]] == [9, 8]
    assert abs(sum(found["goodput"]["shares"].values()) - 1) < 1e-9


def test_a_run_whose_launcher_was_killed_between_two_attempts_is_no_success(run):
    run.release()
    found = standing(run.path)
    assert (found.state, found.running) == ("killed", False)
    run.lock_fd = ownership.RunDir(run.path).lock_fd  # For the fixture's end.


def test_waiting_for_the_next_attempt_is_told_with_the_time(run):
    live.write(run.path, 0, live.WAITING, next_attempt_at=time.time() + 42)
    assert "waiting for attempt 1, in 4" in as_text(status_report(run.path), time.time())


def test_processes_that_are_alike_are_told_in_one_line(run):
    processes = [live.LiveProcess(i, "h", i + 1, 310, "step", 1.0) for i in range(1000)]
    processes[17] = live.LiveProcess(17, "h", 18, 309, "data", 80.0)
    live.write(run.path, 1, live.RUNNING, processes)
    text = as_text(status_report(run.path), time.time())
    assert "999 processes at step 310 (step)" in text
    assert "process 17 on h (pid 18) at step 309 (data)" in text
    assert "0-16, 18-999" in text
    assert ranges([3, 1, 2, 7]) == "1-3, 7"


def test_a_request_to_stop_is_heard_once_by_the_controller_that_was_meant(run):
    ear = stop.StopRequests(run.path)
    owner = rundir.owner(run.path)
    assert ear.poll() == 0
    stop.request(run.path, owner)
    assert (ear.poll(), ear.poll()) == (1, 0)
    stop.request(run.path, owner)
    stop.request(run.path, owner)
    assert ear.poll() == 2
    stop.request(run.path, {**owner, "pid": 1})
    assert ear.poll() == 0
    assert stop.StopRequests(run.path).poll() == 0  # Nothing of what an earlier one was asked.


def test_logs_are_printed_of_one_process_or_of_all(run, capfdbinary):
    assert main(["logs", str(run.path), "--attempt=0", "--process=1"]) == 0
    assert capfdbinary.readouterr().out == b"output of 1\n"
    assert main(["logs", str(run.path), "--attempt=0", "--process=all"]) == 0
    assert capfdbinary.readouterr().out.splitlines() == [
        b"[process 0/2] output of 0",
        b"[process 1/2] output of 1",
    ]
    for flag, rule in (("--process=2", "from 0 to 1"), ("--attempt=5", "there are: 0, 1")):
        assert main(["logs", str(run.path), "--attempt=0", flag]) == 2
        assert rule.encode() in capfdbinary.readouterr().err


def test_stopping_what_does_not_run_says_how_it_ended(tmp_path, capsys):
    made = ownership.RunDir(tmp_path / "run")
    made.write_run()
    attempt = made.new_attempt(["local0"])
    attempt.close(Verdict("completed", 0), Retry(False))
    made.release()
    assert main(["stop", str(made.path)]) == 0
    assert "was not running: ended" in capsys.readouterr().err
    assert not (made.path / "stop.json").exists()


def test_a_record_of_an_older_version_is_still_told(tmp_path, capsys):
    made = ownership.RunDir(tmp_path / "run")
    made.write_run()
    made.release()
    folder = made.path / "attempts" / "000"
    folder.mkdir(parents=True)
    old = {"schema": 1, "attempt": 0, "cause": "exception", "guilty_process": 0, "message": "bad"}
    old |= {"guilty_host": "local0", "started_at": utc(0), "ended_at": utc(5)}
    (folder / "attempt.json").write_text(json.dumps(old))
    assert main(["status", str(made.path)]) == 0
    assert "bad" in capsys.readouterr().out
