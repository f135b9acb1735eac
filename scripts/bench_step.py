"""How quick a training step is, against what it could be: medians and ratios, no pass or fail.

    python scripts/bench_step.py                    # all three, about three minutes on two cores
    python scripts/bench_step.py --only=loop        # or one of loop, host, scaling
    python scripts/bench_step.py --rounds=20        # more rounds where other work disturbs

loop     The trainer's steady step against a hand-written loop in pure JAX of the same model,
         optimizer and batch: matmuls of two dims, layers unrolled, buffers donated, no Flax, all
         compiled ahead of time. Both start from the same parameters and must see the same loss.
         Goal: at least 0.97 of its tokens/s.
host     A step of 100 and of 400 tiny parameters against a bare call of an ahead-of-time compiled
         function that does the same to the same arrays. Goal: at most 1.1 times its time.
scaling  Two processes of one core each, in one `jax.distributed` gang over loopback, against one
         process on one core, at the same batch per process. Goal: at least 1.86 times its tokens/s.

What is compared is run in turns, in the same processes; each round gives one ratio, and the median
of those is what counts. Only Linux can pin processes to cores, as `scaling` does.
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from launch.spec import MeshSpec
from trainer.mesh import batch_sharding, make_mesh
from trainer.sharding import make_rules
from trainer.state import init_state, make_layout
from trainer.step import compile_train_step, make_train_step
from trainer.task import Task
from trainer.tasks.language_model import LanguageModel

BATCH, LENGTH, VOCAB, DIM, HEADS, LAYERS, MLP = 8, 256, 4096, 256, 4, 4, 1024
HEAD = DIM // HEADS
EPSILON, CHUNKS = 1e-6, 4  # CHUNKS of queries in attention, as the trainer's model has.


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=("loop", "host", "scaling"))
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--member", help=argparse.SUPPRESS)  # How `scaling` starts its processes.
    options = parser.parse_args()
    if options.member:
        return scaling_member(options.member, options.rounds)
    if options.only in (None, "loop"):
        bench_loop(options.rounds)
    if options.only in (None, "host"):
        bench_host(options.rounds)
    if options.only in (None, "scaling"):
        bench_scaling(options.rounds)


# ---------------------------------------------------------------------------------- loop


def bench_loop(rounds: int) -> None:
    """The trainer's step against the pure one, on all cores."""
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
    mesh = one_device_mesh()
    task = language_model()
    trained = Trained(task, tx, mesh)
    tokens = some_tokens(BATCH, mesh)
    params = jax.tree.map(jnp.copy, pure_params(trained.model()))
    pure_leaves, treedef = jax.tree.flatten((params, tx.init(params)))
    pure = jax.jit(pure_step(treedef, tx), donate_argnums=0).lower(pure_leaves, tokens).compile()

    our_loop = trained.loop("trainer", tokens)
    pure_loop = Loop("pure JAX", pure, pure_leaves, tokens)
    losses = [float(loop.step()["loss"]) for loop in (our_loop, pure_loop)]
    if abs(losses[0] - losses[1]) > 1e-4:
        raise AssertionError(f"not the same model: losses {losses} from the same parameters")
    flops = [loop.call.cost_analysis()["flops"] for loop in (our_loop, pure_loop)]
    print(f"loop: first losses {losses[0]:.5f} and {losses[1]:.5f}, "
          f"XLA counts {flops[0] / flops[1]:.3f} times the FLOPs")  # fmt: skip
    times = in_turns([our_loop.run, pure_loop.run], rounds, steps=2)
    for loop, column in zip((our_loop, pure_loop), times, strict=True):
        print(f"loop: {loop.name:9} {BATCH * LENGTH / statistics.median(column):8.0f} tokens/s")
    report("loop", "tokens/s, trainer / pure JAX", times[1], times[0], "at least 0.97")


