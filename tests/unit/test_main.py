"""The command line: mistakes get one line and code 2."""

from __future__ import annotations

import pytest

from launch.main import main

CLUSTER = "--cluster=configs/cluster/local.py"

CASES = {
    "unknown command": (["rum"], "no command 'rum'; did you mean 'run'?"),
    "later command": (["plan"], "no command 'plan'; known: logs, run, status"),
    "unknown flag": (["run", "--wrokdir=x"], "no flag '--wrokdir=x'; did you mean 'workdir'?"),
    "detach": (["run", "--detach"], "no flag '--detach'; known:"),
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
}


@pytest.mark.parametrize("name", CASES)
def test_a_wrong_command_line_gets_one_line_and_code_2(name, capsys):
    argv, message = CASES[name]
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert message in err
    assert (out, err.count("\n")) == ("", 1)


def test_help_names_every_command_and_the_exit_codes(capsys):
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(word in out for word in ("muster run", "muster status", "muster logs", "75"))


def test_a_programs_own_help_is_not_musters(capsys, tmp_path):
    argv = ["run", CLUSTER, f"--workdir={tmp_path}", "--dry_run", "--", "prog", "--help"]
    assert main(argv) == 0
    assert "prog --help" in capsys.readouterr().out
