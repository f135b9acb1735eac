"""Traffic that a plan tells against what each parallelism must move, in closed form."""

import pytest

from tests.plan.conftest import TINY_LM, tpu

LAYERS, DIM, MLP, VOCAB = (
    TINY_LM["model"][key] for key in ("num_layers", "dim", "mlp_dim", "vocab_size")
)
LENGTH, BATCH = TINY_LM["data"]["seq_len"], TINY_LM["global_batch_size"]
LAYER = 4 * DIM * DIM + 3 * DIM * MLP
NUMBERS = LAYERS * LAYER + 2 * VOCAB * DIM  # Of what is multiplied by; norms are 0.1% beside it.
BF16 = 2


def sent(plan: dict, link: str = "ici") -> float:
    return plan["link_bytes"].get(link, 0.0)


def share(n: int) -> float:
    return (n - 1) / n


@pytest.mark.parametrize("scanned", [True, False])
def test_pure_data_parallelism_reduces_each_gradient_once(planned, scanned):
    plan = planned(TINY_LM, tpu("v5litepod-4"), mesh={"data": 4}, model={"scan_layers": scanned})
    assert sent(plan) == pytest.approx(2 * share(4) * NUMBERS * BF16, rel=0.05)
    assert plan["least_bytes"]["ici"] == pytest.approx(sent(plan), rel=0.05)
    axes = {tuple(row["axes"]) for row in plan["collectives"]}
    assert axes == {("data",)}


@pytest.mark.parametrize("scanned", [True, False])
def test_pure_fsdp_gathers_twice_and_scatters_once(planned, scanned):
    mesh = {"data": 1, "fsdp": 4}
    plan = planned(TINY_LM, tpu("v5litepod-4"), mesh=mesh, model={"scan_layers": scanned})
    assert sent(plan) == pytest.approx(3 * share(4) * NUMBERS * BF16, rel=0.05)
    assert plan["least_bytes"]["ici"] == pytest.approx(sent(plan), rel=0.05)
    kinds = {row["kind"] for row in plan["collectives"] if row["bytes"] > 0.01 * sent(plan)}
    assert kinds == {"all-gather", "reduce-scatter"}


@pytest.mark.parametrize("scanned", [True, False])
def test_fsdp_with_tensor_adds_activations(planned, scanned):
    mesh = {"data": 1, "fsdp": 2, "tensor": 2}
    plan = planned(TINY_LM, tpu("v5litepod-4"), mesh=mesh, model={"scan_layers": scanned})
    weights = 3 * share(2) * NUMBERS / 2 * BF16
    by_axes = {}
    for row in plan["collectives"]:
        axes = tuple(row["axes"])
        by_axes[axes] = by_axes.get(axes, 0.0) + row["bytes"]
    assert by_axes[("fsdp",)] == pytest.approx(weights, rel=0.05)
    # An array of activations, [B / 2, L, D], all-reduced over two devices.
    one = 2 * share(2) * BATCH / 2 * LENGTH * DIM * BF16
    # Attention and MLP forward, attention again in the backward, and the two of their inputs'
    # gradients; of either end of the model one.
    assert by_axes[("tensor",)] == pytest.approx((5 * LAYERS + 2) * one, rel=0.05)


def test_what_crosses_slices_goes_over_dcn(planned):
    mesh = {"data": 1, "fsdp": 4, "dcn_data": 2}
    plan = planned(TINY_LM, tpu("v5litepod-4", slices=2), mesh=mesh)
    # Each device exchanges the gradient of its own shard with its like in the other slice.
    assert sent(plan, "dcn") == pytest.approx(2 * share(2) * NUMBERS / 4 * BF16, rel=0.05)
    assert plan["least_bytes"]["dcn"] == pytest.approx(sent(plan, "dcn"), rel=0.05)
    assert sent(plan) == pytest.approx(3 * share(4) * NUMBERS * BF16, rel=0.05)
    assert {tuple(row["axes"]) for row in plan["collectives"] if row["link"] == "dcn"} == {
        ("data",)
    }
