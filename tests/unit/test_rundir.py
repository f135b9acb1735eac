"""The run directory: ownership, records, permissions."""

from __future__ import annotations

import errno
import json
import os
import stat
import time

import pytest

from launch import contract, ownership, patience, rundir
from launch.events import Retry, Verdict
from launch.spec import ConfigError


def test_a_directory_in_use_is_refused_and_free_again_afterwards(tmp_path):
    first = ownership.RunDir(tmp_path / "run")
    with pytest.raises(ConfigError, match=f"in use by run {first.run_id} on host"):
        ownership.RunDir(tmp_path / "run")
    assert rundir.owner(first.path)["id"] == first.run_id
    first.write_run()
    first.release()
    assert rundir.owner(first.path) is None
    again = ownership.RunDir(tmp_path / "run")
    assert again.run_id == first.run_id
    again.release()


def test_a_directory_that_cannot_be_made_is_refused_in_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be used as a run directory: Not a directory"):
        ownership.RunDir(tmp_path / "file" / "run")


def test_records_and_folders_are_their_owners_alone(tmp_path):
    run = ownership.RunDir(tmp_path / "run")
    run.write_run(command=["muster", "--token=x"])
    attempt = run.new_attempt(["local0"])
    folders = (run.path, attempt.path)
    files = (run.path / contract.RUN_RECORD, attempt.path / rundir.ATTEMPT_RECORD)
    assert [stat.S_IMODE(path.stat().st_mode) for path in folders] == [0o700] * 2
    assert [stat.S_IMODE(path.stat().st_mode) for path in files] == [0o600] * 2
    run.release()


def test_an_attempt_without_an_end_is_closed_by_the_next_one(tmp_path):
    run = ownership.RunDir(tmp_path / "run")
    first = run.new_attempt(["local0"])
    exit_record = {"schema": 1, "process_id": 0, "ended_at": "2030-01-01T00:00:00Z"}
    rundir.log_path(first.path, 0).touch()
    rundir.exit_path(first.path, 0).write_text(json.dumps(exit_record))
    progress = {"step": 9, "first_step": 4}
    rundir.progress_path(first.path, 0).write_text(json.dumps(progress))
    second = run.new_attempt(["local0"])
    record = rundir.read_record(first.path / rundir.ATTEMPT_RECORD)
    assert (record["cause"], record["ended_at"]) == ("killed", "2030-01-01T00:00:00Z")
    assert (record["first_step"], record["last_step"]) == (4, 9)
    assert (second.number, rundir.attempt_numbers(run.path)) == (1, [0, 1])
    run.release()


def test_how_long_it_all_took_does_not_depend_on_the_wall_clock(tmp_path, monkeypatch):
    run = ownership.RunDir(tmp_path / "run")
    first = run.new_attempt(["local0"])
    monkeypatch.setattr(time, "time", lambda: 1e9)  # Set back by decades.
    first.close(Verdict("killed", 1), Retry(True))
    second = run.new_attempt(["local0"])
    ends = [("2030-01-01T00:00:00Z", "2030-01-01T00:00:05Z"), (None, "2030-01-01T00:00:09Z")]
    for number, (started, ended) in enumerate(ends):
        rundir.log_path(second.path, number).touch()
        record = {"started_at": started, "ended_at": ended}
        rundir.exit_path(second.path, number).write_text(json.dumps(record))
    run.close_abandoned()
    run.release()
    # Another `muster run` knows as well how long ago that was.
    run = ownership.RunDir(tmp_path / "run")
    run.new_attempt(["local0"])
    records = [rundir.attempt_record(run.path, number) for number in range(3)]
    assert 0 <= records[0]["wall_seconds"] < 60
    assert 0 <= records[1]["waited_seconds"] < 60
    assert records[0]["waited_seconds"] is None
    assert records[1]["wall_seconds"] == 5.0
    assert 0 <= records[2]["waited_seconds"] < 60
    run.release()


def test_a_disk_that_takes_nothing_for_a_while_does_not_end_a_run(tmp_path, monkeypatch, capsys):
    run = ownership.RunDir(tmp_path / "run")
    attempt = run.new_attempt(["local0"])
    write, refused = rundir.write_private, []

    def full(path, record):
        if len(refused) < 2:
            refused.append(path)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(path, record)

    monkeypatch.setattr(rundir, "write_private", full)
    attempt.close(Verdict("exception", 1, "no space"), Retry(True))
    assert len(refused) == 2
    assert rundir.attempt_record(run.path, 0)["cause"] == "exception"
    assert capsys.readouterr().err.count("No space left on device; trying for 120 s") == 1
    # It has an end, without a traceback.
    refused.clear()
    monkeypatch.setattr(patience, "PATIENCE_SECONDS", 0.0)
    with pytest.raises(ConfigError, match=r"attempt.json.*No space left on device; make room"):
        run.new_attempt(["local0"])
    # Nothing else is waited for.
    monkeypatch.setattr(patience, "PATIENCE_SECONDS", 1e9)
    with pytest.raises(PermissionError):
        patience.patiently(_deny, run.path)
    run.release()


def _deny() -> None:
    raise PermissionError(errno.EPERM, "no")


def test_another_config_is_refused_with_its_differences_and_a_longer_run_is_not(tmp_path):
    config = {"num_steps": 5, "seed": 0}
    (tmp_path / contract.CONFIG_RECORD).write_text(json.dumps({"schema": 1, **config}))
    rundir.check_config(tmp_path, {**config, "num_steps": 50})
    with pytest.raises(ConfigError, match=r"config\.seed: 0 there, 1 now") as caught:
        rundir.check_config(tmp_path, {**config, "seed": 1})
    assert "num_steps" not in str(caught.value)
