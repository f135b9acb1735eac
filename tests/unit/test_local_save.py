"""Local checkpoints of a process alone: what is kept, what goes, and what is gone on from."""

from __future__ import annotations

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from launch import contract
from launch.errors import ConfigError
from launch.spec import CheckpointSpec
from trainer import local_resume
from trainer.local_checkpoints import LocalCheckpoints

RECORD = {"config": {"seed": 1}}


class Run:
    """A run directory and a host's own storage."""

    def __init__(self, folder):
        self.workdir = folder / "run"
        self.workdir.mkdir()
        self.spec = CheckpointSpec(local_dir=str(folder / "local"), local_every_steps=5)

    def start(self, record=RECORD) -> LocalCheckpoints:
        return LocalCheckpoints(self.spec, str(self.workdir), record)


@pytest.fixture
def run(tmp_path) -> Run:
    return Run(tmp_path)


def state(step: int) -> dict[str, jax.Array]:
    where = NamedSharding(Mesh(np.array(jax.devices()[:1]), ("data",)), P())
    return jax.device_put(
        {"w": jnp.full((4, 3), step, jnp.bfloat16), "key": jax.random.key(step), "n": step}, where
    )


def resume(local: LocalCheckpoints, newer_than: int | None = None):
    abstract = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state(0)
    )
    found = local_resume.restore(local, abstract, newer_than)
    if found is not None:
        wanted = state(found.step)
        assert jnp.array_equal(found.state["w"], wanted["w"])
        assert found.state["w"].dtype == jnp.bfloat16
        assert jax.random.key_data(found.state["key"]).tolist() == [0, found.step]
        assert int(found.state["n"]) == found.step
    return found


def steps(local: LocalCheckpoints) -> list[int]:
    return [entry.step for entry in local.files.entries()]


def test_the_newest_two_stay_until_a_shared_checkpoint_is_there(run):
    local = run.start()
    assert [step for step in range(1, 16) if local.due(step)] == [5, 10, 15]
    for step in (5, 10, 15):
        assert local.save(step, state(step), {"next": step})
    assert steps(local) == [15, 10]
    assert resume(local, newer_than=14).data_position == {"next": 15}
    assert resume(local, newer_than=15) is None
    local.committed(10)
    assert steps(local) == [15]
    local.close(15)
    assert not local.files.path.exists()


def test_metrics_are_on_the_disk_before_a_step_is(run):
    local = run.start()
    seen = []
    local.before_save = lambda: seen.append(steps(local))
    local.save(5, state(5), None)
    local.save(5, state(5), None)  # It is there already.
    assert seen == [[]]
    local.close(None)


def test_what_an_earlier_attempt_saved_stays_until_there_is_something_newer(run):
    first = run.start()
    first.save(5, state(5), None)
    first.save(10, state(10), None)
    first.close(None)
    second = run.start()
    assert resume(second).step == 10
    assert steps(second) == [10, 5]
    second.save(15, state(15), None)
    assert steps(second) == [15, 10]
    second.save(20, state(20), None)
    assert steps(second) == [20, 15]
    second.close(None)


def test_a_state_that_is_found_corrupted_is_not_gone_on_from(run):
    first = run.start()
    first.save(5, state(5), None)
    first.close(None)
    second = run.start()
    assert resume(second).step == 5
    second.save(10, state(10), None)
    second.distrust()
    assert steps(second) == [5]
    second.close(None)


def test_steps_of_a_course_that_was_left_are_not_come_back_to(run):
    first = run.start()
    first.save(10, state(10), None)
    first.close(None)
    second = run.start()  # It goes on from a shared step 4, and gets to 8.
    second.committed(8)
    assert steps(second) == []
    second.close(8)


def test_a_run_begun_anew_or_copied_does_not_find_the_steps_of_another(run, tmp_path):
    local = run.start()
    local.save(5, state(5), None)
    local.close(None)
    shutil.copytree(run.workdir, tmp_path / "copy")
    copy = LocalCheckpoints(run.spec, str(tmp_path / "copy"), RECORD)
    assert resume(copy) is None
    copy.close(None)
    assert not copy.files.path.exists()
    again = run.start()
    assert resume(again).step == 5
    again.close(None)
    for change in ("not json", "{}", None):
        record = run.workdir / contract.LOCAL_RECORD
        record.unlink() if change is None else record.write_text(change)
        anew = run.start()
        assert resume(anew) is None
        anew.close(None)


def test_another_config_is_told_and_not_restored(run, capsys):
    local = run.start()
    local.save(5, state(5), None)
    local.close(None)
    other = run.start({"config": {"seed": 2}})
    assert resume(other) is None
    assert "step 5 is not used: config.seed changed since" in capsys.readouterr().out
    other.close(None)
    for told in ({"restore": {"fresh": ("optimizer",)}}, {"init_from": "elsewhere"}):
        told_to = run.start({"config": {"seed": 1, **told}})
        assert resume(told_to) is None
        told_to.close(None)


def test_a_local_directory_that_cannot_be_made_is_refused(run, tmp_path):
    (tmp_path / "local").write_text("a file")
    with pytest.raises(ConfigError, match=r"config\.checkpoint\.local_dir=.*File exists"):
        run.start()
