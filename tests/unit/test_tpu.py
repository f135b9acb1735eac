"""The TPU backend without any cloud: what it would run, what errors mean, what goes to the hosts.

Record the golden files anew with `python -m tests.unit.test_tpu`.
"""

import base64
import contextlib
import difflib
import io
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from launch import contract, registry, rundir
from launch.backends.tpu import acquire, code, commands, gcloud, ledger, link, reach, remote, states
from launch.backends.tpu.nodes import Node, node_of, queued_of
from launch.logfile import LogReader
from launch.program import Program
from launch.request import Request
from launch.spec import ConfigError, cluster_spec, load_config
from tests.testing.gangs import ROOT

GOLDEN = ROOT / "tests" / "golden"
CLUSTERS = {
    "v4": {"accelerator": "v4-16"},
    "v5e": {"accelerator": "v5litepod-16", "tpu": {"provisioning": "spot"}},
    "v5p": {"accelerator": "v5p-16", "tpu": {"provisioning": "reserved", "tags": ("a", "b")}},
    "v6e": {"accelerator": "v6e-8", "tpu": {"network": "net", "internal_ips": True}},
    "v4_x2": {"accelerator": "v4-8", "slices": 2},
    "v5e_x2": {"accelerator": "v5litepod-16", "slices": 2},
    "v5p_x2": {"accelerator": "v5p-16", "slices": 2, "tpu": {"way": "direct"}},
    "v6e_x2": {"accelerator": "v6e-16", "slices": 2, "tpu": {"runtime_version": "mine"}},
    "nodes": {
        "accelerator": "v5litepod-16",
        "tpu": {"nodes": ("my-tpu",), "project": "my-project"},
    },
}


def cluster_of(**fields):
    tpu = {"zones": ("us-west4-a", "us-east5-b"), "storage": "gs://bucket/runs"}
    section = {**tpu, **fields.pop("tpu", {})}
    if "nodes" in section:
        section["zones"] = ("us-west4-a",)
    env = {"API_TOKEN": "hush", "LEVEL": "1"}
    return cluster_spec({"backend": "tpu", "env": env, **fields, "tpu": section})


def rendered(name: str) -> str:
    """What a dry run prints for one of CLUSTERS, of a program of the user's own."""
    cluster = cluster_of(**json.loads(json.dumps(CLUSTERS[name]), object_hook=_with_tuples))
    program = Program(("python", "train.py", "--lr=1e-3"))
    request = Request(cluster, program, Path("/runs/first"), None, (), (0,), False)
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        remote.dry_run(request)
    return out.getvalue()


def _with_tuples(record):
    return {k: tuple(v) if isinstance(v, list) else v for k, v in record.items()}


@pytest.mark.parametrize("name", CLUSTERS)
def test_a_dry_run_is_as_recorded(name, monkeypatch):
    monkeypatch.setattr("launch.rundir.user_name", lambda: "user")
    file = GOLDEN / f"tpu_{name}.txt"
    before, now = file.read_text().splitlines(), rendered(name).splitlines()
    difference = "\n".join(difflib.unified_diff(before, now, "recorded", "now", lineterm=""))
    assert not difference, f"{difference}\nrecord anew: python -m tests.unit.test_tpu"


def test_no_secret_is_in_a_dry_run():
    assert "hush" not in rendered("v5e")


def test_a_tpu_finds_its_place_by_its_own_metadata_and_a_cpu_by_ours():
    chips, cpus = (
        cluster_of(accelerator="v5litepod-8"),
        cluster_of(accelerator="v5litepod-8", devices_per_process=1, env={"JAX_PLATFORMS": "cpu"}),
    )
    program = Program(("python", "x.py"))
    env = [
        remote.rendered(cluster, program, {}, None, "run")[0]["processes"][0]["env"]
        for cluster in (chips, cpus)
    ]
    assert not any(name.startswith("OMPI_") for name in env[0])
    assert env[0]["JAX_PLATFORMS"] == "tpu"
    assert env[1]["OMPI_COMM_WORLD_RANK"] == "0"
    assert env[1]["JAX_PLATFORMS"] == "cpu"
    assert all(contract.COORDINATOR_ADDRESS in one for one in env)


@pytest.mark.parametrize("name", ["v5e_16", "v5e_256", "v5p_128", "v6e_256", "v5e_256_x2"])
def test_the_shipped_configs_are_whole(name):
    loaded = load_config("cluster", [f"--cluster={ROOT}/configs/cluster/tpu_{name}.py"])
    cluster = cluster_spec(loaded.config)
    chips = int(name.split("_")[1])
    assert cluster.num_devices == chips * cluster.slices
    assert cluster.hosts == cluster.num_devices // 4


