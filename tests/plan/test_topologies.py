"""Every kind of TPU, from four chips to whole pods and two slices; and what cannot be planned."""

import json
import os
import subprocess
import sys

import pytest

from launch.spec import ConfigError, cluster_spec
from tests.plan.conftest import TINY_MLP, tpu
from tests.testing.tiny import ROOT
from trainer.plan import target


@pytest.mark.parametrize(
    ("accelerator", "name", "devices"),
    [
        ("v5litepod-1", "v5e:1x1", 1),
        ("v5litepod-4", "v5e:2x2", 4),
        ("v5litepod-8", "v5e:2x4", 8),
        ("v5litepod-256", "v5e:16x16", 256),
        ("v6e-16", "v6e:4x4", 16),
        ("v5p-16", "v5p:2x2x2", 8),
        ("v5p-128", "v5p:4x4x4", 64),
        ("v4-8", "v4:2x2x1", 4),
    ],
)
def test_a_step_compiles_for(planned, accelerator, name, devices):
    plan = planned(TINY_MLP, tpu(accelerator), mesh={"data": -1})
    assert plan["target"]["name"] == f"{accelerator} ({name})"
    assert plan["target"]["devices"] == devices
    assert plan["fits"] is True
    assert plan["simulated"] is False
    # Data parallel: all that moves are gradients (and the loss), along `data`.
    assert {tuple(row["axes"]) for row in plan["collectives"]} == (
        set() if devices == 1 else {("data",)}
    )
    assert plan["step_seconds_bound"] > 0


def test_two_slices(planned):
    mesh = {"data": 1, "fsdp": 4, "dcn_data": 2}
    plan = planned(TINY_MLP, tpu("v5litepod-4", slices=2), mesh=mesh)
    assert plan["target"]["name"] == "2 slices of v5litepod-4 (v5e:2x2)"
    assert plan["link_bytes"]["dcn"] > 0
    assert {row["link"] for row in plan["collectives"] if row["axes"] == ["data"]} == {"dcn"}
    assert plan["bounds"]["dcn"] == plan["link_bytes"]["dcn"] / 3.125e9


def run_plan(*argv: str, **env: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "trainer.plan", *argv],
        cwd=ROOT,
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_the_command_line_prints_and_writes(tmp_path):
    done = run_plan(
        "--config=configs/regression.py",
        "--cluster=configs/cluster/tpu_v5e_16.py",
        "--json",
        f"--output={tmp_path}",
    )
    assert (done.returncode, done.stderr) == (0, "")
    record = json.loads(done.stdout)
    assert record == json.loads((tmp_path / "plan.json").read_text())
    assert record["target"]["devices"] == 16
    text = (tmp_path / "plan.txt").read_text()
    assert text.startswith("plan for v5litepod-16 (v5e:4x4)")
    assert "no step is quicker than" in text


def test_a_mesh_that_does_not_fit_is_one_line():
    done = run_plan(
        "--config=configs/regression.py",
        "--cluster=configs/cluster/tpu_v5e_16.py",
        "--config.mesh.fsdp=3",
    )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "16 devices" in done.stderr
    assert "fsdp=3" in done.stderr


def test_without_libtpu_there_is_one_line(monkeypatch):
    find_spec = target.importlib.util.find_spec
    monkeypatch.setattr(
        target.importlib.util,
        "find_spec",
        lambda name: None if name == "libtpu" else find_spec(name),
    )
    with pytest.raises(ConfigError, match=r"libtpu is not installed: pip install 'jax\[tpu\]'"):
        target.make_target(cluster_spec(tpu("v5litepod-4")))


def test_a_topology_that_the_compiler_does_not_know_is_one_line(monkeypatch):
    from jax.experimental import topologies

    known = topologies.get_topology_desc
    monkeypatch.setattr(
        topologies,
        "get_topology_desc",
        lambda topology_name, **more: known(
            topology_name=topology_name.replace("v5e", "v9"), **more
        ),
    )
    with pytest.raises(ConfigError, match=r"does not know the topology v5e:2x2: .*v9") as found:
        target.make_target(cluster_spec(tpu("v5litepod-4")))
    assert "\n" not in str(found.value)
