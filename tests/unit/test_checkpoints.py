"""Checkpoints at rest: real Orbax steps, listed, verified, kept, deleted, copied and exported."""

from __future__ import annotations

import json
import os
import pathlib
import random
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from launch import checkpoints as of_launch
from launch.checkpoints import list_text
from launch.live import Live, LiveProcess
from launch.spec import CheckpointSpec, ConfigError
from launch.standing import KILLED, RUNNING, Standing
from tests.testing.packages import required_package
from tests.unit.test_checkpoint import abstract, assert_same, files_of, make_state, steps
from trainer import checksums
from trainer.checkpoint import Checkpointer
from trainer.checkpoints import copying, verify
from trainer.checkpoints import steps as listing
from trainer.checkpoints.__main__ import main
from trainer.checkpoints.delete import check as check_deletion

FLIPS = 300


def save(directory: pathlib.Path, *numbers: int, **spec: int) -> None:
    saver = Checkpointer(
        directory,
        CheckpointSpec(**spec),
        config={"seed": 3},
        record={"params": ["model.kernel", "model.scale"]},
    )
    for number in numbers:
        saver.save(number, model_state(number), {"next": number})
    saver.close()


def model_state(seed: int) -> dict[str, jax.Array]:
    state = make_state(seed)
    return {
        "model.kernel": state["params.layers.0.kernel"],
        "model.scale": state["params.layers.0.scale"],
        "model.rngs.key": state["rngs.key"],
        "optimizer.opt_state.average.kernel": state["params.layers.0.kernel"] + 1,
        "optimizer.opt_state.average.scale": state["params.layers.0.scale"].astype(jnp.float32) + 1,
    }


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Steps 10 and 20; copy the directory before changing it."""
    directory = tmp_path_factory.mktemp("at_rest") / "checkpoints"
    save(directory, 10, 20)
    return directory


@pytest.fixture
def copied(saved: pathlib.Path, tmp_path: pathlib.Path) -> pathlib.Path:
    return pathlib.Path(shutil.copytree(saved, tmp_path / "checkpoints"))


def flip(path: pathlib.Path, rng: random.Random) -> None:
    data = bytearray(path.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def states(directory: pathlib.Path) -> dict[str, str]:
    return {step.name: step.state for step in listing.list_steps(directory)}


def restored_step(directory: pathlib.Path) -> int:
    saver = Checkpointer(directory, CheckpointSpec(), config={})
    restored = saver.restore(abstract(model_state(0)))
    assert restored is not None
    assert_same(restored.state, model_state(restored.step))
    return restored.step


def test_300_of_300_flipped_bits_are_noticed_in_whatever_file(copied):
    rng = random.Random(8)
    step = copied / "20"
    files = [path for path in sorted(step.rglob("*")) if path.is_file() and path.stat().st_size]
    assert {"_CHECKPOINT_METADATA", "checksums.json", "metadata"} <= {path.name for path in files}
    assert verify.find(step).problem is None
    noticed = 0
    for number in range(FLIPS):
        # Every file in turn, the small ones as often as the large ones.
        victim = files[number % len(files)]
        before = victim.read_bytes()
        flip(victim, rng)
        noticed += verify.find(step, name_leaves=False).problem is not None
        victim.write_bytes(before)
    assert noticed == FLIPS
    assert verify.find(step).problem is None


def test_no_bit_of_a_manifest_can_flip_unseen(saved):
    text = (saved / "20" / "checksums.json").read_bytes()
    checksums.parse_manifest(text, "it")
    for place in range(8 * len(text)):
        data = bytearray(text)
        data[place // 8] ^= 1 << place % 8
        with pytest.raises(checksums.DamagedError):
            checksums.parse_manifest(bytes(data), "it")


def test_the_leaves_that_a_damage_hits_are_named(copied):
    bits = np.asarray(model_state(20)["model.kernel"]).tobytes()[:64]
    for path in files_of(copied / "20"):  # What is merged in the end is in two files.
        data = path.read_bytes()
        if bits in data:
            place = data.index(bits)
            path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
    assert verify.find(copied / "20").leaves == ("model.kernel",)
    assert restored_step(copied) == 10
    (aside,) = [step for step in listing.list_steps(copied) if step.state == listing.ASIDE]
    assert aside.name == "damaged/20-0"
    assert aside.problem is not None
    assert aside.problem.endswith("it hits model.kernel")


def test_numbers_that_changed_between_the_devices_and_the_disk_are_noticed(tmp_path, monkeypatch):
    """The files are as they were written, and still not what was on the devices."""
    save(tmp_path, 10)
    saver = Checkpointer(tmp_path, CheckpointSpec(), config={})
    take = saver._snapshot.take

    def damaging(state):
        copy = dict(take(state))
        copy["model.kernel"] = copy["model.kernel"].at[3, 5].add(1e-6)
        return copy

    monkeypatch.setattr(saver._snapshot, "take", damaging)
    saver.save(20, model_state(20), None, final=True)
    assert verify.find(tmp_path / "20").problem is None
    assert restored_step(tmp_path) == 10
    (aside,) = [step for step in listing.list_steps(tmp_path) if step.state == listing.ASIDE]
    assert "model.kernel: the numbers read are not those that were saved" in str(aside.problem)


def test_the_list_tells_the_condition_of_every_step_and_which_one_is_resumed_from(copied):
    (copied / "30").mkdir()
    shutil.copytree(copied / "20", copied / "40.orbax-checkpoint-tmp")
    shutil.copytree(copied / "20", copied / "damaged" / "15-0")
    victim = max(files_of(copied / "20"), key=lambda path: path.stat().st_size)
    victim.write_bytes(victim.read_bytes()[:-1])
    found = listing.list_steps(copied)
    assert {step.name: step.state for step in found} == {
        "40.orbax-checkpoint-tmp": listing.UNFINISHED,
        "30": listing.BROKEN,
        "20": listing.BROKEN,
        "10": listing.COMPLETE,
        "damaged/15-0": listing.ASIDE,
    }
    assert [step.step for step in found if step.resume] == [10]
    assert found[1].problem == "checksums.json is missing"
    assert "bytes instead of" in str(found[2].problem)
    text = list_text({"directory": "D", "steps": [step.as_json() for step in found]})
    line = next(line for line in text.splitlines() if line.startswith("10 "))
    assert "complete" in line
    assert line.endswith("a resume takes this one")


def test_what_a_verification_found_is_in_the_list_until_the_step_is_another_one(copied):
    rng = random.Random(0)
    flip(copied / "20" / "meta" / "metadata", rng)
    for step in listing.list_steps(copied):
        verify.verify(copied, step)
    found = {step.step: step for step in listing.list_steps(copied)}
    assert found[10].verified is not None
    assert found[10].verified.ok
    assert found[10].resume
    assert found[20].state == listing.BROKEN
    shutil.rmtree(copied / "20")
    save(copied, 20)
    assert listing.list_steps(copied)[0].verified is None


def test_a_flip_that_no_restore_minds_is_told_and_keeps_no_step_from_use(copied):
    flip(copied / "20" / "_CHECKPOINT_METADATA", random.Random(0))
    report = verify.verify(copied, listing.list_steps(copied)[0])
    assert (report["ok"], report["usable"]) == (False, True)
    assert "no restore needs it" in report["problem"]
    assert restored_step(copied) == 20


def test_retention_never_deletes_the_only_good_step(tmp_path):
    """Newer ones that are damaged or unfinished must not push it out."""
    save(tmp_path, 10)
    shutil.copytree(tmp_path / "10", tmp_path / "20")  # Will be known to be damaged,
    flip(tmp_path / "20" / "meta" / "metadata", random.Random(0))
    verify.verify(tmp_path, listing.list_steps(tmp_path)[0])
    shutil.copytree(tmp_path / "10", tmp_path / "30")  # lacks a file,
    (tmp_path / "30" / "state" / "_METADATA").unlink()
    (tmp_path / "40").mkdir()  # is no step at all.
    save(tmp_path, 50, keep_last=2)
    assert {10, 50} <= set(steps(tmp_path))
    (tmp_path / "50" / "checksums.json").unlink()
    save(tmp_path, 60, keep_last=2)
    assert {10, 60} <= set(steps(tmp_path))
    save(tmp_path, 70, keep_last=2)
    assert 10 not in steps(tmp_path)  # There are two good ones now.
    assert {60, 70} <= set(steps(tmp_path))


def test_the_only_good_step_is_not_deleted_nor_one_that_is_being_saved(copied):
    (copied / "30").mkdir()
    shutil.copytree(copied / "20", copied / "40.orbax-checkpoint-tmp")
    found = listing.list_steps(copied)

    def refusal(*words: str, live: str | None = None) -> str | None:
        chosen = [step for word in words for step in listing.find_steps(found, word)]
        try:
            check_deletion(found, chosen, live)
        except ConfigError as error:
            return str(error)
        return None

    assert refusal("10") is None
    assert refusal("20", "30", "40") is None
    assert "steps 20, 10 are all the good ones" in str(refusal("10", "20"))
    assert "40.orbax-checkpoint-tmp is being saved" in str(refusal("40", live="running"))
    assert "the run is starting" in str(refusal("10", live="starting"))
    assert main(["delete", str(copied), "20", "30"]) == 0
    assert steps(copied) == [10]
    with pytest.raises(ConfigError, match="step 10 is the only good one"):
        main(["delete", str(copied), "10"])
    with pytest.raises(ConfigError, match="no step '11'; there are"):
        main(["delete", str(copied), "11"])
    assert steps(copied) == [10]


def test_a_copy_is_verified_and_can_be_restored_and_is_not_made_of_damage(copied, tmp_path):
    target = tmp_path / "other"
    left = target / "checkpoints" / "20.orbax-checkpoint-tmp" / "junk"
    left.mkdir(parents=True)  # A copy that was cut off.
    assert main(["copy", str(copied), "20", str(target)]) == 0
    assert not (target / "checkpoints" / "20" / "junk").exists()
    assert restored_step(target / "checkpoints") == 20
    with pytest.raises(ConfigError, match="is there already"):
        main(["copy", str(copied), "20", str(target)])
    flip(copied / "10" / "meta" / "metadata", random.Random(0))
    with pytest.raises(ConfigError, match="step 10 is damaged and not copied"):
        main(["copy", str(copied), "10", str(target)])
    assert states(target / "checkpoints") == {"20": listing.COMPLETE}


def test_a_copy_that_went_wrong_leaves_nothing(copied, tmp_path, monkeypatch):
    real = copying._copy_file

    def damaging(source, target):
        real(source, target)
        if target.name == "metadata":
            flip(target, random.Random(0))

    monkeypatch.setattr(copying, "_copy_file", damaging)
    with pytest.raises(ConfigError, match="the copy differs from the step"):
        main(["copy", str(copied), "20", str(tmp_path / "other")])
    assert not list((tmp_path / "other" / "checkpoints").iterdir())


@pytest.mark.parametrize("ema", [False, True])
def test_params_are_exported_in_their_dtypes_under_their_paths(copied, tmp_path, ema):
    safetensors = required_package("safetensors")
    file = tmp_path / "params.safetensors"
    assert main(["export", str(copied), "20", str(file), *["--ema"] * ema]) == 0
    with safetensors.safe_open(file, "numpy") as opened:
        assert set(opened.keys()) == {"kernel", "scale"}
        found = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        metadata = opened.metadata()
    assert str(found["scale"].dtype) == "bfloat16"
    wanted = model_state(20)
    for name, array in found.items():
        expected = np.asarray(wanted[f"model.{name}"]).astype(np.float32) + ema
        np.testing.assert_allclose(array.astype(np.float32), expected, rtol=ema * 1e-2, atol=0)
    assert (metadata["step"], metadata["params"]) == ("20", "ema" if ema else "params")
    assert len(metadata["config_sha256"]) == 64
    with pytest.raises(ConfigError, match="is there already"):
        main(["export", str(copied), "20", str(file)])


def test_a_list_imports_no_jax(saved):
    code = (
        "import sys; from trainer.checkpoints.__main__ import main; "
        f"main(['list', {str(saved)!r}]); print('jax' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ
    )
    report, imported = done.stdout.splitlines()
    assert imported == "False"
    assert [step["step"] for step in json.loads(report)["steps"]] == [20, 10]


@pytest.mark.parametrize(
    ("phases", "options"),
    [
        (None, []),
        ([], ["--live=starting"]),
        (["step", None], ["--live=starting"]),
        (["restore", "restore"], ["--live=starting"]),
        (["step", "save"], ["--live=running"]),
    ],
)
def test_a_live_run_is_told_from_one_that_may_be_reading(phases, options, monkeypatch, tmp_path):
    processes = tuple(LiveProcess(0, "h", 1, 3, phase) for phase in phases or ())
    state = KILLED if phases is None else RUNNING
    found = Standing(state, None, False, Live(0.0, 0, "running", None, processes), None, None)
    monkeypatch.setattr(of_launch, "standing", lambda path: found)
    assert of_launch._live(tmp_path) == options
