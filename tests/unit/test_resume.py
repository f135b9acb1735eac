"""How a training begins, in one process with real checkpoints: as it was, in part, or elsewhere."""

from __future__ import annotations

import json
import pathlib
import shutil
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from launch import contract
from launch.spec import CheckpointSpec, ConfigError, plain, train_spec
from tests.testing import tiny
from trainer import resume
from trainer.checkpoint import Checkpointer
from trainer.mesh import make_mesh
from trainer.prepare import prepare
from trainer.resume import Beginning, Resume
from trainer.state import StateLayout, init_state
from trainer.task import load_task

SOFTWARE = {"code": {"task.py": "1/1"}, "versions": {"jax": "0.10.2"}}


class Start:
    """One start of the tiny training in a run directory, as far as the state's beginning."""

    def __init__(
        self,
        workdir: pathlib.Path,
        software: Any = None,
        restore: Any = None,
        init_from: str = "",
        **fields: Any,
    ):
        config = tiny.get_config("witness")
        config.mesh.data = 1
        config.seed = 3
        for name, value in fields.items():
            config[name] = value
        with config.unlocked():
            config.restore = restore or {}
            config.init_from = str(init_from)
        self.record = json.loads(json.dumps(plain(config)))
        spec = train_spec(config, 1)
        self.layout: StateLayout = layout_of(spec)
        self.software = {**SOFTWARE, **(software or {})}
        self.saver = Checkpointer(
            workdir / contract.CHECKPOINTS,
            CheckpointSpec(keep_last=9),
            config=self.record,
            record={**self.software, "params": sorted(self.layout.params)},
        )
        record = {"config": self.record, **self.software}
        began = Resume(spec, str(workdir), record, self.layout).begin(self.saver)
        self.began: Beginning = began

    @property
    def state(self) -> dict[str, np.ndarray]:
        return {
            name: np.asarray(jax.random.key_data(leaf) if "key<" in str(leaf.dtype) else leaf)
            for name, leaf in self.layout.as_dict(self.began.leaves).items()
        }

    def save(self, step: int, add: float = 0.0) -> None:
        """Save as if that many steps had been made, each of which adds to every number."""
        state = {
            name: leaf + add if leaf.dtype == np.float32 else leaf
            for name, leaf in self.layout.as_dict(self.began.leaves).items()
        }
        self.saver.save(step, state, {"next_index": step}, final=True)
        self.saver.close()


_LAYOUTS: dict[str, StateLayout] = {}


def layout_of(spec: Any) -> StateLayout:
    """Tracing a model takes a second: once for every optimizer and model."""
    key = repr((spec.optimizer, spec.model, spec.seed))
    if key not in _LAYOUTS:
        mesh = make_mesh(spec.mesh, jax.devices()[:1])
        task = load_task(spec.task, spec.model, spec.data)
        _LAYOUTS[key] = prepare(spec, task, mesh).layout
    return _LAYOUTS[key]


