"""What the Llama-shaped configs have in common; each of them says the rest.

Data are files of token ids, as `trainer.data.records.write_token_records` writes them. The mesh is
FSDP over all chips of a slice, whatever their number, unless a config says otherwise; several
slices are replicas of each other.
"""

from __future__ import annotations

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from configs import schedules


def training(num_steps: int, global_batch_size: int, peak_rate: float) -> ConfigDict:
    """All sections but the model's.

    Args:
      num_steps: updates in all.
      global_batch_size: sequences of 4096 tokens per update.
      peak_rate: of learning, reached after 2000 updates.
    """
    config = ConfigDict()
    config.seed = 0
    config.num_steps = num_steps
    config.global_batch_size = global_batch_size  # sequences per update, over all processes
    config.num_microbatches = 1  # parts of a batch whose gradients are accumulated
    config.log_every_steps = 10
    config.task = "trainer.tasks.language_model:LanguageModel"

    config.data = ConfigDict()
    config.data.kind = "array_record"
    config.data.path = "gs://BUCKET/tokens/train*.array_record"
    config.data.eval_path = "gs://BUCKET/tokens/eval*.array_record"
    config.data.dtype = "uint32"  # of a token in the files: 128,256 ids do not fit in 16 bits
    config.data.seq_len = 4096  # tokens predicted per sequence
    config.data.packing = False  # True: records are documents of any length; see docs/data.md

    # Optax's own names, applied in this order; each section holds the arguments of optax.NAME.
    config.optimizer = ConfigDict()
    config.optimizer.chain = ("clip_by_global_norm", "adamw")
    config.optimizer.clip_by_global_norm = ConfigDict({"max_norm": 1.0})
    config.optimizer.adamw = ConfigDict({"b1": 0.9, "b2": 0.95, "eps": 1e-8, "weight_decay": 0.1})
    config.optimizer.adamw.learning_rate = schedules.warmup_cosine(
        peak_rate, num_steps, warmup_steps=2000, end=peak_rate / 10
    )
    config.optimizer.no_decay = ("norm",)  # parameters whose path has it

    config.mesh = ConfigDict()
    config.mesh.data = 1
    config.mesh.fsdp = -1  # what the other sizes leave of the devices
    config.mesh.tensor = 1
    config.mesh.dcn_data = 1  # slices
    config.mesh.dcn_fsdp = 1

    config.sharding = ConfigDict()
    config.sharding.rules = ()  # pairs (logical axis, mesh axis) over the built-in table
    config.sharding.optimizer_axes = ()  # ("data",) splits the optimizer's state as ZeRO-1 does
    config.sharding.max_replicated_bytes = placeholder(int)  # no limit

    config.checkpoint = ConfigDict()
    config.checkpoint.every_steps = 0  # 0: off
    config.checkpoint.every_seconds = 1800.0
    config.checkpoint.keep_last = 2
    config.checkpoint.keep_every_steps = 10_000
    config.checkpoint.local_dir = ""  # "/dev/shm/muster": on the hosts' own storage, too
    config.checkpoint.local_every_steps = 0  # 0: there only when a stop leaves no time

    config.eval = ConfigDict()
    config.eval.every_steps = 1000
    config.eval.num_batches = 8
    config.eval.params = "params"  # or "ema", with config.optimizer.ema_decay
    return config
