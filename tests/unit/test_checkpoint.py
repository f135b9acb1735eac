"""One process, real Orbax, real files."""

from __future__ import annotations

import json
import pathlib
import random
import resource
import shutil
import threading
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from launch.spec import CheckpointSpec, ConfigError
from trainer.checkpoint import Checkpointer, CheckpointError
from trainer.checkpoint_choice import probe
from trainer.checkpoint_directory import PROBE, steps_to_drop
from trainer.snapshot import Snapshot


def make_state(seed: int = 0) -> dict[str, jax.Array]:
    key = jax.random.key(seed)
    return {
        "params.layers.0.kernel": jax.random.normal(key, (16, 24)),
        "params.layers.0.scale": jax.random.normal(key, (24,), jnp.bfloat16),
        "opt_state.0.count": jnp.int32(seed),
        "rngs.key": jax.random.key(seed + 1),
        "rngs.keys": jax.random.split(jax.random.key(seed, impl="rbg"), 2),
    }


def abstract(state: dict[str, jax.Array]) -> dict[str, jax.ShapeDtypeStruct]:
    return {
        name: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=array.sharding)
        for name, array in state.items()
    }


def assert_same(found: dict[str, jax.Array], wanted: dict[str, jax.Array]) -> None:
    assert found.keys() == wanted.keys()
    for name, array in wanted.items():
        assert found[name].dtype == array.dtype, name
        raw = [
            jax.random.key_data(a) if jnp.issubdtype(a.dtype, jax.dtypes.prng_key) else a
            for a in (found[name], array)
        ]
        np.testing.assert_array_equal(np.asarray(raw[0]), np.asarray(raw[1]), err_msg=name)


def checkpointer(directory: pathlib.Path, clock: Any = None, **spec: Any) -> Checkpointer:
    more = {"clock": clock} if clock else {}
    return Checkpointer(directory, CheckpointSpec(**spec), config={"seed": 3}, **more)


