"""Which way to run a step is compiled next, and how ways are ranked and told."""

from __future__ import annotations

from typing import Any

import pytest

from launch.plan.choice import Correction, Way, next_way, overrides, ranked
from launch.plan.ranking import as_record, as_text
from launch.plan.search import _Base
from launch.spec import load_config
from tests.testing.plans import GIB, Files, record

USABLE = 16 * GIB


def way(temp_gib: float, seconds: float | None, **fields: Any) -> Way:
    """A way of 1 GiB of state."""
    all_fields = {
        **{f"mesh.{name}": 1 for name in ("data", "tensor", "dcn_data", "dcn_fsdp")},
        "mesh.fsdp": 4,
        "model.remat": "none",
        "num_microbatches": 1,
        "sharding.optimizer_axes": (),
        "global_batch_size": 8,
    }
    all_fields |= {name.replace("__", "."): value for name, value in fields.items()}
    estimate = {
        "state_bytes": GIB,
        "temp_bytes": int(temp_gib * GIB),
        "peak_bytes": int((1 + temp_gib) * GIB),
        "usable_hbm_bytes": USABLE,
        "step_seconds_bound": seconds,
        "bound_by": "compute",
        "bounds": {"compute": seconds},
        "link_bytes": {"ici": GIB},
    }
    return Way(all_fields, "v5litepod-4", 4, 1000, estimate)


def compiled(one: Way, temp_gib: float) -> Way:
    """The same, as a plan has it."""
    peak = int((1 + temp_gib) * GIB)
    one.record = record(
        fits=peak <= USABLE,
        peak_bytes=peak,
        temp_bytes=int(temp_gib * GIB),
        usable_hbm_bytes=USABLE,
        step_seconds_bound=one.estimate["step_seconds_bound"],
    )
    return one


def test_the_quickest_that_is_estimated_to_fit_comes_first():
    quick_and_large = way(20, 1.0)
    quick, slow = way(10, 2.0, model__remat="dots"), way(2, 3.0, model__remat="full")
    assert next_way([slow, quick_and_large, quick], []) is quick
    assert next_way([quick_and_large], []) is quick_and_large  # It may be estimated wrongly.


def test_steps_of_other_batches_compare_by_the_token():
    small, large = way(2, 1.0), way(2, 1.5, global_batch_size=16)
    large.tokens = 2000
    assert ranked([small, large]) == [large, small]
    # One that ties is not better for a smaller batch, which hides less in each of its steps.
    large.estimate["step_seconds_bound"] = 2.0
    small.estimate["bounds"] = {"compute": 1.0, "ici": 0.5}
    large.estimate["bounds"] = {"compute": 2.0, "ici": 0.5}
    assert ranked([small, large]) == [large, small]


def test_a_bound_that_ties_is_told_apart_by_what_it_hides_and_by_fewer_microbatches():
    plain, cut = way(2, 1.0), way(1, 1.0, num_microbatches=4)
    traffic = way(0.5, 1.0, mesh__tensor=4, mesh__fsdp=1)
    traffic.estimate["bounds"] = {"compute": 1.0, "ici": 0.9}
    assert ranked([traffic, cut, plain]) == [plain, cut, traffic]


def test_what_differs_only_in_memory_from_what_fits_is_not_compiled():
    first, cut = way(2, 1.0), way(1, 1.0, num_microbatches=4)
    other = way(1, 2.0, model__remat="full")
    assert next_way([first, cut, other], [first]) is other
    assert next_way([compiled(first, 2), cut, other], []) is other
    assert next_way([compiled(first, 2), cut], []) is None


def test_where_one_does_not_fit_only_smaller_ones_of_its_family_are_tried():
    first, more = way(10, 1.0), way(12, 1.1, sharding__optimizer_axes=("data",))
    less = way(8, 1.2, num_microbatches=2)
    assert next_way([compiled(first, 20), more, less], []) is less
    first.record, first.error = None, "killed"
    assert next_way([first, more, less], []) is less


def test_accelerators_take_turns():
    quick, next_quick, slow = (way(2, 1.0 + n, mesh__fsdp=4 + n) for n in range(3))
    slow.accelerator = "v5litepod-8"
    assert next_way([quick, next_quick, slow], [quick]) is slow
    assert next_way([compiled(quick, 2), next_quick, compiled(slow, 2)], []) is next_quick


def test_estimates_are_corrected_by_what_was_compiled():
    seen = [compiled(way(2, 1.0), 4), compiled(way(3, 1.0), 6), compiled(way(1, 1.0), 1)]
    correction = Correction.of(seen)
    assert correction.temp == 2
    assert correction.peak_bytes(way(3, 1.0)) == 7 * GIB
    assert not correction.fits(way(8, 1.0))
    assert correction.fits(seen[0])
    assert Correction.of([way(1, 1.0)]).temp == 1
    # What one remat policy shows is not taken for another's, where that one has shown something.
    seen.append(compiled(way(2, 1.0, model__remat="full"), 1))
    correction = Correction.of(seen)
    assert correction.peak_bytes(way(4, 1.0, model__remat="full")) == 3 * GIB
    assert correction.peak_bytes(way(4, 1.0)) == 9 * GIB


