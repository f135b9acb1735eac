"""How long 64 TPU hosts take to be ready, against 4: real gcloud, real ssh, VMs of this machine.

Each host's set-up sleeps for five seconds, as an installation would; one after another, 64 hosts
would take over five minutes. Needs root, sshd and gcloud.

    .venv/bin/python -m scripts.bench_tpu_start
"""

from __future__ import annotations

import re
import tempfile
import time
from pathlib import Path

from tests.testing import tpu_cloud
from tests.testing.gangs import ROOT
from tests.testing.tpu_hosts import TpuHosts
from tests.testing.tpu_muster import TpuMuster

_TYPES = ("v5litepod-16", "v5litepod-256")
_ROUNDS = 2


def main() -> None:
    """Print seconds from a node that is READY to the first line of the last process."""
    with tempfile.TemporaryDirectory(prefix="muster-bench-") as root:
        folder = Path(root)
        storage = folder / "storage"
        storage.mkdir()
        hosts = TpuHosts(folder / "vms", 64, shared=(ROOT, storage))
        keys = folder / "keys"
        keys.mkdir()
        tpu_cloud.make_ssh_key(keys)
        try:
            for number in range(_ROUNDS):
                for accelerator in _TYPES:
                    place = folder / f"{accelerator}-{number}"
                    place.mkdir()
                    with tpu_cloud.running(place / "cloud", hosts, keys) as cloud:
                        print(accelerator, _measure(accelerator, cloud, place, storage), flush=True)
        finally:
            hosts.close()


def _measure(accelerator: str, cloud: tpu_cloud.Cloud, place: Path, storage: Path) -> str:
    ready: list[float] = []
    boot = cloud.api.on_boot

    def note(node: str, addresses: list[str]) -> None:
        assert boot is not None
        boot(node, addresses)
        ready.append(time.monotonic())

    cloud.api.on_boot = note
    muster = TpuMuster(
        place / "code",
        cloud,
        storage,
        accelerator=accelerator,
        setup=("sleep 5",),
        tpu={"silent_seconds": 300.0},
    )
    process = muster.start("--process=all", program="print('first line', flush=True)")
    assert process.stdout is not None
    lines, last = 0, 0.0
    for line in process.stdout:
        if "first line" in line:
            lines, last = lines + 1, time.monotonic()
    code = process.wait()
    said = process.stderr.read() if process.stderr else ""
    match = re.fullmatch(r"v5litepod-(\d+)", accelerator)
    assert match
    assert (code, lines) == (0, int(match[1]) // 4), said
    return f"{lines} hosts: {last - ready[0]:.1f} s, of which 5 are set-up"


if __name__ == "__main__":
    main()
