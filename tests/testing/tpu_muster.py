"""`muster` on a Google Cloud of our own."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

from launch import rundir
from tests.testing.gangs import MusterCommand, wait_until
from tests.testing.tpu_cloud import TYPE, ZONE, Cloud

_JAX = {name: os.environ[name] for name in ("JAX_PLATFORMS", "XLA_FLAGS")}


class TpuMuster(MusterCommand):
    """`muster` with TPU slices whose VMs are of this machine, and whose devices are CPUs.

    Programs run in the user's code on the VMs; what lasts is in `storage`, which they share.
    """

    def __init__(self, folder: Path, cloud: Cloud, storage: Path, **cluster: Any):
        """Other keyword arguments are fields of the cluster config; `tpu` adds to its section."""
        self.cloud = cloud
        self.storage = storage
        section = {
            "zones": (ZONE,),
            "storage": str(storage),
            "python": sys.executable,
            "poll_seconds": 2.5,
            "silent_seconds": 20.0,
            "idle_seconds": 60.0,
        }
        fields = {
            "backend": "tpu",
            "accelerator": TYPE,
            "processes_per_host": 1,
            "devices_per_process": 1,
            "grace_seconds": 20.0,
            "restart": {"max_failures": 2, "max_preemptions": 5, "backoff_seconds": 0.2},
            **cluster,
            # Nothing of this process's environment is on the VMs.
            "env": {**_JAX, **cluster.get("env", {})},
            "tpu": {**section, **cluster.get("tpu", {})},
        }
        folder.mkdir(exist_ok=True)
        super().__init__(folder, **fields)

    @property
    def env(self) -> dict[str, str]:
        """What the command needs to find the cloud."""
        return {**self.cloud.env, "MUSTER_STATE_DIR": str(self.folder.parent / "state")}

    def command(self, *flags: str, program: str | None = None) -> list[str]:
        """See MusterCommand; the program is a file of the user's code, which goes to the VMs."""
        command = super().command(*flags)
        if program is not None:
            (self.folder / "program.py").write_text(textwrap.dedent(program))
            command += ["--", "python", "program.py"]
        return command

    def start(
        self, *flags: str, program: str | None = None, **options: Any
    ) -> subprocess.Popen[str]:
        """See MusterCommand."""
        return super().start(*flags, program=program, env=self.env, **options)

    def other(self, *words: str) -> subprocess.CompletedProcess[str]:
        """See MusterCommand."""
        return self.run_words([self.python, "-m", "launch", *words], env=self.env)

    @property
    def run_id(self) -> str:
        """The run's id."""
        return str((rundir.read_record(self.workdir / "run.json") or {})["id"])

    def there(self) -> list[str]:
        """What exists in the cloud."""
        with self.cloud.api.lock:
            return sorted(name for _, name in (*self.cloud.api.nodes, *self.cloud.api.queued))

    def jobs(self) -> list[str]:
        """The command lines that run on any VM, but for init and sshd."""
        hosts = self.cloud.hosts
        return [line for one in hosts.running() for _, line in hosts.jobs(one)]

    def node_of(self, index: int = 0) -> str:
        """The name of a slice's node, waited for."""

        def find() -> list[str]:
            with self.cloud.api.lock:
                return sorted(name for _, name in self.cloud.api.nodes)

        wait_until(lambda: len(find()) > index, "a node")
        return find()[index]
