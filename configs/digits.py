"""A small convolutional network tells handwritten digits apart: batch norm, no decay, one cycle.

Command:  muster run --config=configs/digits.py --cluster=configs/cluster/local.py \
              --workdir=runs/digits
          (the images come with scikit-learn: pip install scikit-learn)
Time:     about 30 seconds of training on 2 CPU cores.
Result:   2 of 256 held-out digits wrong, 99.2% right; seeds 1 to 3 give 98.4 to 99.2%.

Other schedules: `--config=configs/digits.py:warmup_cosine`, or `warmup_stable_decay`, or
`inverse_sqrt`; see configs/schedules.py.
"""

from ml_collections import ConfigDict

from configs import schedules


def get_config(schedule: str = "one_cycle") -> ConfigDict:
    config = ConfigDict()
    config.seed = 0
    config.num_steps = 150
    config.global_batch_size = 128  # images per update, over all processes
    config.num_microbatches = 1  # more would each be normalized by statistics of their own
    config.log_every_steps = 10
    config.task = "trainer.tasks.digits:Digits"

    config.model = ConfigDict()
    config.model.channels = (32, 64)  # of each block, which halves the image's side of 8
    config.model.norm = "batch"  # or "layer"
    config.model.dropout = 0.2  # before the last layer

    config.data = ConfigDict()
    config.data.eval_every = 7  # one image in 7 is held out: 256 of 1,797
    config.data.max_shift = 1  # pixels by which a training image is moved at most, at random

    config.optimizer = ConfigDict()
    config.optimizer.chain = ("clip_by_global_norm", "adamw")
    config.optimizer.clip_by_global_norm = ConfigDict({"max_norm": 1.0})
    config.optimizer.adamw = ConfigDict({"weight_decay": 0.05})
    config.optimizer.adamw.learning_rate = schedules.by_name(schedule, 1e-2, config.num_steps)
    config.optimizer.no_decay = ("norm", "bias")  # a parameter whose path has one of these

    config.checkpoint = ConfigDict()
    config.checkpoint.every_steps = 50
    config.checkpoint.keep_last = 2

    config.eval = ConfigDict()
    config.eval.every_steps = 50
    config.eval.num_batches = 2  # all held-out images
    return config
