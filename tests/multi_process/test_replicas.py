"""One bit that flips on one device of a gang is found, and the process named."""

from __future__ import annotations

import sys

import pytest

from launch import contract
from tests.testing import tiny
from tests.testing.gangs import MusterCommand


@pytest.mark.parametrize(("processes", "named"), [(3, "process 1 is not like the others"), (2, "")])
def test_a_flipped_bit_is_found_and_the_process_named(tmp_path, processes, named):
    muster = MusterCommand(tmp_path, processes_per_host=processes)
    program = [sys.executable, "-m", "tests.testing.corrupting"]
    config = f"--config={tiny.ROOT}/tests/testing/configs/tiny.py:witness"
    flags = [f"--workdir={muster.workdir}", "--config.check_replicas_every_steps=2"]
    if processes == 3:
        flags += ["--config.global_batch_size=12"]
    done = muster.run_words([*muster.command(), "--", *program, config, *flags], cwd=tiny.ROOT)
    assert done.returncode == contract.EXIT_FAILED, done.stdout + done.stderr
    attempt = muster.attempt()
    assert attempt["cause"] == "exception"
    message = attempt["message"]
    assert "at step 4 the cop" in message
    assert "of model.up.kernel on" in message
    assert "equal at step 2" in message
    if named:
        assert attempt["guilty_process"] == 1
        assert named in message
    else:
        assert "on process 0 and process 1 differ, and of two nothing tells which" in message
    assert "compared all copies of the state in" in done.stdout
    muster.check_nothing_is_left()
