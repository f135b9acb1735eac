"""The gate of a resume: what may differ from the stored run, and what is said of it."""

from __future__ import annotations

import json

import pytest

from launch import contract, rundir
from launch.spec import ConfigError, compare_code, compare_configs, compare_versions, resume

OLD = {
    "seed": 0,
    "num_steps": 5,
    "log_every_steps": 1,
    "global_batch_size": 8,
    "data": {"path": "a", "seq_len": 4, "prefetch": 1},
    "optimizer": {"chain": ["adamw"], "adamw": {"learning_rate": 0.1}},
    "mesh": {"fsdp": 1},
}


def changed(**fields):
    return {**OLD, **fields}


CLASSES = [
    ({"num_steps": 9}, "harmless"),
    ({"log_every_steps": 9}, "harmless"),
    ({"checkpoint": {"every_steps": 3}}, "harmless"),
    ({"mesh": {"fsdp": 2}}, "harmless"),
    ({"data": {**OLD["data"], "prefetch": 2}}, "harmless"),
    ({"seed": 1}, "refused"),
    ({"global_batch_size": 16}, "refused"),
    ({"data": {**OLD["data"], "seq_len": 8}}, "refused"),
    ({"optimizer": {"chain": ["adamw"], "adamw": {"learning_rate": 0.2}}}, "refused"),
    ({"model": {"dim": 3}}, "refused"),
    ({"restore": {"allow_change": "seed"}, "init_from": "/x"}, None),
]


@pytest.mark.parametrize(("fields", "kind"), CLASSES)
def test_every_field_is_in_its_class(fields, kind):
    judged = resume.judge(compare_configs(OLD, changed(**fields)), ())
    found = {name for name in ("harmless", "accepted", "refused") if getattr(judged, name)}
    assert found == ({kind} if kind else set())


@pytest.mark.parametrize(
    ("package", "old", "new", "harmless"),
    [
        ("jax", "0.10.1", "0.10.2", True),
        ("jax", "0.10.2", "0.11.0", False),
        ("grain", "0.2.18", "0.3.0", False),
        ("optax", "0.2.8", "1.2.8", False),
        ("Python", "3.11.7", "3.13.0", True),
        ("numpy", "1.0", "2.0", True),
    ],
)
def test_versions_count_but_for_their_last_number(package, old, new, harmless):
    (found,) = compare_versions({package: old, "gone": "1"}, {package: new, "libtpu": "0.0.42"})
    assert (found.field, found.harmless) == (f"versions.{package}", harmless)


def test_code_is_the_same_if_one_of_its_digests_is_and_new_files_are_no_change():
    old = {"task.py": "bytes1/syntax1", "gone.py": "a/b", "other.py": "1/2"}
    new = {"task.py": "bytes2/syntax1", "new.py": "c/d", "other.py": "3/4"}
    assert [str(found) for found in compare_code(old, new)] == ["code.other.py: changed"]


SEVERAL = changed(seed=1, data={"path": "b", "seq_len": 8, "prefetch": 1, "kind": "c", "x": 2})


def differences():
    return [*compare_configs(OLD, SEVERAL), *compare_code({"a.py": "1"}, {"a.py": "2"})]


def test_the_refusal_lists_what_differs_and_the_flag_that_allows_it():
    with pytest.raises(ConfigError) as caught:
        resume.refuse("/run", resume.judge(differences(), ()))
    text = str(caught.value)
    assert "config.seed: 0 there, 1 now" in text
    assert "code.a.py: changed" in text
    assert "give --config.restore.allow_change=data,seed,code," in text
    assert "\n" not in text


def test_the_flag_that_is_proposed_allows_all_of_it():
    judged = resume.judge(differences(), resume.names_for(differences()))
    assert not judged.refused
    assert len(judged.accepted) == 6


def test_a_name_allows_its_group_and_no_more():
    judged = resume.judge(differences(), ("data.path",))
    assert [found.field for found in judged.accepted] == ["config.data.path"]
    judged = resume.judge(differences(), ("dat",))
    assert not judged.accepted


def test_a_change_that_was_accepted_at_this_step_is_accepted_again_and_no_other():
    earlier = [{"field": "config.seed", "old": 0, "new": 1}]
    found = compare_configs(OLD, changed(seed=1))
    assert resume.judge(found, (), earlier).accepted
    assert resume.judge(compare_configs(OLD, changed(seed=2)), (), earlier).refused


def test_unknown_names_get_the_closest_and_known_ones_that_are_not_needed_are_let_pass():
    refused = compare_configs(OLD, changed(seed=1))
    resume.check_names(("data", "code", "versions.jax", "optimizer.adamw"), OLD, OLD, refused)
    with pytest.raises(ConfigError, match="'sed': names no field; did you mean 'seed'"):
        resume.check_names(("sed",), OLD, OLD, refused)
    with pytest.raises(ConfigError, match=r"did you mean 'optimizer\.adamw\.learning_rate'"):
        resume.check_names(("optimizer.adamw.learn_rate",), OLD, OLD, ())


def saved_run(path, step=10):
    """A run directory with one step, as far as the gate reads it; the config on record is newer."""
    meta = path / contract.CHECKPOINTS / str(step) / "meta"
    meta.mkdir(parents=True)
    (meta / "metadata").write_text(json.dumps({"step": step, "config": OLD}))
    (path / contract.CONFIG_RECORD).write_text(json.dumps({"schema": 1, **changed(seed=7)}))
    return path


def test_the_launcher_judges_by_what_the_newest_step_was_saved_with(tmp_path):
    run = saved_run(tmp_path)
    rundir.check_config(run, OLD)
    with pytest.raises(ConfigError, match=r"config\.seed: 0 there, 1 now"):
        rundir.check_config(run, changed(seed=1))
    rundir.check_config(run, changed(seed=1, restore={"allow_change": "config.seed"}))
    record = {"step": 10, "changes": [{"field": "config.seed", "old": 0, "new": 1}]}
    (run / contract.CHANGES).write_text(f"torn{{\n{json.dumps(record)}\n")
    rundir.check_config(run, changed(seed=1))


def test_a_run_that_has_saved_nothing_may_have_any_config(tmp_path):
    (tmp_path / contract.CHECKPOINTS).mkdir()
    (tmp_path / contract.CONFIG_RECORD).write_text(json.dumps({"schema": 1, **OLD}))
    rundir.check_config(tmp_path, changed(seed=1))
