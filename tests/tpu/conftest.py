"""A Google Cloud of our own for each test, with VMs of this machine."""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.testing import tpu_cloud
from tests.testing.packages import missing
from tests.testing.tpu_hosts import TpuHosts
from tests.testing.tpu_muster import TpuMuster

ADDRESSES = 8  # Two nodes of four VMs each.
# Programs that trainers have compiled, in a root's home (launch.spec.TrainSpec).
COMPILED = Path("~/.cache/muster/xla").expanduser()


@pytest.fixture(scope="session")
def storage_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What all VMs and this machine share."""
    return tmp_path_factory.mktemp("storage", numbered=True)


@pytest.fixture(scope="session")
def tpu_hosts(storage_root: Path):
    """Addresses at which TPU VMs can be booted."""
    COMPILED.mkdir(parents=True, exist_ok=True)
    packages = tpu_cloud.missing_packages()
    if packages:
        missing(f"the packages {' '.join(packages)}")
    if os.getuid() != 0:
        missing("root's rights, which VMs of namespaces need,")
    with tempfile.TemporaryDirectory(prefix="muster-tpu-") as root:
        try:
            hosts = TpuHosts(Path(root), ADDRESSES, shared=(COMPILED, storage_root))
        except OSError as error:
            missing(f"loopback addresses with a free port 22 ({error})")
        yield hosts
        hosts.close()


@pytest.fixture(scope="session")
def ssh_key(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with gcloud's key pair."""
    folder = tmp_path_factory.mktemp("ssh", numbered=True)
    tpu_cloud.make_ssh_key(folder)
    return folder


@pytest.fixture
def cloud(tpu_hosts: TpuHosts, ssh_key: Path, tmp_path: Path):
    """A project without nodes, its API and its VMs."""
    with tpu_cloud.running(tmp_path / "cloud", tpu_hosts, ssh_key) as cloud:
        yield cloud


@pytest.fixture
def storage(storage_root: Path, tmp_path: Path) -> Path:
    """A directory of this test in what is shared."""
    folder = storage_root / tmp_path.name
    folder.mkdir()
    return folder


@pytest.fixture
def muster(cloud, tmp_path: Path, storage: Path):
    """`muster` with one slice of four VMs."""
    return TpuMuster(tmp_path / "code", cloud, storage)


@pytest.fixture
def gang(cloud, tmp_path: Path, storage: Path) -> Callable[..., TpuMuster]:
    """Makes a `muster` with one slice of two VMs; takes fields of the cluster config."""

    def make(**cluster: Any) -> TpuMuster:
        return TpuMuster(tmp_path / "code", cloud, storage, accelerator="v4-16", **cluster)

    return make