def pure_params(model: Any) -> dict[str, Any]:
    """The trainer's parameters as the pure model has them."""

    def layer(layer: Any) -> dict[str, jax.Array]:
        attention, mlp = layer.attention, layer.mlp
        return {
            "norm1": layer.attention_norm.scale_D[...],
            "q": attention.query_DQH[...].reshape(DIM, DIM),
            "k": attention.key_DKH[...].reshape(DIM, DIM),
            "v": attention.value_DKH[...].reshape(DIM, DIM),
            "o": attention.out_QHD[...].reshape(DIM, DIM),
            "norm2": layer.mlp_norm.scale_D[...],
            "gate": mlp.gate_DF[...],
            "up": mlp.up_DF[...],
            "down": mlp.down_FD[...],
        }

    return {
        "embed": model.embedding_VD[...],
        "norm": model.norm.scale_D[...],
        "layers": [layer(each) for each in model.layers],
    }


def pure_step(treedef: Any, tx: optax.GradientTransformation) -> Callable:
    """One update as one would write it by hand: (leaves, tokens) to (leaves, metrics)."""

    def step(leaves: list[jax.Array], tokens: jax.Array) -> tuple[list[jax.Array], dict]:
        params, opt_state = jax.tree.unflatten(treedef, leaves)
        loss, grads = jax.value_and_grad(pure_loss)(params, tokens)
        updates, opt_state = tx.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
        metrics = {"loss": loss, "grad_norm": optax.tree.norm(grads)}
        return jax.tree.leaves((params, opt_state)), metrics

    return step


def pure_loss(params: dict[str, Any], tokens: jax.Array) -> jax.Array:
    """Mean cross entropy of [BATCH, LENGTH + 1] tokens."""
    targets = tokens[:, 1:].reshape(-1)
    x = params["embed"][tokens[:, :-1].reshape(-1)]
    frequency = 1e4 ** (-jnp.arange(0, HEAD, 2) / HEAD)
    angle = jnp.arange(LENGTH)[:, None] * frequency
    cos, sin = jnp.cos(angle), jnp.sin(angle)

    def norm(x: jax.Array, scale: jax.Array) -> jax.Array:
        return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + EPSILON) * scale

    def heads(x: jax.Array) -> jax.Array:
        return x.reshape(BATCH, LENGTH, HEADS, HEAD).transpose(0, 2, 1, 3)

    def turn(x: jax.Array) -> jax.Array:
        a, b = jnp.split(x, 2, -1)
        return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1)

    def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        outs, size = [], LENGTH // CHUNKS
        for start in range(0, LENGTH, size):
            end = start + size
            scores = jnp.einsum("bhld,bhmd->bhlm", q[:, :, start:end], k[:, :, :end])
            seen = jnp.arange(start, end)[:, None] >= jnp.arange(end)
            shares = jax.nn.softmax(jnp.where(seen, scores, -1e30), -1)
            outs.append(jnp.einsum("bhlm,bhmd->bhld", shares, v[:, :, :end]))
        return jnp.concatenate(outs, 2)

    for p in params["layers"]:
        y = norm(x, p["norm1"])
        q, k, v = heads(y @ p["q"]), heads(y @ p["k"]), heads(y @ p["v"])
        out = attend(turn(q) * HEAD**-0.5, turn(k), v)
        x = x + out.transpose(0, 2, 1, 3).reshape(-1, DIM) @ p["o"]
        y = norm(x, p["norm2"])
        x = x + (jax.nn.silu(y @ p["gate"]) * (y @ p["up"])) @ p["down"]
    logits = norm(x, params["norm"]) @ params["embed"].T
    hit = jnp.arange(VOCAB) == targets[:, None]
    target_logit = jnp.where(hit, logits, 0.0).sum(-1)
    return (jax.nn.logsumexp(logits, -1) - target_logit).mean()


# ---------------------------------------------------------------------------------- host


class ManyParams(nnx.Module):
    """`num` vectors of eight numbers."""

    def __init__(self, num: int):
        self.vectors = nnx.List([nnx.Param(jnp.ones(8)) for _ in range(num)])


