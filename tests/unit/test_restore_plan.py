"""Which leaves of a checkpoint become which leaves of the state."""

from __future__ import annotations

import pytest

from launch.spec import ConfigError, RestoreSpec
from trainer import restore_plan


def leaf(*shape, dtype="float32"):
    return {"shape": list(shape), "dtype": dtype}


def state(*paths, shape=(4, 8)):
    """Params with Adam's moments, and the optimizer's counters."""
    found = {"optimizer.step": leaf(dtype="uint32"), "optimizer.opt_state.0.count": leaf()}
    for path in paths:
        found[f"model.{path}"] = leaf(*shape)
        for moment in ("mu", "nu"):
            found[f"optimizer.opt_state.0.{moment}.{path}"] = leaf(*shape)
    return found


SAVED = state("body.0.kernel", "body.1.kernel", "head.kernel", "head.bias")


def plan(saved=SAVED, wanted=SAVED, params=None, **spec):
    return restore_plan.make(saved, wanted, RestoreSpec(**spec), "PATH", params)


def refused(**kwargs):
    with pytest.raises(ConfigError) as caught:
        plan(**kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_everything_is_taken_as_it_is():
    assert plan() == restore_plan.RestorePlan({name: name for name in SAVED}, (), 0)


def test_what_is_skipped_starts_fresh_with_its_moments_and_may_have_any_shape_or_be_gone():
    wanted = {**SAVED, **state("head.kernel", shape=(4, 99))}
    del wanted["model.head.bias"]
    found = plan(wanted=wanted, skip=r"\bhead\.")
    assert all("head" in name for name in found.fresh)
    assert len(found.fresh) == 5  # The kernel, and two moments of each.
    assert not any("head" in name for name in found.names)


def test_only_takes_what_it_finds():
    found = plan(only=r"^model\.body")
    assert list(found.names) == ["model.body.0.kernel", "model.body.1.kernel"]


def test_a_fresh_optimizer_takes_the_model_alone_whatever_the_optimizer_was():
    wanted = {name: it for name, it in SAVED.items() if name.startswith("model.")}
    wanted["optimizer.opt_state.0.trace.head.kernel"] = leaf(4, 8)
    found = plan(wanted=wanted, fresh_optimizer=True)
    assert all(name.startswith("model.") for name in found.names)
    assert found.fresh == ("optimizer.opt_state.0.trace.head.kernel",)


@pytest.mark.parametrize(
    "rename",
    [
        {"body": "trunk.layers"},
        {"model.body": "model.trunk.layers"},
        {r"body\.(\d+)": r"trunk.layers.\1"},
        '{"body": "trunk.layers"}',
    ],
)
def test_renamed_params_take_their_moments_along(rename):
    wanted = state("trunk.layers.0.kernel", "trunk.layers.1.kernel", "head.kernel", "head.bias")
    found = plan(wanted=wanted, rename=rename)
    assert found.fresh == ()
    assert found.renamed == 6
    assert found.names["model.trunk.layers.0.kernel"] == "model.body.0.kernel"
    assert (
        found.names["optimizer.opt_state.0.nu.trunk.layers.1.kernel"]
        == "optimizer.opt_state.0.nu.body.1.kernel"
    )


def test_a_rename_takes_whole_keys_only():
    assert "'bod' is the beginning of no path" in refused(rename={"bod": "x"})
    assert "there are body.0-1.kernel" in refused(rename={"bod": "x"})


def test_a_rename_that_makes_one_of_two_is_refused():
    assert "makes model.head.kernel of both" in refused(rename={r"body\.\d": "head"})


def test_only_params_are_taken_to_start_another_run():
    theirs = [name for name in SAVED if name.startswith("model.")]
    wanted = state("body.0.kernel", "body.1.kernel", "new.kernel")
    ours = {name for name in wanted if name.startswith("model.")}
    found = plan(wanted=wanted, params=(theirs, ours), skip="head|new")
    assert list(found.names) == ["model.body.0.kernel", "model.body.1.kernel"]
    text = refused(wanted=wanted, params=(theirs, ours), skip="new")
    assert "model.head.kernel is not in this run" in text
    assert "optimizer" not in text.partition("; give ")[0]


def test_every_difference_is_told_with_the_way_out():
    text = refused(wanted={**SAVED, "model.head.kernel": leaf(4, 9)})
    assert "model.head.kernel is float32[4, 8] there, float32[4, 9] here" in text
    assert r"--config.restore.skip='head\.kernel'" in text
    wanted = {**SAVED, "optimizer.opt_state.1.trace": leaf(3)}
    assert "--config.restore.fresh_optimizer=true" in refused(wanted=wanted)
    text = refused(wanted=state("trunk.0.kernel", "trunk.1.kernel", "head.kernel", "head.bias"))
    assert """--config.restore.rename='{"body": "trunk"}' if that is what it is""" in text
    text = refused(wanted=state("trunk.0.kernel", "rest.kernel", "head.kernel", "head.bias"))
    assert "--config.restore.skip=" in text
    assert "if that is what it is" not in text


def test_an_expression_that_is_found_nowhere_is_refused():
    for field in ("only", "skip"):
        assert f"config.restore.{field}='hed': is found in no path" in refused(**{field: "hed"})


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"only": "("}, "not a regular expression"),
        ({"rename": "{old}"}, 'must be {"old.path": "new.path"}'),
        ({"rename": {"(": "x"}}, "not a regular expression"),
        ({"rename": '{"a": 1}'}, 'must be {"old.path": "new.path"}'),
        ({"rename": {"head": r"\2"}}, "cannot take the place of"),
    ],
)
def test_what_cannot_be_is_refused(spec, message):
    assert message in refused(**spec)
