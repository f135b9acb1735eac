"""Flags are set before jax starts, and never over the user's own."""

import subprocess
import sys

from tests.testing import tiny
from trainer import xla_flags


def test_flags_are_added_to_the_users_own_which_win():
    name, flag = next(iter(xla_flags.TPU.items()))
    environment = {"LIBTPU_INIT_ARGS": f"--{name}=false --xla_mine=3"}
    xla_flags.put(environment, has_gpu=False)
    flags = environment["LIBTPU_INIT_ARGS"].split()
    assert flags[:2] == [f"--{name}=false", "--xla_mine=3"]
    assert len(flags) == 2 + len(xla_flags.TPU) - 1
    before = dict(environment)
    xla_flags.put(environment, has_gpu=False)
    assert environment == before
    xla_flags.put(environment, has_gpu=True)
    assert environment["XLA_FLAGS"].startswith("--xla_gpu_")
    assert flag.reason


def test_the_table_needs_no_jax():
    program = "import sys; from trainer import xla_flags; assert 'jax' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], cwd=tiny.ROOT, check=True)
