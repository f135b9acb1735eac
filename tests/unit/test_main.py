"""The command line: mistakes get one line and code 2."""

from __future__ import annotations

import pytest

from launch.main import main
from tests.testing.gangs import ROOT

CLUSTER = "--cluster=configs/cluster/local.py"

CASES = {
    "unknown command": (["rum"], "no command 'rum'; did you mean 'run'?"),
    "no command like it": (["zzz"], "no command 'zzz'; known: certify, checkpoints, doctor, gc"),
    "unknown flag": (["run", "--wrokdir=x"], "no flag '--wrokdir=x'; did you mean 'workdir'?"),
    "detach": (["run", "--detach=yes"], "--detach='yes': takes no value"),
    "list": (["list", "x"], "muster list takes no argument; got ['x']"),
    "flag of a config": (["status", "--config=x", "y"], "no flag '--config=x'"),
    "no cluster": (["run", "--workdir=x", "--", "true"], "--cluster is missing"),
    "no program": (["run", CLUSTER, "--workdir=x"], "give either --config=FILE or -- and a"),
    "empty program": (["run", CLUSTER, "--workdir=x", "--"], "-- needs a program behind it"),
    "stray word": (["run", CLUSTER, "--workdir=x", "true"], "'true' is not expected"),
    "no workdir": (["run", CLUSTER, "--", "true"], "--workdir is missing"),
    "process": (["run", CLUSTER, "--workdir=x", "--process=2", "--", "true"], "from 0 to 1"),
    "value": (["run", CLUSTER, "--workdir"], "--workdir needs a value"),
    "no run": (["status", "/no/such"], "no run directory '/no/such'"),
    "no run directory": (["status", "/"], "'/' is no run directory: it has no run.json"),
    "two runs": (["logs", "a", "b"], "takes one RUN"),
    "no run to list": (["checkpoints"], "muster checkpoints needs a RUN, see `muster list`"),
    "no action": (["checkpoints", "/", "verfy"], "no action 'verfy'; did you mean 'verify'?"),
    "no step": (["checkpoints", "/", "delete"], "write: muster checkpoints RUN delete STEP..."),
    "no place": (["checkpoints", "/", "copy", "3"], "checkpoints RUN copy STEP DIR; got ['3']"),
    "flag of export": (["checkpoints", "/", "--ema"], "--ema: is not a flag of muster checkpoints"),
}


@pytest.mark.parametrize("name", CASES)
def test_a_wrong_command_line_gets_one_line_and_code_2(name, capsys):
    argv, message = CASES[name]
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert message in err
    assert (out, err.count("\n")) == ("", 1)


CONFIG = """
def get_config():
    return {
        "task": "trainer.tasks.x:Y", "num_steps": 3, "global_batch_size": 8,
        "mesh": {"data": 4, "fsdp": 2, "dcn_data": 1},
    }
"""

BAD_CONFIGS = {
    "mesh": (
        "--config.mesh.data=3",
        "config.mesh: data=3 * fsdp=2 = 6 devices, but the cluster has 8",
    ),
    "batch": (
        "--config.global_batch_size=9",
        "config.global_batch_size=9: must be a multiple of 8",
    ),
    "key": ("--config.num_step=9", "config.num_step: no such field; did you mean 'num_steps'?"),
    "slices": ("--config.mesh={'dcn_data': 4, 'data': 2}", "4 parts must be whole processes"),
    "both": ("--", "give either --config=FILE or -- and a program; not both"),
}


@pytest.mark.parametrize("name", BAD_CONFIGS)
def test_a_wrong_config_is_refused_before_anything_starts_or_is_written(name, capsys, tmp_path):
    (tmp_path / "config.py").write_text(CONFIG)
    override, message = BAD_CONFIGS[name]
    argv = ["run", f"--config={tmp_path}/config.py", CLUSTER, f"--workdir={tmp_path}/run", override]
    assert main(argv + ["true"] * (override == "--")) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_config_starts_the_trainer_with_absolute_paths_and_muster_on_its_path(
    capsys, tmp_path, monkeypatch
):
    (tmp_path / "config.py").write_text(CONFIG)
    root = str(ROOT)
    cluster = str(ROOT / "configs" / "cluster" / "local.py")
    monkeypatch.chdir(tmp_path)
    argv = ["run", "--config=config.py", f"--cluster={cluster}", "--workdir=run", "--dry_run"]
    assert main([*argv, "--config.num_steps", "4"]) == 0
    line = capsys.readouterr().out.splitlines()[-1]
    assert f"PYTHONPATH={root}" in line
    end = f"-m trainer.main --config={tmp_path}/config.py --config.num_steps=4 "
    assert line.endswith(f"{end}--workdir={tmp_path}/run")
    (tmp_path / "trainer.py").touch()
    assert main(argv) == 2
    assert "hides Muster's own package `trainer`" in capsys.readouterr().err


def test_help_names_every_command_and_the_exit_codes(capsys):
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(word in out for word in ("run", "list", "status", "logs", "stop", "75"))


def test_a_programs_own_help_is_not_musters(capsys, tmp_path):
    argv = ["run", CLUSTER, f"--workdir={tmp_path}", "--dry_run", "--", "prog", "--help"]
    assert main(argv) == 0
    assert "prog --help" in capsys.readouterr().out
