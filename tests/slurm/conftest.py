"""One real SLURM for the tests of this process, and `muster` on it."""

import os
import tempfile
from pathlib import Path

import pytest

from tests.testing import slurm as slurm_cluster
from tests.testing.packages import missing
from tests.testing.slurm import SlurmMuster


@pytest.fixture(scope="session")
def running_slurm():
    """A SLURM of four nodes, each with four CPUs and two counted GPUs."""
    packages = slurm_cluster.missing_packages()
    if packages:
        missing(f"Debian's packages {' '.join(packages)}")
    if os.getuid() != 0:
        missing("root's rights, which slurmd needs,")
    # Not below pytest's own folder, whose path is too long for munge's socket.
    with (
        tempfile.TemporaryDirectory(prefix="muster-slurm-") as root,
        slurm_cluster.running(Path(root)) as running,
    ):
        os.environ.update(running.env)
        yield running
        for name in running.env:
            del os.environ[name]


@pytest.fixture
def slurm(running_slurm):
    """That SLURM, with nothing in its queue and all of its nodes up, before and after."""
    running_slurm.heal()
    yield running_slurm
    running_slurm.heal()


@pytest.fixture
def muster(slurm, tmp_path: Path):
    """`muster` with a SLURM cluster of two nodes, two processes on each."""
    command = SlurmMuster(tmp_path)
    yield command
    slurm.heal()
    command.check_nothing_is_left()