@pytest.fixture(scope="module", autouse=True)
def compiled_once() -> Iterator[None]:
    """Compiling an initial state takes a second: once for every layout and choice of leaves."""
    made: dict[Any, Any] = {}

    def init_once(layout: StateLayout, only: Any = None) -> Any:
        key = id(layout), only
        if key not in made:
            made[key] = init_state(layout, only)
        return made[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(resume, "init_state", init_once)
        yield


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> pathlib.Path:
    """A run with step 10, of which every number is one more than at the start."""
    workdir = tmp_path_factory.mktemp("saved") / "run"
    Start(workdir).save(10, add=1.0)
    return workdir


@pytest.fixture
def run(saved, tmp_path) -> pathlib.Path:
    return pathlib.Path(shutil.copytree(saved, tmp_path / "run"))


def changes(run: pathlib.Path) -> list[dict[str, Any]]:
    file = run / contract.CHANGES
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def equal(one: dict[str, np.ndarray], two: dict[str, np.ndarray]) -> set[str]:
    return {name for name in one if np.array_equal(one[name], two[name])}


def test_a_resume_takes_all_and_records_nothing(run):
    start = Start(run)
    assert (start.began.step, start.began.data_position) == (10, {"next_index": 10})
    fresh = Start(run.parent / "new").state
    assert equal(start.state, {name: leaf + 1 for name, leaf in fresh.items()}) >= set(
        start.layout.params
    )
    assert changes(run) == []


def test_what_changes_the_numbers_is_refused_until_it_is_named_and_then_recorded_once(run, capsys):
    other = {"software": {"code": {"task.py": "2/2"}}, "seed": 4}
    with pytest.raises(ConfigError, match=r"config\.seed: 3 there, 4 now; code\.task\.py: changed"):
        Start(run, **other)
    with pytest.raises(ConfigError, match=r"\(config\.seed: 3 there, 4 now\)"):
        Start(run, restore={"allow_change": "code"}, **other)
    assert changes(run) == []
    for _ in range(2):  # The second start is a restart before the first save.
        Start(run, restore={"allow_change": "code,seed"}, log_every_steps=5, **other)
    out = capsys.readouterr().out
    assert "changed since, harmless: config.log_every_steps 1 -> 5" in out
    assert "changed after step 10, as allowed: config.seed 3 -> 4, code.task.py" in out
    (record,) = changes(run)
    assert record["step"] == 10
    assert [change["field"] for change in record["changes"]] == ["config.seed", "code.task.py"]
    Start(run, **other)  # Recorded as accepted: the flag is not asked for again.
    assert "note:" not in out
    start = Start(run, restore={"allow_change": "code,seed,data"}, **other)
    assert "nothing differs that config.restore.allow_change=data allows" in capsys.readouterr().out
    start.save(11)
    Start(run, **other)
    with pytest.raises(ConfigError, match=r"config\.seed: 4 there, 3 now"):
        Start(run)


def test_a_fresh_optimizer_is_fresh_once(run, capsys):
    restore = {"fresh_optimizer": True}
    start = Start(run, restore=restore)
    old, fresh = Start(run).state, Start(run.parent / "new").state
    optimizer = {name for name in start.state if name.startswith("optimizer.")}
    assert equal(start.state, fresh) >= optimizer
    assert equal(start.state, old) >= set(start.state) - optimizer
    assert (start.began.step, start.began.data_position) == (10, {"next_index": 10})
    assert start.began.optimizer_began == 10  # Schedules start anew there.
    start.save(11, add=0.5)
    capsys.readouterr()
    again = Start(run, restore=restore)
    assert "config.restore was applied before step 11 was saved" in capsys.readouterr().out
    assert again.began.optimizer_began == 10
    moved = {name: leaf for name, leaf in again.state.items() if leaf.dtype == np.float32}
    assert not equal(moved, fresh)
    assert [record["restore"]["fresh_optimizer"] for record in changes(run)] == [True]


def test_another_optimizer_is_refused_with_the_way_out_and_the_way_works(run):
    sgd = {"learning_rate": 0.1, "momentum": 0.9}
    optimizer = ConfigDict({"chain": ("sgd",), "sgd": sgd})
    allow = {"allow_change": "optimizer"}
    with pytest.raises(ConfigError, match=r"give --config\.restore\.fresh_optimizer=true"):
        Start(run, restore=allow, optimizer=optimizer)
    assert not (run / contract.CHANGES).exists()
    start = Start(run, restore={**allow, "fresh_optimizer": True}, optimizer=optimizer)
    assert start.began.step == 10


def test_leaves_that_are_skipped_start_fresh(run):
    start = Start(run, restore={"skip": r"\bdown\."})
    old, fresh = Start(run).state, Start(run.parent / "new").state
    down = {name for name in start.state if ".down." in name}
    assert len(down) == 6
    assert equal(start.state, fresh) >= down
    assert equal(start.state, old) >= set(start.state) - down


def test_renamed_params_come_with_their_moments(run):
    """The checkpoint is made to have other names than the model has."""
    start = Start(run)
    state = {
        name.replace(".up.", ".lift."): leaf
        for name, leaf in start.layout.as_dict(start.began.leaves).items()
    }
    start.saver.save(20, state, {"next_index": 20}, final=True)
    with pytest.raises(ConfigError) as caught:
        Start(run)
    assert """give --config.restore.rename='{"lift": "up"}' if that is""" in str(caught.value)
    found = Start(run, restore={"rename": '{"lift": "up"}'})
    assert found.began.step == 20
    assert equal(found.state, start.state) == set(start.state)


def test_another_runs_params_are_a_beginning_at_step_0_and_only_once(run, tmp_path, capsys):
    new = tmp_path / "fine"
    Start(run, restore={"allow_change": "seed"}, seed=5).save(11, add=2.0)
    source = Start(run, seed=5)
    for init_from in (run, run / contract.CHECKPOINTS, f"{run}/checkpoints/11", f"{run}@11"):
        start = Start(new, init_from=init_from)
        assert (start.began.step, start.began.data_position) == (0, None)
        params = start.layout.params
        assert equal(start.state, source.state) >= params
        fresh = Start(tmp_path / "fresh").state
        assert equal(start.state, fresh) >= set(start.state) - params
        assert not equal({n: start.state[n] for n in params}, fresh)
        first = changes(new)[-1]["init_from"]
        assert (first["step"], first["directory"]) == (11, str(run / contract.CHECKPOINTS))
    start.save(5)
    capsys.readouterr()
    again = Start(new, init_from=f"{run}@11")
    assert "started from the params" not in capsys.readouterr().out
    assert again.began.step == 5
    assert Start(new).began.step == 5  # It may be left out now.
    (new / contract.CHANGES).unlink()  # As of a copy: the step itself knows.
    assert Start(new, init_from=f"{run}@11").began.step == 5
    with pytest.raises(ConfigError, match="this run is at step 5 already and cannot start from"):
        Start(new, init_from=f"{run}@10")
    for wrong, message in [
        (f"{run}@12", "has no step 12; it has 10, 11"),
        (tmp_path, "holds no checkpoints"),
    ]:
        with pytest.raises(ConfigError, match=message):
            Start(tmp_path / "other", init_from=wrong)


def test_the_source_of_another_run_is_not_touched(run, tmp_path):
    left = run / contract.CHECKPOINTS / "20.orbax-checkpoint-tmp"
    left.mkdir()
    bad = run / contract.CHECKPOINTS / "30"
    bad.mkdir()
    before = sorted(str(path) for path in run.rglob("*"))
    assert Start(tmp_path / "fine", init_from=run).began.step == 0
    assert sorted(str(path) for path in run.rglob("*")) == before


def test_a_source_that_does_not_fit_is_refused_with_the_way_out(run, tmp_path):
    start = Start(run)
    state = dict(start.layout.as_dict(start.began.leaves))
    state["model.down.kernel"] = jnp.zeros((16, 2))
    start.saver.save(20, state, None, final=True)
    new = tmp_path / "fine"
    with pytest.raises(ConfigError, match=r"restore\.skip='down\\.kernel'"):
        Start(new, init_from=run)
    assert Start(new, init_from=run, restore={"skip": "down.kernel"}).began.step == 0