def test_how_many_hosts_there_are_is_what_the_api_reports(books):
    said = []
    acquisition = acquire.Acquisition(
        cluster_of(accelerator="v5litepod-8"), None, ledger=books, say=said.append, pause=None
    )
    cluster = acquisition._shaped(2)
    assert (cluster.hosts, cluster.devices_per_process, cluster.num_devices) == (2, 4, 8)
    assert "2 hosts of 4 chips, not 1" in said[0]
    with pytest.raises(ConfigError, match="the API reports 3 hosts"):
        acquisition._shaped(3)


# ---------------------------------------------------------------------------- what errors mean

ERRORS = [
    ('ERROR: (gcloud.compute.tpus.tpu-vm.create) {"code": 8, "message": "There is no more capacity '
     'in the zone \\"us-west4-a\\"; you can try in another zone"}', "stockout"),
    ("ERROR: (gcloud.compute.tpus.tpu-vm.create) RESOURCE_EXHAUSTED: Quota limit "
     "'TPUV5sLitepodPerProjectPerZoneForTPUAPI' has been exceeded. Limit: 16 in zone us-west4-a.",
     "quota"),
    ("ERROR: (gcloud.x) PERMISSION_DENIED: Cloud TPU API has not been used in project 1 before or "
     "it is disabled. Enable it by visiting", "disabled"),
    ("ERROR: (gcloud.x) PERMISSION_DENIED: Permission 'tpu.nodes.list' denied on "
     "'projects/p/locations/us-wst4-a' (or it may not exist).", "zone"),
    ("ERROR: (gcloud.x) PERMISSION_DENIED: The caller does not have permission", "permission"),
    ('ERROR: (gcloud.x) INVALID_ARGUMENT: Accelerator type "v9-8" is not available in zone',
     "accelerator"),
    ("ERROR: (gcloud.x) You do not currently have an active account selected.", "login"),
    ("ERROR: (gcloud.auth) There was a problem refreshing your current auth tokens", "login"),
    ("ERROR: (gcloud.x) ALREADY_EXISTS: Resource 'projects/p/...' already exists", gcloud.EXISTS),
    ("ERROR: (gcloud.x) NOT_FOUND: Resource 'projects/p/x' was not found", gcloud.MISSING),
    ("ERROR: gcloud crashed (HttpError): 503 The service is currently unavailable",
     gcloud.UNAVAILABLE),
    ("ERROR: (gcloud.x) RESOURCE_EXHAUSTED: Too many requests", gcloud.UNAVAILABLE),
    ("ERROR: (gcloud.x) something new", "gcloud"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "kind"), ERRORS)
def test_errors_of_gcloud_are_told_apart(text, kind):
    error = gcloud.understand("WARNING: be warned\n" + text)
    assert error.kind == kind
    assert "\n" not in str(error)
    assert "WARNING" not in error.said
    named = kind in (gcloud.EXISTS, gcloud.MISSING, gcloud.UNAVAILABLE, "gcloud")
    assert bool(error.advice) is not named


@pytest.mark.parametrize(
    ("node", "cause"),
    [
        ({"state": "READY", "health": "HEALTHY"}, None),
        ({"state": "READY", "health": "TIMEOUT"}, None),
        ({"state": "READY", "health": "UNHEALTHY_MAINTENANCE"}, "preempted"),
        ({"state": "PREEMPTED"}, "preempted"),
        ({"state": "REPAIRING"}, "preempted"),
        ({"state": "TERMINATED"}, "host_lost"),
        ({"state": "STOPPED"}, "host_lost"),
    ],
)
def test_a_nodes_state_means_something(node, cause):
    found = states.trouble(node_of({"name": "projects/p/locations/z/nodes/n", **node}))
    assert (found and found[0]) == cause
    assert found is None or found[1].startswith("n ")
    assert states.trouble(Node("n"))[0] == "host_lost"