class ManyTask(Task):
    """Draw many vectors to the batch's mean: hardly any work for the device."""

    def __init__(self, num: int):
        super().__init__({}, {})
        self.num = num

    def make_model(self, rngs: nnx.Rngs) -> ManyParams:
        return ManyParams(self.num)

    def loss(self, model: Any, batch: Any) -> jax.Array:
        return far_off([vector[...] for vector in model.vectors], batch["tokens"])

    def train_data(self, seed: int) -> Any:
        raise NotImplementedError


def far_off(vectors: list[jax.Array], tokens: jax.Array) -> jax.Array:
    """Mean square distance of all vectors from the tokens' mean."""
    mean = tokens.astype(jnp.float32).mean()
    return sum(jnp.mean((vector - mean) ** 2) for vector in vectors) / len(vectors)


def bench_host(rounds: int) -> None:
    """What calling the step costs the host, with many leaves."""
    tx, mesh = optax.adamw(1e-3), one_device_mesh()
    tokens = some_tokens(BATCH, mesh)
    for num in (100, 400):
        task = ManyTask(num)
        ours = Trained(task, tx, mesh).loop("trainer", tokens)
        params = [jnp.ones(8) for _ in range(num)]
        leaves, treedef = jax.tree.flatten((params, tx.init(params)))

        def bare_step(leaves: list, tokens: jax.Array, treedef: Any = treedef) -> tuple:
            params, opt_state = jax.tree.unflatten(treedef, leaves)
            loss, grads = jax.value_and_grad(far_off)(params, tokens)
            updates, opt_state = tx.update(grads, opt_state, params)
            params = optax.apply_updates(params, updates)
            metrics = {"loss": loss, "grad_norm": optax.tree.norm(grads)}
            return jax.tree.leaves((params, opt_state)), metrics

        call = jax.jit(bare_step, donate_argnums=0).lower(leaves, tokens).compile()
        bare = Loop("bare call", call, leaves, tokens)
        times = in_turns([ours.run, bare.run], 3 * rounds, steps=50)
        for loop, column in zip((ours, bare), times, strict=True):
            micros = 1e6 * statistics.median(column)
            print(f"host: {num} parameters, {loop.name:9} {micros:7.0f} us a step")
        report("host", f"{num} parameters, trainer / bare call", times[0], times[1], "at most 1.1")


# ------------------------------------------------------------------------------- scaling


def bench_scaling(rounds: int) -> None:
    """Start two members, each pinned to a core of its own, and show what the first prints."""
    # So that the members are ended too; by itself Python would be gone at once.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        print("scaling: not run, it needs two cores")
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, __file__, f"--rounds={rounds}"]
    members = [
        subprocess.Popen([*command, f"--member={place},{cores[place]},{port}"])
        for place in range(2)
    ]
    try:
        for member in members:
            member.wait(timeout=600)
    finally:
        for member in members:
            member.kill()


def scaling_member(member: str, rounds: int) -> None:
    """One of two processes: measure alone (the first only) and together, in turns."""
    place, core, port = (int(part) for part in member.split(","))
    os.sched_setaffinity(0, {core})  # Before XLA counts the cores for its threads.
    jax.distributed.initialize(f"127.0.0.1:{port}", 2, place, initialization_timeout=60)
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
    task = language_model()

    def loop(name: str, devices: list[jax.Device], at_once: bool) -> Loop:
        mesh = make_mesh(MeshSpec(data=len(devices)), devices)
        tokens = some_tokens(BATCH * len(devices), mesh)
        return Trained(task, tx, mesh).loop(name, tokens, one_all_reduce=at_once)

    alone = loop("1 x 1", jax.local_devices(), False)
    flat = loop("2 x 1, one all-reduce", jax.devices(), True)
    tuple_ = loop("2 x 1, XLA's all-reduces", jax.devices(), False)

    def only_first(steps: int) -> float:
        seconds = alone.run(steps) if place == 0 else 1.0
        multihost_utils.sync_global_devices("alone")
        return seconds

    times = in_turns([only_first, alone.run, flat.run, tuple_.run], rounds, steps=2)
    if place == 0:
        single = [2 * seconds for seconds in times[0]]  # As if it did the work of both.
        print(f"scaling: 1 x 1: {2 * BATCH * LENGTH / statistics.median(single):.0f} tokens/s")
        report("scaling", "2 x 1 that do not talk (the machine's limit)", single, times[1], "-")
        report("scaling", "2 x 1, one all-reduce", single, times[2], "at least 1.86")
        report("scaling", "2 x 1, XLA's all-reduces", single, times[3], "-")


