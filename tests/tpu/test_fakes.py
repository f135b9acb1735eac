"""The real gcloud works with the fake API, and its ssh with the VMs behind it."""

import json
import shlex
import subprocess
from pathlib import Path

import pytest

from tests.testing.gangs import wait_until
from tests.testing.tpu_cloud import TYPE, Cloud

SLICE = (f"--accelerator-type={TYPE}", "--runtime-version=v2-alpha-tpuv5-lite")
# Lives on when its connection is lost.
DETACHED = "setsid sleep 600 </dev/null >/dev/null 2>&1 & echo started"


@pytest.fixture
def node(cloud: Cloud) -> str:
    """A READY node of four VMs, of a queued resource `q` of the same name."""
    done = cloud.gcloud("queued-resources", "create", "q", *SLICE, "--node-id=n", "--async")
    assert done.returncode == 0, done.stderr
    wait_until(lambda: cloud.queued_state("q") == "ACTIVE", "the queued resource to be active")
    return "n"


def ssh_lines(cloud: Cloud, node: str, command: str) -> list[list[str]]:
    """The ssh command lines by which gcloud would run a command on all workers."""
    words = ("--worker=all", f"--command={command}", "--dry-run")
    done = cloud.gcloud("tpu-vm", "ssh", node, *words)
    assert done.returncode == 0, done.stderr
    return [shlex.split(line) for line in done.stdout.splitlines()]


def direct(cloud: Cloud, line: list[str], **options) -> subprocess.CompletedProcess[str]:
    """Run one of these lines."""
    return subprocess.run(
        line, env=cloud.env, stdin=subprocess.DEVNULL, capture_output=True, text=True,
        check=False, **{"timeout": 20, **options},
    )  # fmt: skip