def test_what_the_api_says_is_read():
    node = node_of(
        {
            "name": "projects/p/locations/z/nodes/n",
            "state": "READY",
            "networkEndpoints": [
                {"ipAddress": "10.0.0.1", "accessConfig": {"externalIp": "34.1.1.1"}},
                {"ipAddress": "10.0.0.2"},
            ],
            "queuedResource": "projects/p/locations/z/queuedResources/q",
        }
    )
    assert (node.name, node.project, node.maker) == ("n", "p", "q")
    assert node.addresses == ("34.1.1.1", "10.0.0.2")
    assert node.internal_addresses == ("10.0.0.1", "10.0.0.2")
    error = {"code": 8, "message": "no more capacity"}
    queued = queued_of(
        {
            "name": "projects/p/locations/z/queuedResources/q",
            "state": {"state": "FAILED", "failedData": {"error": error}},
            "tpu": {"nodeSpec": [{"node": {"labels": {"a": "b"}}}]},
        }
    )
    assert (queued.name, queued.state) == ("q", "FAILED")
    assert (queued.error.kind, queued.error.begun) == ("stockout", True)
    assert queued.labels == {"a": "b"}


# ---------------------------------------------------------------------------- what goes to hosts


def test_an_ssh_line_of_gclouds_becomes_one_that_a_program_can_use():
    line = (
        "/usr/bin/ssh -t -i /home/u/.ssh/google_compute_engine -o CheckHostIP=no "
        "-o HostKeyAlias=tpu.1-0-abc -o StrictHostKeyChecking=yes u@10.0.0.1 -- :"
    )
    argv = reach.ssh_argv(line)
    assert argv[0] == "/usr/bin/ssh"
    assert argv[-1] == "u@10.0.0.1"
    assert "-t" not in argv
    assert ":" not in argv
    assert "HostKeyAlias=tpu.1-0-abc" in argv
    assert "BatchMode=yes" in argv


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """A git tree, which is the current directory."""
    tree = tmp_path / "tree"
    tree.mkdir()
    monkeypatch.chdir(tree)
    subprocess.run(["git", "init", "-q"], check=True)
    (tree / ".gitignore").write_text("ignored\n")
    (tree / "train.py").write_text("print('hi')\n")
    (tree / "run.sh").write_text("#!/bin/sh\n")
    (tree / "run.sh").chmod(0o755)
    (tree / "ignored").write_text("x")
    (tree / "link").symlink_to("train.py")
    subprocess.run(["git", "add", "train.py", ".gitignore"], check=True)
    return tree


def packed(folder: Path, **how):
    how = {"send": True, "max_file_bytes": 1000, "run": folder / "run", **how}
    return code.pack(folder=folder / "packed", **how)


def names_in(archive: code.Archive) -> list[str]:
    with tarfile.open(archive.path) as tar:
        return tar.getnames()


def test_code_is_what_git_tracks_and_does_not_ignore_named_by_its_content(tree, tmp_path):
    (tree / "deleted.py").write_text("")
    subprocess.run(["git", "add", "deleted.py"], check=True)
    (tree / "deleted.py").unlink()
    (tree / "sub").mkdir()
    os.chdir(tree / "sub")
    first = packed(tmp_path)
    assert first.cwd == "sub"
    archive = first.archives[0]
    with tarfile.open(archive.path) as tar:
        modes = {member.name: member.mode for member in tar}
        assert tar.getmember("link").linkname == "train.py"
    assert modes.keys() == {".gitignore", "train.py", "run.sh", "link"}
    assert modes["run.sh"] == 0o755
    os.utime(tree / "train.py", (1, 1))
    again = packed(tmp_path).archives[0]
    assert (again.digest, again.size) == (archive.digest, archive.size)
    (tree / "train.py").write_text("print('ho')\n")
    assert packed(tmp_path).archives[0].digest != archive.digest
    names = names_in(first.archives[1])
    assert {"launch/contract.py", "trainer/main.py"} <= set(names), "Muster goes along"


def test_the_run_directory_does_not_go_along(tree, tmp_path):
    run = tree / "runs" / "first"
    run.mkdir(parents=True)
    (run / "log").write_text("x")
    names = names_in(packed(tmp_path, run=run).archives[0])
    assert not any(name.startswith("runs") for name in names)


@pytest.mark.parametrize(
    "name", [".env", "my.pem", "id_rsa", "my-service-account.json", "a/.netrc"]
)
def test_what_looks_like_a_secret_is_refused_by_name(tree, tmp_path, name):
    (tree / name).parent.mkdir(exist_ok=True)
    (tree / name).write_text("x")
    with pytest.raises(ConfigError, match="looks like secrets") as error:
        packed(tmp_path)
    assert name in str(error.value)
    subprocess.run(["git", "check-ignore", "-q", name], check=False)
    (tree / ".gitignore").write_text(f"ignored\n{Path(name).name}\n")
    packed(tmp_path)


@pytest.mark.parametrize("name", [".env.example", "id_rsa.pub", "tokens.py", "environment.py"])
def test_what_only_sounds_like_a_secret_is_not(name):
    assert not code.is_secret_file(name)