def test_where_no_memory_is_known_all_fits_and_the_smallest_is_first():
    large, small = way(20, None), way(10, None, num_microbatches=2)
    for one in (large, small):
        one.estimate["usable_hbm_bytes"] = None
    assert ranked([large, small])[0] in (large, small)
    assert Correction().fits(large)


def test_the_table_says_what_was_compiled_and_gives_words_to_copy():
    best = compiled(way(2, 1.0), 4)
    best.overrides = ("--config.mesh.fsdp=4", '--config.sharding.optimizer_axes=("data",)')
    worse = way(3, 2.0, num_microbatches=2, model__remat="full")
    too_large = compiled(way(15, 0.5, mesh__fsdp=2), 20)
    left_out = [{"reason": "config.mesh: does not divide", "meshes": [{}, {}]}]
    text = as_text([too_large, worse, best], left_out)
    _, first, second, third, *rest = text.splitlines()
    assert "fsdp=4, remat none (compiled)" in first
    assert first.split()[-11:-2] == [
        "yes",
        "1",
        "s",
        "1,000",
        "compute",
        "5.0",
        "GiB",
        "11.0",
        "GiB",
    ]
    assert "2 microbatches (estimated)" in second
    assert "yes?" in second
    assert " no " in third
    assert "-5.0 GiB" in third
    assert "left out: 2 meshes: config.mesh: does not divide" in rest
    words = """--config.mesh.fsdp=4 '--config.sharding.optimizer_axes=("data",)'"""
    assert f"  1  {words}" in rest
    assert "  2  (nothing)" in rest
    found = as_record([too_large, worse, best], left_out, interrupted=False)
    assert [(row["compiled"], row["fits"]) for row in found["rows"]] == [
        (True, True), (False, True), (True, False)]  # fmt: skip
    assert found["rows"][0]["overrides"] == list(best.overrides)


def test_the_table_shows_one_of_a_family_and_all_that_was_compiled():
    ways = [way(2, 1.0, num_microbatches=n) for n in (1, 2, 4)]
    others = [way(2, 2.0 + n, mesh__fsdp=n) for n in range(5, 25)]
    last = compiled(way(1, 100.0, mesh__fsdp=30, num_microbatches=2), 1)
    sibling = way(1, 90.0, mesh__fsdp=30)
    text = as_text([*ways, *others, last, sibling], [])
    rows = text.split("\n\n")[0].splitlines()[1:]
    assert len(rows) == 13
    assert sum("fsdp=4," in row for row in rows) == 1
    assert "fsdp=30" in rows[-1]
    assert "12 more ways" in text


def test_what_tells_ways_apart_is_named():
    a, b = way(2, 1.0), way(2, 2.0, global_batch_size=16)
    b.accelerator = "v6e-4"
    text = as_text([a, b], [])
    assert "v5litepod-4, fsdp=4, remat none, batch 8 (estimated)" in text
    assert "v6e-4, fsdp=4, remat none, batch 16 (estimated)" in text


OWN = {
    "data=-1": ({"mesh.data": -1, "mesh.fsdp": 1}, ("--config.mesh.fsdp=4",)),
    "fsdp=-1": ({"mesh.data": 1, "mesh.fsdp": -1}, ()),
    "both": ({"mesh.data": 4, "mesh.fsdp": 1}, ("--config.mesh.data=1", "--config.mesh.fsdp=4")),
}


@pytest.mark.parametrize("name", OWN)
def test_only_what_differs_is_overridden(name):
    own, words = OWN[name]
    assert overrides({"mesh.data": 1, "mesh.fsdp": 4}, own) == words


@pytest.mark.parametrize("given", ["", "--config.sharding.optimizer_axes=('data',)"])
@pytest.mark.parametrize("axes", [(), ("data",)])
def test_the_words_of_a_way_give_its_config_whatever_was_given_before(given, axes, tmp_path):
    files = Files(tmp_path)
    words = [f"--config={files.config}", *([given] if given else []), "--config.seed=5"]
    base = _Base.of(
        load_config("config", [*words, "--config.mesh.fsdp=2"]),
        load_config("cluster", [f"--cluster={files.cluster}"]),
    )
    fields = way(1, 1.0, sharding__optimizer_axes=list(axes), num_microbatches=2).fields
    row = {"fields": {k: v for k, v in fields.items() if k != "model.remat"},
           "accelerator": "v6e-4", "devices": 4, "tokens_per_step": 8}  # fmt: skip
    question = base.question(base.way(row))
    config = question.config
    assert question.cluster.accelerator == "v6e-4"
    assert (config.mesh.fsdp, config.num_microbatches, config.seed) == (4, 2, 5)
    sharding = config.get("sharding")
    assert tuple(sharding.optimizer_axes if sharding else ()) == axes
