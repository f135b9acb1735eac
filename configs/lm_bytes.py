"""A byte-level language model of Python's own standard library: the quickstart.

Command:  muster run --config=configs/lm_bytes.py --cluster=configs/cluster/local.py \
              --workdir=runs/quickstart
Time:     three to four minutes of training on 2 CPU cores.
Result:   held-out loss 1.94 nats per byte; guessing by frequency gives 3.25.
"""

import sysconfig

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.seed = 0
    config.num_steps = 200
    config.global_batch_size = 64  # sequences per update, over all processes
    config.num_microbatches = 1  # parts of a batch whose gradients are accumulated
    config.log_every_steps = 10
    config.task = "trainer.tasks.language_model:LanguageModel"

    config.model = ConfigDict()
    config.model.vocab_size = 256  # bytes
    config.model.dim = 128
    config.model.num_layers = 4
    config.model.num_heads = 4
    config.model.num_kv_heads = 2  # must divide num_heads
    config.model.mlp_dim = 384

    config.data = ConfigDict()
    config.data.kind = "bytes"
    config.data.path = sysconfig.get_path("stdlib")  # a file or a directory
    config.data.pattern = "*.py"
    config.data.exclude = ("site-packages",)  # directories to leave out
    config.data.seq_len = 128  # bytes predicted per sequence
    config.data.packing = False  # True: whole files side by side, which do not see each other

    # Optax's own names, applied in this order; each section holds the arguments of optax.NAME.
    config.optimizer = ConfigDict()
    config.optimizer.chain = ("clip_by_global_norm", "adamw")
    config.optimizer.clip_by_global_norm = ConfigDict({"max_norm": 1.0})
    schedule = ConfigDict()
    schedule.init_value = 0.0
    schedule.peak_value = 3e-3
    schedule.warmup_steps = 20
    schedule.decay_steps = 200  # the whole schedule, warm-up included
    schedule.end_value = 3e-4  # kept from then on: a run made longer trains on at this rate
    config.optimizer.adamw = ConfigDict({"b1": 0.9, "b2": 0.95, "weight_decay": 0.1})
    config.optimizer.adamw.learning_rate = ConfigDict({"warmup_cosine_decay_schedule": schedule})

    config.mesh = ConfigDict()
    config.mesh.data = -1  # what the other sizes leave of the devices
    config.mesh.fsdp = 1
    config.mesh.tensor = 1
    config.mesh.dcn_data = 1  # slices
    config.mesh.dcn_fsdp = 1

    config.sharding = ConfigDict()
    config.sharding.rules = ()  # pairs (logical axis, mesh axis) over the built-in table
    config.sharding.optimizer_axes = ()  # ("data",) splits the optimizer's state as ZeRO-1 does
    config.sharding.max_replicated_bytes = placeholder(int)  # no limit

    config.checkpoint = ConfigDict()
    config.checkpoint.every_steps = 100
    config.checkpoint.every_seconds = 0.0  # 0: off
    config.checkpoint.keep_last = 2
    config.checkpoint.keep_every_steps = 0  # 0: off
    config.checkpoint.local_dir = ""  # "/dev/shm/muster": on the hosts' own storage, too
    config.checkpoint.local_every_steps = 0  # 0: there only when a stop leaves no time

    config.eval = ConfigDict()
    config.eval.every_steps = 100
    config.eval.num_batches = 8
    config.eval.params = "params"  # or "ema", with config.optimizer.ema_decay
    return config
