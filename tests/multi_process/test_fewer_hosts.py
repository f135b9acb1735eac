"""A training that has lost a host goes on without it, from its checkpoint and at the same rows."""

from __future__ import annotations

import os
import signal

from launch import contract
from tests.testing import tiny
from tests.testing.gangs import ROOT, MusterCommand, wait_until


def test_a_training_goes_on_without_the_host_it_has_lost(tmp_path):
    muster = MusterCommand(
        tmp_path,
        hosts=2,
        processes_per_host=1,
        hosts_min=1,
        restart={"max_preemptions": 1, "backoff_seconds": 0.1, "max_backoff_seconds": 0.1},
    )
    config = f"--config={ROOT}/tests/testing/configs/tiny.py:witness"
    flags = ["--config.num_steps=120", "--config.checkpoint.every_steps=20"]
    process = muster.start(config, *flags)
    wait_until((muster.workdir / contract.CHECKPOINTS / "20").is_dir, "a checkpoint")
    os.kill(muster.agent_of("local1"), signal.SIGKILL)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    muster.check_nothing_is_left()
    first, second = muster.attempt(0), muster.attempt(1)
    assert (first["cause"], first["guilty_host"]) == ("host_lost", "local1")
    assert (second["hosts"], second["cause"], second["last_step"]) == (["local0"], "completed", 120)
    assert second["first_step"] >= 20
    assert f"goes on from step {second['first_step']}" in err
    assert "on one host instead of 2" in err
    assert "1 process(es), 1 cpu devices" in out
    state = tiny.read_state(muster.workdir, 120)
    assert int(state["model.seen"]) == tiny.fingerprint(120)