def test_queued_resource_of_two_nodes_from_creation_to_deletion(cloud):
    cloud.api.hold = True
    done = cloud.gcloud(
        "queued-resources", "create", "job", *SLICE, "--node-count=2", "--node-prefix=job",
        "--spot", "--labels=muster=abc", "--async",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    wait_until(lambda: cloud.queued_state("job") == "WAITING_FOR_RESOURCES", "it to wait")
    request = cloud.api.mutations()[-1]
    assert (request.method, request.status) == ("POST", 200)
    assert "queued-resources.create" in request.user_agent
    done = cloud.gcloud("queued-resources", "describe", "job", "--format=value(state.state)")
    assert done.stdout.strip() == "WAITING_FOR_RESOURCES"
    cloud.api.hold = False
    wait_until(lambda: cloud.queued_state("job") == "ACTIVE", "it to be active")
    [found] = json.loads(cloud.gcloud("queued-resources", "list", "--format=json").stdout)
    assert found["state"]["state"] == "ACTIVE"
    assert cloud.api.owned("muster", "abc") == ["job-0", "job-1", "job"]
    assert len(cloud.hosts.running()) == 8
    assert cloud.gcloud("queued-resources", "delete", "job", "--quiet").returncode == 1
    done = cloud.gcloud("queued-resources", "delete", "job", "--force", "--quiet")
    assert done.returncode == 0, done.stderr
    assert (cloud.api.nodes, cloud.api.queued, cloud.hosts.running()) == ({}, {}, [])


def test_node_from_creation_to_deletion(cloud):
    words = ("--accelerator-type=v5litepod-4", "--version=v2-alpha-tpuv5-lite")
    assert cloud.gcloud("tpu-vm", "create", "one", *words).returncode == 0
    cloud.api.add_node("us-east5-b", "other", "v5litepod-8")
    cloud.api.page_size = 1
    done = cloud.gcloud("tpu-vm", "list", "--format=value(name.basename(),state)", zone="-")
    assert sorted(map(str.split, done.stdout.splitlines())) == [
        ["one", "READY"],
        ["other", "READY"],
    ]
    done = cloud.gcloud("tpu-vm", "create", "one", *words)
    assert (done.returncode, "ALREADY_EXISTS" in done.stderr) == (1, True)
    assert cloud.gcloud("tpu-vm", "delete", "one", "--quiet").returncode == 0
    assert [name for _, name in cloud.api.nodes] == ["other"]


def test_gcloud_and_its_own_ssh_lines_reach_the_vms(cloud, node):
    done = cloud.gcloud("tpu-vm", "ssh", node, "--worker=0", "--command=echo hi; pwd")
    assert (done.returncode, done.stdout) == (0, "hi\n/root\n"), done.stderr
    lines = ssh_lines(cloud, node, "hostname")
    assert [word for line in lines for word in line if word.startswith("root@")] == [
        f"root@{address}" for address in cloud.hosts_of(node)
    ]
    names = [direct(cloud, line).stdout.strip() for line in lines]
    assert [name[-4:] for name in names] == ["-w-0", "-w-1", "-w-2", "-w-3"]
    assert len({name[:-4] for name in names}) == 1
    # It has sent its key, and asks of nobody else.
    assert [(one.method, one.path.rpartition("/")[2]) for one in cloud.api.mutations()[1:]] == [
        ("PATCH", node)
    ]
    direct(cloud, [*lines[1][:-1], "echo x >~/here; echo y >/tmp/there"])
    first, second = cloud.hosts_of(node)[:2]
    assert (cloud.hosts.home(second) / "here").read_text() == "x\n"
    assert not (cloud.hosts.home(first) / "here").exists()


def test_errors_that_tests_ask_for(cloud):
    cloud.api.fault("GET", "/nodes", status=503)
    assert cloud.gcloud("tpu-vm", "list").returncode == 0  # It has tried again.
    assert [one.status for one in cloud.api.requests] == [503, 200]
    cloud.api.quota = 16
    done = cloud.gcloud("queued-resources", "create", "a", *SLICE, "--node-id=a", "--async")
    assert done.returncode == 0
    done = cloud.gcloud("queued-resources", "create", "b", *SLICE, "--node-id=b", "--async")
    assert (done.returncode, cloud.api.requests[-1].status) == (1, 429)
    assert "RESOURCE_EXHAUSTED: Quota limit" in done.stderr
    cloud.api.stockout_zones.add("us-east5-b")
    words = ("--accelerator-type=v6e-4", "--version=v2-alpha-tpuv6e")
    done = cloud.gcloud("tpu-vm", "create", "c", *words, zone="us-east5-b")
    assert (done.returncode, "There is no more capacity" in done.stderr) == (1, True)
    assert cloud.node_state("c", "us-east5-b") is None
    done = cloud.gcloud("tpu-vm", "list", zone="us-nowhere1-a")
    assert (done.returncode, "PERMISSION_DENIED" in done.stderr) == (1, True)


def test_what_happens_to_vms(cloud, node):
    line = ssh_lines(cloud, node, "x")[0][:-1]
    hosts, address = cloud.hosts, cloud.hosts_of(node)[0]
    key = (cloud.api.home / ".ssh" / "google_compute_engine.pub").read_text()
    hosts.set_keys(address, f"root:{key}")
    assert direct(cloud, [*line, DETACHED]).stdout == "started\n"
    [(job, _)] = hosts.jobs(address)

    session = subprocess.Popen(
        [*line, "echo there; exec sleep 600"], env=cloud.env, stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    assert session.stdout is not None
    assert session.stdout.readline() == "there\n"
    hosts.refuse(address, True)
    assert direct(cloud, [*line, "true"]).returncode == 255
    assert session.poll() is None
    hosts.refuse(address, False)
    assert direct(cloud, [*line, "true"]).returncode == 0
    hosts.cut_connections(address)
    assert session.wait(10) == 255
    assert job in [pid for pid, _ in hosts.jobs(address)]

    hosts.freeze(address, True)
    with pytest.raises(subprocess.TimeoutExpired):
        direct(cloud, [*line, "true"], timeout=1)
    hosts.freeze(address, False)
    assert direct(cloud, [*line, "true"]).returncode == 0

    cloud.api.preempt(node)
    assert (cloud.node_state(node), cloud.queued_state("q")) == ("PREEMPTED", "SUSPENDED")
    assert hosts.running() == []
    assert direct(cloud, [*line, "true"]).returncode == 255
    assert not Path(f"/proc/{job}").exists()
