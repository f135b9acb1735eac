"""What is brought to the hosts: code, environment, set-up, a container; each once."""

import sys
import zipfile
from pathlib import Path

from tests.testing.tpu_cloud import ZONE
from tests.testing.tpu_muster import TpuMuster

TWO_HOSTS = "v4-16"
SAYS = """
import os, sys, tiny_package, helper
print("package", tiny_package.WORD, "helper", helper.WORD, sys.prefix, flush=True)
print("set up", open(os.environ["MARK"]).read().split(), flush=True)
"""
# Docker's command line, as far as it is used; the container is this machine.
DOCKER = f"""#!{sys.executable}
import os, sys
words = sys.argv[1:]
with open("/tmp/docker-was-asked", "a") as file:
    file.write(" ".join(words[:14]) + "\\n")
if words[0] == "run":
    at = words.index("my-image:1")
    os.execvp(words[at + 1], words[at + 1:])
"""


def make_wheel(folder: Path) -> str:
    """A package of one module."""
    name = "tiny_package-1.0-py3-none-any.whl"
    with zipfile.ZipFile(folder / name, "w") as wheel:
        wheel.writestr("tiny_package.py", "WORD = 'installed'\n")
        info = "tiny_package-1.0.dist-info"
        wheel.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-package\nVersion: 1.0\n"
        )
        wheel.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{info}/RECORD", "")
    return name


def test_what_a_host_has_already_is_not_brought_again_and_a_node_of_the_users_stays(
    cloud, tmp_path, storage
):
    cloud.api.add_node(ZONE, "mine", TWO_HOSTS)
    before = dict(cloud.api.nodes[ZONE, "mine"])
    folder = tmp_path / "code"
    folder.mkdir()
    wheel = make_wheel(folder)
    (folder / "helper.py").write_text("WORD = 'first'\n")
    (folder / "constraints.txt").write_text("tiny-package==1.0\n")
    muster = TpuMuster(
        folder,
        cloud,
        storage,
        accelerator=TWO_HOSTS,
        setup=("echo setting up on $HOSTNAME; echo once >>$MARK",),
        env={"MARK": "/tmp/mark"},
        tpu={"nodes": ("mine",), "packages": (f"./{wheel}",), "constraints": "constraints.txt"},
    )
    looked = muster.other("doctor", f"--cluster={muster.cluster_file}", f"--workdir={folder}")
    assert looked.returncode == 0, looked.stdout
    for line in ("account: gcloud", "accelerator: asked", "storage: ", "ssh to mine: Python"):
        assert line in looked.stdout

    done = muster.run("--process=all", program=SAYS)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert sum("package installed helper first" in line for line in lines) == 2
    assert sum("set up ['once']" in line for line in lines) == 2
    assert "set-up run on 2" in done.stderr
    logs = [path.read_text() for path in (muster.workdir / "setup").iterdir()]
    assert len(logs) == 2
    assert all("setting up on t1v-n-" in log and "tiny-package" in log for log in logs)

    (folder / "helper.py").write_text("WORD = 'second'\n")
    muster.workdir = folder / "another"
    again = muster.run("--process=all", program=SAYS)
    assert again.returncode == 0, again.stderr
    assert again.stdout.count("helper second") == 2
    assert again.stdout.count("set up ['once']") == 2
    assert "set-up run on 0" in again.stderr
    sent = [int(run.stderr.partition("ready: ")[2].split()[0]) for run in (done, again)]
    assert sent[0] > 500, "Muster itself goes along"
    assert sent[1] < 50, "and is there the second time"
    after = cloud.api.nodes[ZONE, "mine"]
    changed = {name for name in after if after[name] != before.get(name)}
    assert changed <= {"metadata", "updateTime"}, "gcloud brings the user's key, and that is all"
    assert muster.jobs() == []


def test_set_up_that_fails_says_what_it_printed_and_everything_is_given_back(
    cloud, tmp_path, storage
):
    setup = ("echo all is well", "echo no such thing >&2; false")
    muster = TpuMuster(tmp_path / "code", cloud, storage, setup=setup)
    done = muster.run(program=SAYS)
    assert done.returncode == 2
    assert "setup command 'echo no such thing >&2; false' ended with exit code 1" in done.stderr
    assert "    no such thing" in done.stderr
    assert muster.there() == []


def test_a_storage_that_cannot_be_written_is_found_before_anything_runs(cloud, tmp_path):
    muster = TpuMuster(tmp_path / "code", cloud, Path("/proc/nowhere"))
    done = muster.run(program=SAYS)
    assert done.returncode == 2
    assert "tpu.storage: /proc/nowhere cannot be written" in done.stderr
    assert muster.there() == []


def test_in_a_container_everything_runs_in_it(cloud, tmp_path, storage):
    boot = cloud.api.on_boot

    def boot_with_docker(node, addresses):
        boot(node, addresses)
        for address in addresses:
            cloud.hosts.install(address, "docker", DOCKER)

    cloud.api.on_boot = boot_with_docker
    muster = TpuMuster(
        tmp_path / "code",
        cloud,
        storage,
        accelerator=TWO_HOSTS,
        env={"API_TOKEN": "s3cret"},
        tpu={"container": "my-image:1", "container_python": sys.executable},
    )
    done = muster.run(
        "--process=all",
        program="import os; print(os.environ['API_TOKEN'], open('/tmp/docker-was-asked').read())",
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("s3cret run --rm --init --privileged --network=host") == 2
    assert done.stdout.count("s3cret") == 2, "it is not on docker's command line"
    assert done.stdout.count(f"--name muster-{muster.run_id}-0 ") == 2
    assert muster.there() == []
