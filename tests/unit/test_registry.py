"""The user's runs, by name and by id."""

from __future__ import annotations

import shutil
import stat

import pytest

from launch import ownership, registry
from launch.main import main
from launch.spec import ConfigError


@pytest.fixture(autouse=True)
def state(tmp_path, monkeypatch):
    monkeypatch.setenv(registry.STATE_DIR, str(tmp_path / "state"))
    return tmp_path / "state"


def make_run(path):
    run = ownership.RunDir(path)
    run.write_run(command=["muster", "run"])
    registry.register(run)
    run.release()
    return run


def test_a_run_is_found_by_directory_name_id_and_the_beginning_of_its_id(tmp_path, state):
    run = make_run(tmp_path / "one")
    for name in (str(run.path), "one", run.run_id, run.run_id[:-2]):
        assert registry.find(name) == run.path
    (file,) = (state / "runs").iterdir()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_two_runs_of_one_name_are_told_apart_by_their_ids(tmp_path):
    runs = [make_run(tmp_path / folder / "same") for folder in "ab"]
    with pytest.raises(ConfigError) as caught:
        registry.find("same")
    assert all(run.run_id in str(caught.value) for run in runs)
    assert registry.find(runs[1].run_id) == runs[1].path


def test_a_name_that_is_nearly_right_gets_the_closest(tmp_path):
    make_run(tmp_path / "lm_bytes")
    with pytest.raises(ConfigError, match="did you mean 'lm_bytes'"):
        registry.find("lm_byte")


def test_a_run_that_was_deleted_is_gone_and_can_be_forgotten(tmp_path, capsys):
    run = make_run(tmp_path / "one")
    make_run(tmp_path / "two")
    shutil.rmtree(run.path)
    with pytest.raises(ConfigError, match="is gone"):
        registry.find("one")
    assert main(["list"]) == 0
    assert "gone" in capsys.readouterr().out
    assert main(["list", "--prune"]) == 0
    assert [entry.name for entry in registry.entries()] == ["two"]


def test_a_state_directory_that_cannot_be_written_is_one_warning(tmp_path, state, capsys):
    state.write_text("")
    make_run(tmp_path / "one")
    assert capsys.readouterr().err.count("\n") == 1