def steps(directory: pathlib.Path) -> list[int]:
    return sorted(int(path.name) for path in directory.iterdir() if path.name.isdigit())


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A directory with steps 10 and 20; copy it before changing it."""
    directory = tmp_path_factory.mktemp("two_steps") / "checkpoints"
    saver = checkpointer(directory)
    for step in (10, 20):
        saver.save(step, make_state(step), {"next": step})
    saver.close()
    return directory


@pytest.fixture
def copied(two_steps: pathlib.Path, tmp_path: pathlib.Path) -> pathlib.Path:
    return pathlib.Path(shutil.copytree(two_steps, tmp_path / "checkpoints"))


def test_what_is_restored_is_what_was_saved(two_steps):
    restored = checkpointer(two_steps).restore(abstract(make_state()))
    assert restored is not None
    assert restored.step == 20
    assert restored.data_position == {"next": 20}
    assert restored.config == {"seed": 3}
    assert_same(restored.state, make_state(20))


def test_a_run_without_checkpoints_starts_fresh(tmp_path):
    assert checkpointer(tmp_path / "new").restore(abstract(make_state())) is None


def test_a_save_holds_the_state_of_its_call_though_it_is_donated_and_overwritten(tmp_path):
    update = jax.jit(
        lambda state: {name: array + 1 for name, array in state.items()}, donate_argnums=0
    )
    saver = checkpointer(tmp_path, keep_last=9)
    state = {"a": jnp.zeros((512, 512)), "b": jnp.zeros((7,))}
    for step in range(1, 6):
        state = update(state)
        saver.save(step, state, None)
        state = update(state)
        state = update(state)
        expected = 3.0 * (step - 1) + 1
        saver.wait()
        restored = checkpointer(tmp_path).restore(abstract(state))
        assert restored is not None
        assert restored.step == step
        for array in restored.state.values():
            np.testing.assert_array_equal(np.asarray(array), expected)


def test_the_snapshot_stays_in_the_memory_it_has(tmp_path):
    state = {"a": jnp.ones((256, 1024)), "b": jnp.ones((512, 1024))}
    snapshot, saver = Snapshot(), checkpointer(tmp_path)
    first = {name: a.unsafe_buffer_pointer() for name, a in snapshot.take(state).items()}
    assert {name: a.unsafe_buffer_pointer() for name, a in snapshot.take(state).items()} == first
    assert not set(first.values()) & {a.unsafe_buffer_pointer() for a in state.values()}
    pointers = []
    for step in (1, 2, 3):  # Orbax must have let go of it, too.
        saver.save(step, state, None, final=True)
        pointers.append({n: a.unsafe_buffer_pointer() for n, a in saver._snapshot._copy.items()})
    assert pointers[0] == pointers[1] == pointers[2]


def test_the_last_and_every_nth_are_kept(tmp_path):
    saver = checkpointer(tmp_path, keep_last=2, keep_every_steps=4)
    for step in range(1, 8):
        saver.save(step, {"a": jnp.ones(3)}, None)
    saver.close()
    assert steps(tmp_path) == [4, 6, 7]


@pytest.mark.parametrize(
    ("steps", "keep_last", "keep_every", "dropped"),
    [
        ([], 1, 0, []),
        ([5], 1, 0, []),
        ([5, 6, 7], 1, 0, [5, 6]),
        ([7, 6, 5], 2, 0, [5]),
        ([2, 4, 6, 8], 1, 4, [2, 6]),
        ([1, 2], 5, 0, []),
    ],
)
def test_retention_drops(steps, keep_last, keep_every, dropped):
    assert steps_to_drop(steps, keep_last, keep_every) == dropped


def test_leftovers_of_an_unfinished_save_are_named_and_deleted(copied, caplog):
    left = copied / "30.orbax-checkpoint-tmp"
    shutil.copytree(copied / "20", left)
    restored = checkpointer(copied).restore(abstract(make_state()))
    assert restored is not None
    assert restored.step == 20
    assert not left.exists()
    assert str(left) in caplog.text


def test_only_an_unfinished_save_is_a_fresh_start(tmp_path):
    (tmp_path / "10.orbax-checkpoint-tmp" / "state").mkdir(parents=True)
    assert checkpointer(tmp_path).restore(abstract(make_state())) is None


def test_a_directory_that_only_looks_like_a_step_is_set_aside(copied, caplog):
    (copied / "101").mkdir()
    restored = checkpointer(copied).restore(abstract(make_state()))
    assert restored is not None
    assert restored.step == 20
    assert (copied / "damaged" / "101-0").is_dir()
    assert "101" in caplog.text
    assert "checksums.json is missing" in caplog.text


def files_of(step: pathlib.Path) -> list[pathlib.Path]:
    """Every file that a restore reads, and the manifest."""
    items = sorted(path for path in step.rglob("*") if path.is_file() and path.parent != step)
    return [*items, step / "checksums.json"]


def test_a_flipped_bit_is_noticed_in_whatever_file(two_steps, tmp_path, caplog):
    rng = random.Random(0)
    flipped = 0
    for name in [path.relative_to(two_steps) for path in files_of(two_steps / "20")]:
        directory = pathlib.Path(shutil.copytree(two_steps, tmp_path / f"{flipped}"))
        victim = directory / name
        data = bytearray(victim.read_bytes())
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        victim.write_bytes(data)
        restored = checkpointer(directory).restore(abstract(make_state()))
        assert restored is not None
        assert restored.step == 10, f"a flipped bit in {name} passed unseen"
        assert_same(restored.state, make_state(10))
        assert (directory / "damaged" / "20-0").is_dir()
        assert victim.name in caplog.text
        caplog.clear()
        flipped += 1
    assert flipped > 8


@pytest.mark.parametrize("harm", ["truncate", "remove"])
def test_a_shorter_or_missing_file_is_noticed(copied, harm):
    victim = max(files_of(copied / "20"), key=lambda path: path.stat().st_size)
    if harm == "remove":
        victim.unlink()
    else:
        victim.write_bytes(victim.read_bytes()[:-1])
    restored = checkpointer(copied).restore(abstract(make_state()))
    assert restored is not None
    assert restored.step == 10


def test_metadata_that_orbax_changes_at_the_commit_is_not_needed_to_restore(copied):
    for name in ("_CHECKPOINT_METADATA", "commit_success.txt"):
        (copied / "20" / name).unlink()
    restored = checkpointer(copied).restore(abstract(make_state()))
    assert restored is not None
    assert_same(restored.state, make_state(20))


def test_no_usable_step_is_an_error_and_stays_one(copied):
    for step in ("10", "20"):
        (copied / step / "checksums.json").unlink()
    for _ in range(2):  # A second start must not take the empty directory for a new run.
        with pytest.raises(CheckpointError, match="none of the checkpoints"):
            checkpointer(copied).restore(abstract(make_state()))


def test_training_goes_on_over_a_step_that_was_set_aside(copied):
    (copied / "20" / "checksums.json").unlink()
    saver = checkpointer(copied)
    saver.restore(abstract(make_state()))
    saver.save(20, make_state(99), None, final=True)
    restored = checkpointer(copied).restore(abstract(make_state()))
    assert restored is not None
    assert_same(restored.state, make_state(99))


def test_another_state_is_refused_and_every_difference_listed(two_steps):
    wanted = abstract(make_state())
    wanted["params.new"] = wanted.pop("params.layers.0.scale")
    kernel = wanted["params.layers.0.kernel"]
    wanted["params.layers.0.kernel"] = jax.ShapeDtypeStruct((16, 25), kernel.dtype)
    wanted["opt_state.0.count"] = jax.ShapeDtypeStruct((), jnp.float32)
    with pytest.raises(ConfigError) as caught:
        checkpointer(two_steps).restore(wanted)
    for part in (
        "params.new is not saved there",
        "params.layers.0.scale is not in this run",
        "params.layers.0.kernel is float32[16, 24] there, float32[16, 25] here",
        "opt_state.0.count is int32[] there, float32[] here",
    ):
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)


def test_due_follows_steps_and_the_clock(tmp_path):
    now = [100.0]
    saver = checkpointer(tmp_path, clock=lambda: now[0], every_steps=10, every_seconds=60.0)
    assert saver.due(10)
    assert not saver.due(11)
    now[0] += 61
    assert not saver.due(12, logging_step=False)
    assert saver.due(12)
    saver.save(12, {"a": jnp.ones(2)}, None)
    assert not saver.due(12), "saved already"
    now[0] += 59
    assert not saver.due(15)
    now[0] += 2
    assert saver.due(15)
    saver.close()


def test_without_rules_nothing_is_due(tmp_path):
    saver = checkpointer(tmp_path, clock=lambda: 0.0)
    assert not any(saver.due(step) for step in range(1, 50))


def test_the_newest_step_saved_again_is_the_same_and_an_older_one_is_refused(tmp_path):
    saver = checkpointer(tmp_path)
    saver.save(5, {"a": jnp.ones(2)}, {"n": 1})
    saver.save(5, {"a": jnp.zeros(2)}, {"n": 2}, final=True)
    with pytest.raises(ValueError, match="step 5 is there"):
        saver.save(4, {"a": jnp.ones(2)}, None)
    restored = checkpointer(tmp_path).restore(abstract({"a": jnp.ones(2)}))
    assert restored is not None
    assert restored.data_position == {"n": 1}


def test_a_step_of_somebody_else_is_never_passed_over(two_steps):
    with pytest.raises(CheckpointError, match="already exists"):
        checkpointer(two_steps).save(20, make_state(), None)


def test_a_directory_that_cannot_be_written_is_one_clear_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"file/checkpoints.*cannot be written.*--workdir"):
        checkpointer(tmp_path / "file" / "checkpoints")


def check_until_raised(saver: Checkpointer) -> None:
    for _ in range(3000):
        saver.check()
        time.sleep(0.01)


def test_a_failed_save_is_raised_by_check_and_the_last_good_one_stays(tmp_path):
    saver = checkpointer(tmp_path)
    state = {"a": jnp.ones((512, 512))}
    saver.save(1, state, None, final=True)
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64 * 2**10, unlimited[1]))  # stands for a full disk
    try:
        saver.save(2, state, None)
        with pytest.raises(CheckpointError, match=r"saving step 2 .*; step 1 is untouched"):
            check_until_raised(saver)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    restored = checkpointer(tmp_path).restore(abstract(state))
    assert restored is not None
    assert restored.step == 1
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_dir()) == ["1"], (
        "leftovers were not deleted"
    )


def test_a_clock_that_is_set_while_a_save_is_on_its_way_does_not_fail_it(tmp_path, monkeypatch):
    now, moved = time.time, []

    def jumping() -> float:
        if threading.current_thread().name == "async_save":  # Orbax's, until it has committed.
            moved.append(10_000.0)
        return now() + sum(moved)

    monkeypatch.setattr(time, "time", jumping)
    saver = checkpointer(tmp_path)
    saver.save(1, make_state(1), None, final=True)
    assert moved
    assert saver.good_step == 1


def test_a_save_that_takes_too_long_has_failed(tmp_path):
    saver = Checkpointer(tmp_path, CheckpointSpec(), config={}, save_timeout_seconds=1.0)
    go_on = threading.Event()
    saver.before_commit = go_on.wait
    try:
        saver.save(1, make_state(1), None)
        assert not saver.check()
        with pytest.raises(CheckpointError, match=r"step 1 .* failed .* not done after 1 s; there"):
            check_until_raised(saver)
    finally:
        go_on.set()
    assert saver.good_step in (None, 1)


def test_the_manifest_has_every_file_that_a_restore_reads(two_steps):
    manifest = json.loads((two_steps / "20" / "checksums.json").read_text())
    listed = {two_steps / "20" / name for name in manifest["files"]}
    assert listed == set(files_of(two_steps / "20")) - {two_steps / "20" / "checksums.json"}


@pytest.mark.parametrize(("steps", "kind"), [([], ConfigError), (["5"], CheckpointError)])
def test_a_directory_that_took_steps_once_is_no_wrong_config(tmp_path, steps, kind):
    for step in steps:
        (tmp_path / step).mkdir()
    (tmp_path / PROBE).mkdir()  # Nothing can be written there, as on a full disk.
    with pytest.raises(kind, match="cannot be written: Is a directory"):
        probe(tmp_path)
