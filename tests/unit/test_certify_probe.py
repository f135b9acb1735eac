"""What `muster certify` has in the trained process: digests, faults, the drift of two states."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from launch import contract
from launch.spec import CheckpointSpec, train_spec
from tests.testing import tiny
from trainer.certify import asked_for, drift, recorder
from trainer.certify.faults import AskedFor, Fault, Faults
from trainer.checkpoint import Checkpointer
from trainer.mesh import make_mesh
from trainer.prepare import prepare
from trainer.task import load_task


def test_without_being_asked_nothing_of_it_is_imported(monkeypatch):
    monkeypatch.delenv(contract.CERTIFY_PLAN, raising=False)
    assert asked_for() is None
    # All of it that `trainer.train` imports.
    assert "from trainer import certify, " in (tiny.ROOT / "trainer/train.py").read_text()
    code = "import trainer.certify, sys; print([m for m in sys.modules if 'certify' in m])"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tiny.ROOT
    )
    assert done.stdout == "['trainer.certify']\n"


def over(*axes: Any) -> NamedSharding:
    mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("data", "fsdp"))
    return NamedSharding(mesh, P(*axes))


def test_each_part_of_an_array_is_digested_once_by_its_place_and_its_bytes():
    values = np.arange(32, dtype=np.float32).reshape(8, 4)
    digests = recorder.digests_of(jax.device_put(values, over("fsdp")))
    assert digests == {
        "0:4,0:4": recorder.digest(values[:4]),
        "4:8,0:4": recorder.digest(values[4:]),
    }
    assert recorder.digests_of(jnp.float32(1.5)).keys() == {""}
    one_bit = values.copy()
    one_bit.view(np.uint32)[7, 3] ^= 1
    changed = recorder.digests_of(jax.device_put(one_bit, over("fsdp")))
    assert [place for place in digests if digests[place] != changed[place]] == ["4:8,0:4"]
    assert recorder.digest(np.zeros(3)) == recorder.ZEROS
    # 0.0 and -0.0 are not the same bits.
    assert recorder.digest(-np.zeros(3, np.float32)) != recorder.ZEROS


def test_a_key_is_digested_by_its_numbers():
    key = jax.device_put(jax.random.key(3), over())
    assert recorder.digests_of(key) == recorder.digests_of(jax.random.key(3))
    assert recorder.digests_of(key) != recorder.digests_of(jax.random.key(4))


def test_rows_are_digested_over_all_their_arrays_and_numbered_in_the_global_batch():
    x = np.arange(24, dtype=np.float32).reshape(8, 3)
    y = np.arange(8, dtype=np.int32)
    sharding = over(("data", "fsdp"))
    batch = {"x": jax.device_put(x, sharding), "y": jax.device_put(y, sharding)}
    found = dict(recorder.rows_of(batch))
    assert sorted(found) == list(range(8))
    assert len(set(found.values())) == 8
    assert found[5] == recorder.row_digest([("x", x[5]), ("y", y[5])])
    other = {**batch, "y": jax.device_put(y + (y == 5), sharding)}
    changed = dict(recorder.rows_of(other))
    assert [row for row in found if found[row] != changed[row]] == [5]


def test_leaves_are_known_for_what_they_are():
    spec = train_spec(tiny.get_config("witness"), 8)
    task = load_task(spec.task, spec.model, spec.data)
    layout = prepare(spec, task, make_mesh(spec.mesh)).layout
    kinds = recorder.kinds_of(layout)
    assert set(kinds) == set(layout.names)
    assert kinds["model.up.kernel"] == "params"
    assert kinds["model.dropout.rngs.count"] == "rng"
    assert kinds["model.seen"] == "model"
    assert {kind for name, kind in kinds.items() if name.startswith("optimizer.")} == {"optimizer"}
    assert recorder._kind("model.norm.mean", nnx.BatchStat, layout) == "batch_statistics"


# ------------------------------------------------------------------ faults


def fault(number: int, **fields: Any) -> Fault:
    given = {"kind": "exception", "phase": "step", "step": 4, "process": 1, "delay_seconds": 0.0}
    return Fault(id=number, **{**given, **fields})


def faults(planned: list[Fault], folder: Path, process: int = 1, attempt: int = 0) -> Faults:
    return Faults(planned, folder, process_id=process, num_processes=2, attempt=attempt)


def test_a_fault_comes_in_its_phase_at_its_step_to_its_process_and_once(tmp_path):
    planned = [fault(1), fault(2, phase="eval", step=6)]
    other, mine = faults(planned, tmp_path, process=0), faults(planned, tmp_path)
    for one in (other, mine):
        one.befall("save", 4, "")
        one.befall("step", 3, "")
        assert one.due("step", 4)
    other.befall("step", 4, "")
    with pytest.raises(AskedFor, match=r"interruption 1 .* at step 5"):
        mine.befall("step", 5, "after the update")  # At the first chance behind its step.
    mine.befall("step", 6, "")
    mark = json.loads((tmp_path / "fault-01.process-00001.json").read_text())
    assert (mark["phase"], mark["step"], mark["process"]) == ("step", 5, 1)
    assert mine.marked(planned[0])
    # The next attempt has the next fault, and the one after none.
    later = faults(planned, tmp_path, attempt=1)
    assert later.fault == planned[1]
    with pytest.raises(AskedFor):
        later.befall("eval", 6, "")
    assert faults(planned, tmp_path, attempt=2).fault is None
    faults(planned, tmp_path, attempt=2).befall("eval", 9, "")


# ------------------------------------------------------------------ drift


def save(folder: Path, values: dict[str, Any]) -> Path:
    saver = Checkpointer(folder, CheckpointSpec(), config={})
    saver.save(1, {name: jnp.asarray(value) for name, value in values.items()}, {}, final=True)
    saver.close()
    return folder / "1"


def test_drift_is_told_in_parts_of_the_way_and_whole_numbers_must_be_the_same(tmp_path):
    kinds = {"w": "params", "mu": "optimizer"}
    start = {"w": np.zeros(4, np.float32), "mu": np.zeros(2, np.float32), "n": np.int32(1)}
    end = {"w": np.full(4, 2, np.float32), "mu": np.ones(2, np.float32), "n": np.int32(9)}
    key = {"key": jax.random.key(1)}
    parted, reference = save(tmp_path / "a", start | key), save(tmp_path / "b", end | key)
    off = {**end, "w": np.array([2, 2, 2, 2.2], np.float32), "n": np.int32(8)}
    runs = {
        "same": save(tmp_path / "c", end | key),
        "off": save(tmp_path / "d", off | {"key": jax.random.key(2)}),
    }
    found = drift.measure(parted, reference, runs, kinds)
    assert found["same"]["exact"]
    assert (found["same"]["params"], found["same"]["unequal"]) == (0.0, [])
    assert not found["off"]["exact"]
    assert found["off"]["params"] == pytest.approx(0.2 / 4, rel=1e-5)  # Of a way of norm 4.
    assert found["off"]["worst"]["leaf"] == "w"
    assert sorted(found["off"]["unequal"]) == ["key", "n"]
    assert os.path.isdir(reference)  # Nothing is moved or deleted.
