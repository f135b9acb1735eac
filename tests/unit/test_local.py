"""What the local backend renders, and that starting needs no more than it says it does."""

from __future__ import annotations

import ast
import difflib
import json
import subprocess
import sys
from pathlib import Path

import launch.agent
from launch import contract
from launch.backends import host_plan, local
from launch.program import Program
from launch.spec import cluster_spec
from tests.testing.gangs import ROOT, environment

GOLDEN = ROOT / "tests" / "golden" / "local_plan.json"
RECORD = "python -m tests.unit.test_local"


def rendered() -> str:
    """The plans of two hosts with two processes each."""
    cluster = cluster_spec(
        {
            "backend": "local",
            "hosts": 2,
            "processes_per_host": 2,
            "devices_per_process": 3,
            "env": {"XLA_FLAGS": "--x", "NPROC": "4"},
            "grace_seconds": 90,
        }
    )
    program = Program(("python", "-m", "trainer.main"), {"PYTHONPATH": "/code"})
    attempt = host_plan.AttemptSpec(
        Path("/runs/one"), 7, local.host_names(cluster), "127.0.0.1:4242"
    )
    plans = local.render(cluster, program, attempt)
    for plan in plans:
        plan["hook"] = str(Path(plan["hook"]).relative_to(ROOT))
    return json.dumps(plans, indent=1) + "\n"


def test_the_local_plan_is_the_recorded_one():
    want, got = GOLDEN.read_text(), rendered()
    changes = difflib.unified_diff(want.splitlines(), got.splitlines(), "recorded", "rendered")
    assert got == want, "\n".join([*changes, f"If it is meant, record it anew: {RECORD}"])


def test_an_attempt_with_fewer_hosts_numbers_its_processes_anew():
    cluster = cluster_spec({"backend": "local", "hosts": 3, "processes_per_host": 2})
    attempt = host_plan.AttemptSpec(Path("/runs/one"), 1, ("local0", "local2"), "127.0.0.1:4242")
    plans = local.render(cluster, Program(("true",)), attempt)
    envs = [process["env"] for plan in plans for process in plan["processes"]]
    assert [plan["host"] for plan in plans] == ["local0", "local2"]
    assert [env[contract.PROCESS_ID] for env in envs] == ["0", "1", "2", "3"]
    assert [env[contract.HOST] for env in envs] == ["local0"] * 2 + ["local2"] * 2
    assert {env[contract.NUM_PROCESSES] for env in envs} == {"4"}
    assert {env["OMPI_COMM_WORLD_SIZE"] for env in envs} == {"4"}


def test_the_agent_needs_only_the_standard_library_and_python_3_9():
    folder = Path(launch.agent.__file__).parent
    files = [*folder.glob("*.py"), *(folder.parent / "hook").glob("*.py")]
    files += [Path(contract.__file__), folder.parent / "logfile.py"]
    for file in files:
        tree = ast.parse(file.read_text(), feature_version=(3, 9))
        nodes = list(ast.walk(tree))
        names = {a.name for node in nodes if isinstance(node, ast.Import) for a in node.names}
        names |= {str(node.module) for node in nodes if isinstance(node, ast.ImportFrom)}
        copied = (
            "launch.agent.",
            "launch.logfile",
            "launch.agent",
        )  # Goes along: see backends/tpu/code.py.
        others = {name for name in names if not name.startswith(copied)} - {"launch"}
        assert {name.partition(".")[0] for name in others} <= set(sys.stdlib_module_names), file
    assert len(files) > 4


def test_the_launcher_imports_neither_jax_nor_the_trainer(tmp_path):
    program = (
        "import sys, launch.main as m; "
        f"m.main(['run', '--cluster=configs/cluster/local.py', '--workdir={tmp_path}/run', "
        "'--dry_run', '--', 'true']); "
        "import launch.status, launch.listing, launch.stopping, launch.logs; "
        "bad = {'jax', 'jaxlib', 'numpy', 'flax', 'trainer'} & sys.modules.keys(); "
        "assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=environment(), check=True)


if __name__ == "__main__":
    GOLDEN.parent.mkdir(exist_ok=True)
    GOLDEN.write_text(rendered())