# -------------------------------------------------------------------------------- shared


class Trained:
    """A task's fresh training state, as the trainer makes it, and its step."""

    def __init__(self, task: Task, tx: optax.GradientTransformation, mesh: Mesh):
        self.task = task
        self.layout = make_layout(task, tx, mesh, make_rules((), mesh), seed=0)
        self.leaves = init_state(self.layout)

    def model(self) -> Any:
        return self.layout.merge(self.leaves)[0]

    def loop(self, name: str, tokens: jax.Array, **options: Any) -> Loop:
        abstract = jax.ShapeDtypeStruct(tokens.shape, tokens.dtype, sharding=tokens.sharding)
        step = make_train_step(self.task, self.layout, **options)
        call = compile_train_step(step, self.layout, {"tokens": abstract})
        return Loop(name, call, self.leaves, {"tokens": tokens})


class Loop:
    """A compiled step and the state it goes on with."""

    def __init__(self, name: str, call: Any, leaves: list[jax.Array], batch: Any):
        self.name, self.call, self.leaves, self.batch = name, call, leaves, batch

    def step(self) -> dict[str, jax.Array]:
        self.leaves, metrics = self.call(self.leaves, self.batch)
        return metrics

    def run(self, steps: int) -> float:
        """Seconds per step, dispatched one after the other and waited for at the end."""
        start = time.perf_counter()
        for _ in range(steps):
            self.step()
        jax.block_until_ready(self.leaves)
        return (time.perf_counter() - start) / steps


def in_turns(runs: list[Callable[[int], float]], rounds: int, steps: int) -> list[list[float]]:
    """Seconds per step of each run, a column for each, one warm-up round left out."""
    rows = []
    for number in range(rounds + 1):
        order = list(range(len(runs)))[:: 1 if number % 2 else -1]  # Neither is always first.
        row = {which: runs[which](steps) for which in order}
        rows.append([row[which] for which in range(len(runs))])
    return [list(column) for column in zip(*rows[1:], strict=True)]


def report(bench: str, what: str, above: list[float], below: list[float], goal: str) -> None:
    """Print the median and the range of above / below, round by round."""
    ratios = sorted(a / b for a, b in zip(above, below, strict=True))
    print(f"{bench}: {what}: {statistics.median(ratios):.3f} (goal: {goal}; "
          f"{len(ratios)} rounds, {ratios[0]:.3f} to {ratios[-1]:.3f})", flush=True)  # fmt: skip


def language_model() -> LanguageModel:
    """The model of the table in the docs: Llama-shaped, 5.2 million parameters, tied head."""
    model = {"vocab_size": VOCAB, "dim": DIM, "num_layers": LAYERS, "num_heads": HEADS,
             "mlp_dim": MLP, "norm_epsilon": EPSILON}  # fmt: skip
    return LanguageModel(model, {"kind": "array_record", "path": "-", "seq_len": LENGTH})


def one_device_mesh() -> Mesh:
    return make_mesh(MeshSpec(data=1), jax.devices()[:1])


def some_tokens(batch: int, mesh: Mesh) -> jax.Array:
    """[batch, LENGTH + 1] int32, split over the mesh."""
    make = jax.jit(
        lambda: jax.random.randint(jax.random.key(1), (batch, LENGTH + 1), 0, VOCAB),
        out_shardings=batch_sharding(mesh),
    )
    return make()


if __name__ == "__main__":
    main()
