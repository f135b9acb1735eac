"""What a plan says of memory: the compiler's own figures, and names where it does not fit."""

import jax
import pytest

from tests.plan.conftest import TINY_MLP, changed, make, tpu
from trainer.plan import compiled
from trainer.plan.text import report

FSDP = {"data": 1, "fsdp": 4}
WIDE = {"hidden": (1024, 1024)}
STATE = 3 * 4 * (1024 * 1024 + 13 * 1024 + 1)  # Params and two moments, float32.


def test_arguments_are_the_compilers_and_the_ledgers(monkeypatch):
    seen = []

    def kept(compile_with, function):
        def keeping(options):
            seen.append(compile_with(options))
            return seen[-1]

        return compiled.compile_for_plan(keeping, function)

    monkeypatch.setattr("trainer.plan.plan.compile_for_plan", kept)
    plan = make(changed(TINY_MLP, mesh=FSDP, model=WIDE), tpu("v5litepod-4"))
    stats = seen[0].memory_analysis()
    assert plan["argument_bytes"] == stats.argument_size_in_bytes
    assert plan["temp_bytes"] == stats.temp_size_in_bytes
    assert plan["output_bytes"] == stats.output_size_in_bytes
    assert plan["ledger"]["device_bytes"] == pytest.approx(STATE / 4, rel=0.01)
    # On the device arrays are padded to tiles, and there is the batch.
    assert plan["argument_bytes"] == pytest.approx(STATE / 4, rel=0.02)
    assert plan["fits"] is True
    assert plan["peak_bytes"] < plan["usable_hbm_bytes"] < plan["hbm_bytes"]


def test_one_that_is_too_large_names_what_fills_it(planned):
    # 6.4e9 numbers in the square kernel, 12 bytes each, over four devices of 16 GB.
    plan = planned(TINY_MLP, tpu("v5litepod-4"), mesh=FSDP, model={"hidden": (80_000, 80_000)})
    assert plan["fits"] is False
    assert plan["usable_hbm_bytes"] == int(15.75 * 2**30)  # In the compiler's own refusal.
    assert plan["peak_bytes"] > plan["usable_hbm_bytes"]
    assert plan["argument_bytes"] == pytest.approx(12 * 80_000**2 / 4, rel=0.01)
    arguments = [row["name"] for row in plan["largest_buffers"] if row["kind"] == "argument"]
    assert all("linears.1.kernel" in name or "layers.1.kernel" in name for name in arguments[:3])
    # 76 GB of state do not fit four devices of 16 GB in any way.
    assert plan["suggestions"] == []
    text = report(plan)
    assert "DOES NOT FIT" in text
    assert "too much" in text


def test_what_would_make_it_fit_is_said(planned):
    # Whole on each device 1.6e9 numbers take 19 GB; split over four, 5.
    wide = {"hidden": (20_000,) * 5}
    plan = planned(TINY_MLP, tpu("v5litepod-4"), mesh={"data": 4}, model=wide)
    assert plan["fits"] is False
    words = [row["overrides"] for row in plan["suggestions"]]
    assert ["--config.mesh.data=1", "--config.mesh.fsdp=4"] in words
    assert "--config.mesh.data=1 --config.mesh.fsdp=4" in report(plan)


def test_moments_that_are_not_split_show_in_the_ledger(planned, monkeypatch):
    from trainer import opt_state

    spec_of_state = opt_state.spec_of_state

    def broken(leaf, param, path, how):
        if "mu" in path.split("."):
            return jax.sharding.PartitionSpec()
        return spec_of_state(leaf, param, path, how)

    monkeypatch.setattr(opt_state, "spec_of_state", broken)
    plan = make(changed(TINY_MLP, mesh=FSDP, model=WIDE), tpu("v5litepod-4"))
    # A quarter of one moment's bytes on each device became all of them.
    more = STATE / 3 * (1 - 1 / 4)
    assert plan["ledger"]["device_bytes"] == pytest.approx(STATE / 4 + more, rel=0.01)
    assert plan["argument_bytes"] == pytest.approx(STATE / 4 + more, rel=0.02)
    assert plan["ledger"]["excess_bytes"] == pytest.approx(more, rel=0.01)
    assert plan["ledger"]["excess_bytes_by_axis"] == {"fsdp": plan["ledger"]["excess_bytes"]}
    assert "under-sharded" in report(plan)
    assert ".mu." in report(plan)