def test_a_large_file_is_refused_by_name(tree, tmp_path):
    (tree / "weights.bin").write_bytes(b"x" * 1001)
    with pytest.raises(ConfigError, match=r"weights.bin \(1001 bytes\)"):
        packed(tmp_path)


def test_what_a_bare_host_gets_runs_there(tmp_path):
    digest, data = code.bundle()
    assert code.bundle() == (digest, data)
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        tar.extractall(tmp_path)
    program = "import sys; sys.path.insert(0, sys.argv[1]); "
    program += "import launch.agent.served, launch.agent.host, launch.agent.release"
    argv = [sys.executable, "-I", "-S", "-c", program, str(tmp_path)]
    subprocess.run(argv, check=True)


def test_copies_of_logs_are_whole_whatever_comes_twice_and_say_what_is_missing(tmp_path):
    def says(offset, data):
        text = base64.b64encode(data).decode()
        copies.take({"event": "log", "process_id": 0, "offset": offset, "data": text})

    copies = link.Copies(tmp_path, [0], 1 << 20)
    says(0, b"first\n")
    says(3, b"st\nsecond\n")
    assert copies.positions() == {"0": 13}
    copies.close()
    copies = link.Copies(tmp_path, [0], 1 << 20)
    assert copies.positions() == {"0": 13}
    says(20, b"third\n")
    assert copies.positions() == {"0": 26}
    copies.close()
    reader = LogReader(rundir.log_path(tmp_path, 0))
    assert reader.look() == 26
    assert reader.read(100) == b"first\nsecond\n"
    assert (reader.read(100), reader.left_out) == (b"third\n", 7)
    reader.close()
    copies = link.Copies(tmp_path, [0], 1 << 20)
    copies.take({"event": "file", "name": "../../evil", "text": "x"})
    copies.take({"event": "file", "name": "process-00000.exit.json", "text": "{}"})
    copies.take({"event": "file", "name": "stacks/process-00000.txt", "text": "main\n"})
    assert copies.positions() == {"0": 26}
    copies.close()
    assert not (tmp_path.parent.parent / "evil").exists()
    assert (tmp_path / "process-00000.exit.json").read_text() == "{}"
    assert (tmp_path / "stacks/process-00000.txt").read_text() == "main\n"


# ---------------------------------------------------------------------------- the ledger


@pytest.fixture
def books(tmp_path, monkeypatch):
    monkeypatch.setenv(registry.STATE_DIR, str(tmp_path / "state"))
    return ledger.Ledger(tmp_path / "run", "20261125-abc")


def asked(name="muster-x-0", **fields):
    return ledger.Asked("queued-resources", name, None, "z", (name,), 16, contract.utc(0), **fields)


def test_a_ledger_is_found_again_by_its_copy(books, tmp_path):
    books.asked.append(asked())
    books.write()
    (books.path / ledger.MACHINES).unlink()
    again = ledger.Ledger(books.path, books.run_id)
    assert again.asked == books.asked
    assert [one.run_id for one in ledger.all_ledgers()] == [books.run_id]
    for path in (tmp_path / "state" / "machines").iterdir():
        assert path.stat().st_mode & 0o77 == 0
    ledger.forget(again)
    assert list(ledger.all_ledgers()) == []


def test_a_ledger_that_cannot_be_written_stops_everything(books, monkeypatch):
    monkeypatch.setenv(registry.STATE_DIR, "/proc/nowhere")
    with pytest.raises(ConfigError, match="cannot be written down"):
        books.write()


def test_cost_is_chips_times_hours_times_the_users_price(books):
    books.asked.append(asked(held_at=contract.utc(1000), ended_at=contract.utc(4600)))
    books.asked.append(asked("muster-x-1", held_at=contract.utc(5000)))
    books.write()
    report = ledger.report(books.path, 1.5, 6800.0)
    assert report["chip_hours"] == pytest.approx(16 * 1.0 + 16 * 0.5)
    assert report["cost"] == pytest.approx(36.0)
    assert ledger.report(books.path, None, 6800.0)["cost"] is None
    assert [one["name"] for one in report["open"]] == ["muster-x-1"]


def test_names_are_such_as_ssh_and_the_api_take():
    assert commands.resource_name("20261125-ABCDEF", 3) == "muster-20261125-abcdef-3"


if __name__ == "__main__":
    from unittest import mock

    with mock.patch("launch.rundir.user_name", return_value="user"):
        for each in CLUSTERS:
            (GOLDEN / f"tpu_{each}.txt").write_text(rendered(each))
