"""Plans for tests: recorded ones, and a gcloud that only notes what it is asked."""

from __future__ import annotations

import os
import textwrap
from pathlib import Path
from typing import Any

GIB = 1 << 30

CONFIG = """
    def get_config():
        return {
            "task": "tests.testing.tiny:Witness",
            "num_steps": 3, "global_batch_size": 8, "log_every_steps": 1,
            "data": {"num_rows": 100, "bad_row": -2},
            "optimizer": {"chain": ("sgd",), "sgd": {"learning_rate": 0.1}},
            "mesh": {"data": -1, "fsdp": 1, "tensor": 1, "dcn_data": 1, "dcn_fsdp": 1},
        }
"""
CLUSTER = """
    def get_config():
        return {
            "backend": "tpu", "accelerator": "v5litepod-4", "env": {},
            "tpu": {"zones": ("us-west4-a",), "storage": "gs://bucket/runs", "send_code": False},
        }
"""


def record(fits: bool = True, **more: Any) -> dict[str, Any]:
    """A plan's record, as far as the launcher reads it."""
    return {
        "fits": fits,
        "peak_bytes": (8 if fits else 20) * GIB,
        "temp_bytes": 4 * GIB,
        "hbm_bytes": 16 * GIB,
        "usable_hbm_bytes": int(15.75 * GIB),
        "step_seconds_bound": 0.25,
        "bounds": {"compute": 0.25, "memory": 0.01, "ici": 0.1},
        "bound_by": "compute",
        "mfu_bound": 0.5,
        "link_bytes": {"ici": 1 * GIB},
        **more,
    }


class Files:
    """A config and a cluster file, and a command `gcloud` that notes what it is asked and fails."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.config = folder / "config.py"
        self.cluster = folder / "cluster.py"
        self.workdir = folder / "run"
        self._asked = folder / "asked"
        self.config.write_text(textwrap.dedent(CONFIG))
        self.cluster.write_text(textwrap.dedent(CLUSTER))
        self.bin = folder / "bin"
        self.bin.mkdir()
        for name in ("gcloud", "ssh"):
            script = self.bin / name
            script.write_text(f'#!/bin/sh\necho {name} "$@" >> {self._asked}\nexit 1\n')
            script.chmod(0o755)

    @property
    def path(self) -> str:
        """For the environment's PATH."""
        return os.pathsep.join([str(self.bin), os.environ["PATH"]])

    @property
    def words(self) -> list[str]:
        """The two files, as words of a command line."""
        return [f"--config={self.config}", f"--cluster={self.cluster}"]

    def run(self, *more: str) -> list[str]:
        """The words of `muster run`."""
        return ["run", *self.words, f"--workdir={self.workdir}", *more]

    def asked(self) -> str:
        """What gcloud and ssh were asked."""
        return self._asked.read_text() if self._asked.exists() else ""
