"""What a step will take, without compiling it."""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import pytest

from launch.spec import MeshSpec, train_spec
from launch.topology import CHIPS
from tests.testing import tiny
from trainer.mesh import abstract_mesh
from trainer.plan.candidates import candidates, meshes
from trainer.plan.estimate import estimate
from trainer.plan.search import remat_policies
from trainer.plan.trace import Amount, layout_on, trace
from trainer.prepare import prepare
from trainer.task import load_task

L, D, F, V, LAYERS, QH, KH = 32, 32, 64, 256, 2, 32, 16


@functools.cache
def traced(remat="none"):
    spec, task, _ = prepared(remat)
    return trace(task, layout_on(jax.devices()[0], spec, task))


def prepared(remat="none", num_devices=4, **fields):
    config = tiny.get_config()
    with config.unlocked():
        config.model.scan_layers = True
        config.model.remat = remat
        for name, value in fields.items():
            config[name] = value
    spec = train_spec(config, num_devices)
    task = load_task(spec.task, spec.model, spec.data)
    return spec, task, prepare(spec, task, abstract_mesh(spec.mesh))


def test_flops_are_those_of_the_products_with_what_is_computed_again():
    # Forward, and twice as much backward: projections, scores and values of all positions, head.
    layer = 2 * L * D * (2 * QH + 2 * KH + 3 * F) + 4 * L * L * QH
    head = 2 * L * D * V
    assert sum(traced("none").flops) == 3 * (LAYERS * layer + head)
    # All of a layer again but its last product, whose result nobody needs.
    again = LAYERS * (layer - 2 * L * F * D)
    assert sum(traced("full").flops) == pytest.approx(3 * (LAYERS * layer + head) + again)


def test_remat_keeps_less():
    policies = ("none", "dots_with_no_batch_dims_saveable", "full")
    none, dots, full = (sum(traced(policy).kept) for policy in policies)
    assert full < dots < none
    # Of each layer its input, and around the layers the logits and little else.
    inputs = LAYERS * L * D * 4
    head_and_loss = 3 * L * V * 4 + 8 * L * D * 4
    assert inputs < full < inputs + head_and_loss


def test_what_tensor_splits_is_what_shrinks_with_its_weights():
    found = traced("full")
    inputs = LAYERS * L * D * 4  # Of each layer, whole on every device.
    logits = L * V * 4
    assert inputs <= found.kept.whole < inputs + logits
    assert logits <= found.kept.split < 2 * logits
    assert found.widest == Amount(logits, 0)
    assert found.flops.whole == 0
    assert traced("none").kept.split > 0.6 * sum(traced("none").kept)
    # Nothing of a model whose parameters name no axes.
    config = tiny.get_config("witness")
    spec = train_spec(config, 4)
    task = load_task(spec.task, spec.model, spec.data)
    found = trace(task, layout_on(jax.devices()[0], spec, task))
    assert found.kept.split == found.flops.split == 0
    assert found.kept.whole > 0


def test_the_state_is_exact_and_memory_falls_with_microbatches_and_sharding():
    def figures(**fields):
        spec, task, ready = prepared(**fields)
        found = estimate(spec, task, ready, traced(), CHIPS["v5e"])
        assert found.state_bytes == ready.ledger.device_bytes
        assert found.peak_bytes == found.state_bytes + found.temp_bytes
        assert found.temp_bytes == int(sum(found.temp_parts.values()))
        return found

    base = figures()
    split = figures(mesh={"data": 1, "fsdp": 4})
    cut = figures(num_microbatches=4)
    assert split.state_bytes < base.state_bytes / 3
    assert cut.temp_parts["kept"] == base.temp_parts["kept"] / 4
    assert base.bounds["compute"] == cut.bounds["compute"] > 0
    # Gathered twice and scattered once, to an all-reduce: half as much again.
    assert split.link_bytes["ici"] == pytest.approx(1.5 * base.link_bytes["ici"], rel=0.05)
    assert cut.link_bytes["ici"] == pytest.approx(4 * base.link_bytes["ici"])
    both = figures(mesh={"data": 1, "fsdp": 4}, num_microbatches=4)
    assert both.link_bytes["ici"] == pytest.approx(4 * split.link_bytes["ici"])
    assert figures(mesh={"data": 2, "dcn_data": 2}).link_bytes["dcn"] > 0


@pytest.mark.parametrize("slices", [1, 2])
def test_meshes_are_all_there_are(slices):
    found = list(meshes(16, slices))
    assert len(set(found)) == len(found)
    assert len(found) == {1: 15, 2: 2 * 10}[slices]
    for mesh in found:
        assert math.prod(dataclasses.astuple(mesh)) == 16
        assert mesh.dcn_data * mesh.dcn_fsdp == slices
        assert mesh.resolve(16) == mesh


def test_ways_divide_the_batch_and_leave_out_what_changes_nothing():
    ways = list(candidates(MeshSpec(2, 2, 1), remat=("none", "full"), global_batch_sizes=(16, 10)))
    assert {way.num_microbatches for way in ways} == {1, 2, 4}
    assert {way.global_batch_size for way in ways} == {16}
    assert len(ways) == 3 * 2 * 2
    alone = candidates(MeshSpec(1, 4, 1), remat=(None,), global_batch_sizes=(4,))
    [only] = alone
    assert only.optimizer_axes == ()
    assert "model.remat" not in only.fields()


def test_the_configs_own_remat_is_among_those_tried():
    assert remat_policies(None) == [None]
    assert remat_policies("checkpoint_dots")[0] == "checkpoint_dots"
    assert remat_policies("full").count("full") == 1
