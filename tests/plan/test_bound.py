"""The bound on a step's time is one: no step that is run here is quicker."""

import time

import jax
import pytest

from launch.spec import cluster_spec, train_spec
from tests.plan.conftest import TINY_LM, TINY_MLP, changed, make
from trainer.mesh import batch_sharding, make_mesh
from trainer.prepare import prepare
from trainer.state import init_state
from trainer.step import compile_train_step, make_train_step
from trainer.task import load_task

SMALL = {"dim": 128, "num_heads": 4, "head_dim": 32, "mlp_dim": 256, "vocab_size": 256}
LOCAL = {"backend": "local", "devices_per_process": 1}


@pytest.mark.parametrize(
    "config",
    [
        changed(TINY_LM, model={**SMALL, "dtype": "float32"}),
        changed(TINY_MLP, model={"hidden": (1024, 1024)}),
    ],
    ids=["lm", "mlp"],
)
def test_a_step_is_never_quicker_than_its_bound(config):
    plan = make(config, LOCAL)
    spec = train_spec(config, cluster_spec(LOCAL).num_devices)
    task = load_task(spec.task, spec.model, spec.data)
    mesh = make_mesh(spec.mesh, jax.devices()[:1])
    layout = prepare(spec, task, mesh).layout
    batch = {
        name: jax.numpy.zeros(
            (spec.global_batch_size, *one.shape), one.dtype, device=batch_sharding(mesh)
        )
        for name, one in task.example_spec().items()
    }
    run = compile_train_step(make_train_step(task, layout), layout, batch)
    leaves = init_state(layout)
    times = []
    for _ in range(6):
        began = time.perf_counter()
        leaves, _ = jax.block_until_ready(run(leaves, batch))
        times.append(time.perf_counter() - began)
    assert 0 < plan["step_seconds_bound"] <= min(times)
    # It is no empty word either: of the products alone the time is not beyond all reason.
    assert plan["peaks"]["source"] == "measured on this machine"
    assert plan["compiled_flops"] > 0.9 * (plan["model_flops"] or 0)


def test_a_remat_that_computes_more_shows_in_the_compilers_count(planned):
    plans = [planned(TINY_LM, LOCAL, model={**SMALL, "remat": remat}) for remat in ("none", "full")]
    none, full = (plan["compiled_flops"] for plan in plans)
    assert plans[0]["remat_flops"] == 0
    assert plans[1]["remat_flops"] == pytest.approx(full - none, rel=0.01)
    # The forward pass once more, without the last product, whose result nobody needs.
    assert 1.15 < full / none < 1.36
