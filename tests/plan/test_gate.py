"""`muster run` on TPUs: the real step is compiled for the real topology before gcloud is asked."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from launch import contract
from tests.testing.gangs import ROOT, TIMEOUT_SECONDS, environment
from tests.testing.plans import Files


@pytest.fixture
def muster(tmp_path):
    """Runs muster with configs/wide.py on four chips; gcloud only notes what it is asked."""
    files = Files(tmp_path)

    def run(command, *words):
        config = f"--config={ROOT}/tests/testing/configs/wide.py"
        argv = [command, config, f"--cluster={files.cluster}", *words]
        env = {**environment(), "PATH": files.path, "MUSTER_CACHE_DIR": str(tmp_path / "cache")}
        return subprocess.run(
            [sys.executable, "-m", "launch", *argv],
            cwd=ROOT, env=env, capture_output=True, text=True, timeout=TIMEOUT_SECONDS, check=False,
        )  # fmt: skip

    run.files = files
    return run


def test_what_cannot_fit_is_refused_before_gcloud_is_asked_and_what_fits_goes_on(muster):
    files = muster.files
    words = (f"--workdir={files.workdir}",)
    done = muster("run", *words)
    assert done.returncode == contract.EXIT_CONFIG, done.stderr
    assert "the training step does not fit 1 × v5litepod-4" in done.stderr
    assert "model.all_LIO" in done.stderr  # Of the report: what takes the most.
    assert files.asked() == ""
    assert not files.workdir.exists()

    done = muster("run", *words, "--config.mesh.fsdp=4")
    assert "muster: the training step fits: " in done.stderr
    assert "(planned in " in done.stderr
    assert "muster: error: gcloud" in done.stderr
    assert "gcloud" in files.asked()

    done = muster("run", *words, "--config.mesh.fsdp=4")
    assert "(planned before)" in done.stderr
    done = muster("plan", "--config.mesh.fsdp=4", "--json")
    assert done.returncode == contract.EXIT_DONE
    assert done.stderr == ""
    record = json.loads(done.stdout)
    assert record["fits"]
    assert record["argument_bytes"] >= 4 << 30
    done = muster("plan")
    assert done.returncode == contract.EXIT_CONFIG
    assert done.stderr == ""
    assert "model.all_LIO" in done.stdout
