"""Processes that are not about to run the same training end before the first step, and say why."""

from __future__ import annotations

import pytest

from tests.testing.gangs import ROOT, MusterCommand


@pytest.mark.parametrize(
    ("odd", "told"),
    [
        ("config", "config.seed is 4 on process 1, 3 on the others"),
        ("package", "flax is 0.0.1 on process 1, "),
        ("program", "the compiled training step differs on process 1"),
    ],
)
def test_of_three_processes_the_one_that_differs_is_named_with_what_differs(odd, told, tmp_path):
    muster = MusterCommand(tmp_path, processes_per_host=3, restart={"max_failures": 3})
    done = muster.run(f"--config={ROOT}/tests/testing/odd.py:{odd}")
    muster.check_nothing_is_left()
    assert done.returncode == 2, done.stderr
    assert "muster: error: the processes are not about to run the same training" in done.stderr
    assert told in done.stderr
    assert "step 1/" not in done.stdout
    record = muster.attempt()
    assert (record["cause"], record["guilty_process"]) == ("config", 1), record
    assert not (muster.workdir / "attempts" / "001").exists()
