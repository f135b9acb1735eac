"""The fake TPU API and its VMs together, and the real gcloud to use them."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

from tests.testing.gangs import TIMEOUT_SECONDS, environment
from tests.testing.tpu_api import TpuApi
from tests.testing.tpu_hosts import TpuHosts, attach

ZONE = "us-west4-a"
TYPE = "v5litepod-16"  # Four VMs of four chips.
# What each command needs of Debian's packages, or of Google's.
_PACKAGES = {
    "gcloud": "google-cloud-cli",
    "sshd": "openssh-server",
    "ssh": "openssh-client",
    "ssh-keygen": "openssh-client",
    "unshare": "util-linux",
    "setpriv": "util-linux",
}


def missing_packages() -> list[str]:
    """The packages that these tests need and that are not there."""
    path = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])
    return sorted({package for command, package in _PACKAGES.items()
                   if not shutil.which(command, path=path)})  # fmt: skip


def make_ssh_key(folder: Path) -> None:
    """The key pair that gcloud would make at its first ssh, which takes it a second."""
    key = str(folder / "google_compute_engine")
    make = ["ssh-keygen", "-q", "-t", "rsa", "-b", "2048", "-N", "", "-C", "root", "-f", key]
    subprocess.run(make, check=True, stdin=subprocess.DEVNULL, timeout=TIMEOUT_SECONDS)


class Cloud:
    """A project without nodes in a Google Cloud of our own."""

    def __init__(self, api: TpuApi, hosts: TpuHosts):
        self.api = api
        self.hosts = hosts

    @property
    def env(self) -> dict[str, str]:
        """This process's environment in which gcloud talks to this cloud only."""
        inherited = environment().items()
        other = {name: value for name, value in inherited if not name.startswith("CLOUDSDK_")}
        return {**other, **self.api.env}

    def gcloud(self, *words: str, zone: str = ZONE) -> subprocess.CompletedProcess[str]:
        """Run `gcloud compute tpus` with these words, to its end."""
        return subprocess.run(
            ["gcloud", "compute", "tpus", *words, f"--zone={zone}"],
            env=self.env,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_SECONDS,
            check=False,
        )

    def start(self, *words: str, zone: str = ZONE) -> subprocess.Popen[str]:
        """Start gcloud in a session of its own, output and errors in pipes."""
        return subprocess.Popen(
            ["gcloud", "compute", "tpus", *words, f"--zone={zone}"],
            env=self.env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def node_state(self, name: str, zone: str = ZONE) -> str | None:
        """A node's state; None without it."""
        with self.api.lock:
            return self.api.nodes.get((zone, name), {}).get("state")

    def queued_state(self, name: str, zone: str = ZONE) -> str | None:
        """A queued resource's state; None without it."""
        with self.api.lock:
            return self.api.queued.get((zone, name), {}).get("state", {}).get("state")

    def hosts_of(self, node: str, zone: str = ZONE) -> list[str]:
        """The addresses of a node's VMs, in the order of its workers."""
        return self.api.addresses_of((zone, node))


@contextlib.contextmanager
def running(folder: Path, hosts: TpuHosts, ssh_key: Path | None = None) -> Iterator[Cloud]:
    """A cloud with its files below `folder`; at the end all of its VMs are off.

    Args:
      folder: where gcloud has its configuration and its home.
      hosts: the VMs.
      ssh_key: a folder with gcloud's key pair; without it, gcloud makes one.
    """
    api = TpuApi(folder, hosts.addresses)
    attach(api, hosts)
    with api.running():
        if ssh_key:
            shutil.copytree(ssh_key, api.home / ".ssh")
        yield Cloud(api, hosts)
    for address in hosts.running():
        hosts.down(address)
