"""A training loop of one's own: plain Flax NNX and Optax, on one process or on many.

    muster run --cluster=configs/cluster/local.py --workdir=runs/example -- \
        python scripts/example_nnx.py
    python scripts/example_nnx.py                            # alone, on one process

A few seconds; the loss falls from 2.1 to below 0.01, alike on any number of processes. Of Muster
it uses one line, `report_progress`, for `muster status`. docs/pytorch.md has the rest.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from launch.contract import report_progress

NUM_STEPS = 100
BATCH_SIZE = 64  # rows of a batch, over all processes


class MyModel(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        # A layer names the mesh axis of each dim of its kernel; a bias is small and stays whole.
        columns, rows = {"out_sharding": (None, "fsdp")}, {"out_sharding": ("fsdp", None)}
        self.up = nnx.Linear(4, 64, kernel_metadata=columns, rngs=rngs)
        self.down = nnx.Linear(64, 1, kernel_metadata=rows, rngs=rngs)

    def __call__(self, x):
        return self.down(nnx.gelu(self.up(x)))[:, 0]


def mse_loss(model, x, y):
    return jnp.mean((model(x) - y) ** 2)


def shard(node, kind):
    """Lay out variables of a kind as their metadata says, those without whole on every device."""
    state = nnx.state(node, kind)
    specs = nnx.spmd.get_partition_spec(state)
    nnx.update(node, jax.lax.with_sharding_constraint(state, specs))


@nnx.jit  # so that no device ever holds more than its own part
def create():
    model = MyModel(nnx.Rngs(0))
    schedule = optax.warmup_cosine_decay_schedule(
        init_value=0.0, peak_value=3e-2, warmup_steps=20, decay_steps=NUM_STEPS
    )
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    shard(model, nnx.Param)
    shard(optimizer, nnx.optimizer.OptState)
    return model, optimizer


@nnx.jit
def train_step(model, optimizer, x_batch, y_batch):
    loss, grads = nnx.value_and_grad(mse_loss)(model, x_batch, y_batch)
    optimizer.update(model, grads)  # both change in place
    shard(model, nnx.Param)  # else the compiler may choose another layout, and compile twice
    shard(optimizer, nnx.optimizer.OptState)
    return loss


def make_rows(step: int) -> tuple[np.ndarray, np.ndarray]:
    """This process's rows of batch `step`; a row depends on its number, not on who makes it."""
    share = BATCH_SIZE // jax.process_count()
    first = step * BATCH_SIZE + jax.process_index() * share
    x = [np.random.default_rng(first + i).uniform(-1, 1, 4) for i in range(share)]
    return np.array(x, np.float32), np.square(x, dtype=np.float32).sum(axis=1)


def main():
    try:
        jax.distributed.initialize()  # finds its place under muster run, srun or mpirun
    except ValueError as error:  # Nothing speaks of other processes: we are alone.
        if "coordinator_address should be defined" not in str(error):
            raise
    shape = (jax.process_count(), jax.local_device_count())
    jax.set_mesh(jax.make_mesh(shape, ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2))
    by_row = NamedSharding(jax.sharding.get_mesh(), PartitionSpec(("data", "fsdp")))

    model, optimizer = create()
    for step in range(1, NUM_STEPS + 1):
        x, y = (jax.make_array_from_process_local_data(by_row, rows) for rows in make_rows(step))
        loss = train_step(model, optimizer, x, y)
        if step % 20 == 0:  # To read a loss is to wait for it: now and then, not every step.
            report_progress(step, loss=float(loss))
            if jax.process_index() == 0:
                print(f"step {step}/{NUM_STEPS}  loss {loss:.4f}")
    if jax.process_index() == 0:
        mu = optimizer.opt_state[1][0].mu.up.kernel.get_value()  # of Adam, second in the chain
        print(f"Adam's mu: {mu.shape}, of which a device holds {mu.sharding.shard_shape(mu.shape)}")


if __name__ == "__main__":
    main()
