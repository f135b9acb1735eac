"""Plans of small models, compiled once for all tests of a worker."""

import copy
import functools
import os
from typing import Any

import pytest

from launch.spec import cluster_spec, train_spec
from trainer.plan.target import environment

os.environ.update(environment())  # Before anything loads libtpu.

TINY_LM: dict[str, Any] = {
    "task": "trainer.tasks.language_model:LanguageModel",
    "num_steps": 10,
    "global_batch_size": 8,
    "model": {
        # Gradients travel in rows of multiples of 512, also where `tensor` splits them in two.
        "vocab_size": 1024,
        "dim": 512,
        "num_layers": 2,
        "num_heads": 8,
        "head_dim": 128,
        "mlp_dim": 1024,
        "tied_head": False,
        "dtype": "bfloat16",
        "scan_layers": True,
        "remat": "full",
        "attention": "xla",  # Kernels take longer to compile, and move nothing.
    },
    "data": {"kind": "array_record", "path": "nowhere", "seq_len": 64},
    "optimizer": {"chain": ("adamw",), "adamw": {"learning_rate": 1e-3}},
}
TINY_MLP: dict[str, Any] = {
    "task": "trainer.tasks.regression:Regression",
    "num_steps": 10,
    "global_batch_size": 1024,
    "model": {"hidden": (256, 256)},
    "optimizer": {"chain": ("adam",), "adam": {"learning_rate": 1e-3}},
}


def tpu(accelerator: str, slices: int = 1) -> dict[str, Any]:
    """A cluster of TPUs as a config says it."""
    zones = {"zones": ("us-west4-a",)}
    return {"backend": "tpu", "accelerator": accelerator, "slices": slices, "tpu": zones}


def changed(base: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """A config with fields, or fields of its sections, changed."""
    config = copy.deepcopy(base)
    for name, value in changes.items():
        config[name] = {**config.get(name, {}), **value} if isinstance(value, dict) else value
    return config


def make(config: dict[str, Any], cluster: dict[str, Any]) -> dict[str, Any]:
    """Plan; compiles anew."""
    from trainer.plan.plan import make_plan
    from trainer.task import load_task

    where = cluster_spec(cluster)
    spec = train_spec(config, where.num_devices)
    return make_plan(spec, load_task(spec.task, spec.model, spec.data), where)


@pytest.fixture(scope="session")
def planned():
    """Plan a config for a cluster, with fields changed; the same is compiled once."""
    made = functools.cache(lambda text: make(*eval(text)))

    def plan(base: dict[str, Any], cluster: dict[str, Any], **changes: Any) -> dict[str, Any]:
        return made(repr((changed(base, **changes), cluster)))

    return plan
