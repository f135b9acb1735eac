"""An MLP fits a noisy function: biases by SGD, kernels by Adam, the loss beside the noise.

Command:  muster run --config=configs/regression.py --cluster=configs/cluster/local.py \
              --workdir=runs/regression
Time:     about 12 seconds of training on 2 CPU cores.
Result:   held-out mean squared error 1.2, R^2 0.951; the noise alone is 1.0, which allows 0.959.

Other schedules of the learning rates: `--config=configs/regression.py:one_cycle`, or
`warmup_stable_decay`, or `inverse_sqrt`; see configs/schedules.py.
"""

from ml_collections import ConfigDict

from configs import schedules


def get_config(schedule: str = "warmup_cosine") -> ConfigDict:
    config = ConfigDict()
    config.seed = 0
    config.num_steps = 400
    config.global_batch_size = 256  # rows per update, over all processes
    config.log_every_steps = 20
    config.task = "trainer.tasks.regression:Regression"

    config.model = ConfigDict()
    config.model.hidden = (64, 64)  # widths

    config.data = ConfigDict()
    config.data.num_rows = 8192
    config.data.num_eval_rows = 2048
    config.data.num_inputs = 10  # of which the target depends on 5
    config.data.noise = 1.0  # standard deviation; the target's without it is 4.9
    config.data.mask_fraction = 0.0  # of the rows, which then have no target and no weight
    config.data.seed = 0  # of the rows; `config.seed` is that of their order

    # A parameter is in the group of the first expression that its path matches. The biases have a
    # long way to go, as the target's mean is 14: SGD's steps are as large, Adam's are not.
    biases = ConfigDict({"chain": ("sgd",), "sgd": ConfigDict()})
    biases.sgd.learning_rate = schedules.by_name(schedule, 4e-2, config.num_steps)
    kernels = ConfigDict({"chain": ("adam",), "adam": ConfigDict()})
    kernels.adam.learning_rate = schedules.by_name(schedule, 2e-2, config.num_steps)
    config.optimizer = ConfigDict()
    config.optimizer.chain = ("partition",)
    config.optimizer.partition = ConfigDict()
    config.optimizer.partition.param_labels = ((r"bias$", "biases"), (r".*", "kernels"))
    config.optimizer.partition.transforms = ConfigDict({"biases": biases, "kernels": kernels})

    config.checkpoint = ConfigDict()
    config.checkpoint.every_steps = 200
    config.checkpoint.keep_last = 2

    config.eval = ConfigDict()
    config.eval.every_steps = 200
    config.eval.num_batches = 8  # all held-out rows
    return config
