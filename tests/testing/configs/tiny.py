"""Small trainings: a language model, and a task that remembers what it has seen."""

from __future__ import annotations

from pathlib import Path

from ml_collections import ConfigDict

ROOT = Path(__file__).resolve().parents[3]


def get_config(task: str = "lm") -> ConfigDict:
    """`lm`, `witness` or `around` (a witness that one row spoils, with everything around its
    chain); usable as `--config=tests/testing/configs/tiny.py:witness`."""
    config = ConfigDict()
    config.seed = 3
    config.num_steps = 6
    config.global_batch_size = 16
    config.num_microbatches = 1
    config.log_every_steps = 1
    config.optimizer = ConfigDict({"chain": ("clip_by_global_norm", "adamw")})
    config.optimizer.clip_by_global_norm = ConfigDict({"max_norm": 1.0})
    config.optimizer.adamw = ConfigDict({"learning_rate": 1e-2, "weight_decay": 0.1})
    config.mesh = ConfigDict({"data": -1, "fsdp": 1, "tensor": 1, "dcn_data": 1, "dcn_fsdp": 1})
    config.sharding = ConfigDict({"rules": ()})
    config.checkpoint = ConfigDict({"every_steps": 0, "every_seconds": 0.0, "keep_last": 3})
    config.eval = ConfigDict({"every_steps": 0, "num_batches": 2})
    if task == "lm":
        config.task = "trainer.tasks.language_model:LanguageModel"
        config.model = ConfigDict({"vocab_size": 256, "dim": 32, "num_layers": 2, "mlp_dim": 64})
        config.model.num_heads = 4
        config.model.num_kv_heads = 2
        config.data = ConfigDict({"kind": "bytes", "path": str(ROOT / "LICENSE"), "seq_len": 32})
        config.data.eval_every = 10
    else:
        config.task = "tests.testing.tiny:Witness"
        config.model = ConfigDict()
        config.data = ConfigDict({"num_rows": 100, "bad_row": -2})
    if task == "around":
        config.data.bad_row = 5
        config.eval.params = "ema"
        config.sharding.optimizer_axes = ("data",)
        config.optimizer = ConfigDict({"chain": ("clip_by_global_norm", "partition")})
        config.optimizer.clip_by_global_norm = ConfigDict({"max_norm": 1.0})
        sgd = {"chain": ("sgd",), "sgd": {"learning_rate": 1e-2, "momentum": 0.9}}
        adamw = {"chain": ("adamw",), "adamw": {"learning_rate": 1e-2}}
        config.optimizer.partition = ConfigDict({"transforms": {"biases": sgd, "rest": adamw}})
        config.optimizer.partition.param_labels = (("bias", "biases"), (".*", "rest"))
        config.optimizer.no_decay = ("up",)
        config.optimizer.ema_decay = 0.9
        config.optimizer.skip = ConfigDict({"loss_sigmas": 8.0, "max_in_a_row": 3})
    return config
