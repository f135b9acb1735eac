"""`muster certify` on real gangs: a sound training is certified, and broken ones are named."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
from pathlib import Path
from typing import Any

import pytest

from launch import contract
from launch.certify import certificate
from tests.testing.gangs import ROOT, MusterCommand, environment, wait_until

TIMEOUT_SECONDS = 560  # Against hanging only; a dozen starts on a machine that is not idle.

pytestmark = pytest.mark.timeout(600)


class Certify(MusterCommand):
    """`muster certify` of a config."""

    def start_it(self, config: str, *flags: str) -> subprocess.Popen[str]:
        words = [self.python, "-m", "launch", "certify", f"--config={ROOT}/tests/testing/{config}"]
        words += [f"--cluster={self.cluster_file}", f"--workdir={self.workdir}", *flags]
        return subprocess.Popen(
            words,
            cwd=self.folder,
            env=environment(),
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    def certify(self, config: str, *flags: str) -> tuple[int, str]:
        """Run it to its end: exit code, and all that it said."""
        process = self.start_it(config, *flags)
        try:
            out, err = process.communicate(timeout=TIMEOUT_SECONDS)
        except subprocess.TimeoutExpired:
            process.terminate()
            out, err = process.communicate(timeout=60)
            raise AssertionError(f"certify hung; it had said {out}\n{err}") from None
        return process.returncode, f"{out}\n{err}"

    @property
    def certificate(self) -> dict[str, Any]:
        return json.loads((self.workdir / certificate.FILE).read_text())

    def running(self) -> list[int]:
        """All processes of any of its runs, launchers and agents included."""
        wanted = str(self.workdir).encode()
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit() and int(entry.name) != os.getpid():
                try:
                    words = (entry / "cmdline").read_bytes()
                    carried = (entry / "environ").read_bytes()
                except OSError:
                    continue
                if words and (wanted in words or wanted in carried):
                    found.append(int(entry.name))
        return found


def test_a_sound_training_is_certified_bit_for_bit_and_on_one_process_within_bounds(tmp_path):
    muster = Certify(tmp_path)
    code, said = muster.certify(
        "configs/broken.py:sound",
        "--interruptions=save:kill_one,restore:kill,eval:kill_one",
        "--topologies=fewer",
    )
    assert code == contract.EXIT_DONE, said
    found = muster.certificate
    assert (found["schema"], found["verdict"], found["first_difference"]) == (1, "bit_exact", None)
    hits = {hit["name"]: hit for hit in found["interruptions"]}
    assert all(hit["delivered"] for hit in hits.values()), said
    assert {name: hit["phase"] for name, hit in hits.items()} == {
        name: name.partition(":")[0] for name in hits
    }
    save = hits["save:kill_one"]
    assert save["resumed_at"] < save["step"]  # It was not saved.
    (fewer,) = found["topologies"]
    # It is another order of the sums, which the measure sees; a lost thing would be of order 1.
    assert fewer["verdict"] == "same_data_bounded_drift"
    assert 0 < fewer["drift"]["params"] < 1e-4
    assert not fewer["drift"]["unequal"]
    losses = [run["losses"] for run in found["runs"]]
    assert list(losses[0]) == [str(step) for step in range(1, 13)]
    assert losses[0] == losses[1]
    assert "certified" in said
    for name in (certificate.FILE, certificate.PAGE):
        assert stat.S_IMODE((muster.workdir / name).stat().st_mode) == 0o600
    assert stat.S_IMODE(muster.workdir.stat().st_mode) == 0o700
    assert not muster.running()
    assert not list(muster.workdir.glob("certify/*/run/checkpoints"))


@pytest.mark.parametrize(
    ("fault", "cause", "step", "words"),
    [
        ("rng", "rng", 5, "random generator or counter outside of the model's state"),
        ("iterator", "data_position", 5, "was fed the rows of step 1"),
        ("moments", "optimizer", 5, "Moments or counters"),
        ("set", "data_order", 1, "the order of a `set`"),
        ("time", "data_time", 1, "seeded with the time"),
    ],
)
def test_a_broken_task_is_caught_and_named(fault, cause, step, words, tmp_path):
    muster = Certify(tmp_path, processes_per_host=1)
    code, said = muster.certify(
        f"configs/broken.py:{fault}",
        *("--interruptions=step:kill", "--topologies=none", "--steps=8", "--parallel=2"),
    )
    assert code == contract.EXIT_FAILED, said
    assert muster.certificate["verdict"] == "failed"
    first = muster.certificate["first_difference"]
    assert (first["cause"], first["step"]) == (cause, step)
    assert words in first["text"]
    assert words in said
    assert not muster.running()


def test_ctrl_c_leaves_nothing_running_and_says_75(tmp_path):
    muster = Certify(tmp_path)
    process = muster.start_it("configs/tiny.py:witness", "--config.num_steps=100")
    progress = muster.workdir / "certify" / "reference" / "run" / "attempts" / "000"
    wait_until(lambda: len(list(progress.glob("*.progress.json"))) == 2, "both processes to start")
    assert len(muster.running()) >= 4  # With their launcher and agent.
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == contract.EXIT_RESUMABLE, out + err
    assert "nothing is left running" in err
    assert not muster.running()
    assert not (muster.workdir / certificate.FILE).exists()
