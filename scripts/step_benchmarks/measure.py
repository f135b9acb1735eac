"""What is timed, how it is timed in turns, and how the ratios are printed."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import optax
from jax.sharding import Mesh

from launch.spec import MeshSpec
from trainer.mesh import batch_sharding, make_mesh
from trainer.sharding import make_rules
from trainer.state import init_state, make_layout
from trainer.step import compile_train_step, make_train_step
from trainer.task import Task
from trainer.tasks.language_model import LanguageModel

BATCH, LENGTH, VOCAB, DIM, HEADS, LAYERS, MLP = 8, 256, 4096, 256, 4, 4, 1024
EPSILON = 1e-6


class Seconds(NamedTuple):
    """What a step took.

    Attributes:
      wall: by the clock.
      cpu: of all threads of this process; other work on the machine hardly changes it.
    """

    wall: float
    cpu: float


class Loop:
    """A compiled step and the state it goes on with.

    Args:
      name: for the reader.
      compile_step: makes the compiled function (leaves, batch) -> (leaves, metrics).
      leaves, batch: its first arguments.
    """

    def __init__(
        self, name: str, compile_step: Callable[[], Any], leaves: list[jax.Array], batch: Any
    ):
        start = time.process_time()
        self.call = compile_step()
        self.compile_seconds = time.process_time() - start
        self.name, self.leaves, self.batch = name, leaves, batch

    def step(self) -> dict[str, jax.Array]:
        self.leaves, metrics = self.call(self.leaves, self.batch)
        return metrics

    def run(self, steps: int) -> Seconds:
        """A step's time, dispatched one after the other and waited for at the end."""
        jax.block_until_ready(self.leaves)
        start = Seconds(time.perf_counter(), time.process_time())
        for _ in range(steps):
            self.step()
        jax.block_until_ready(self.leaves)
        end = Seconds(time.perf_counter(), time.process_time())
        return Seconds(*[(b - a) / steps for a, b in zip(start, end, strict=True)])


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

        def compile_step() -> Any:
            step = make_train_step(self.task, self.layout, **options)
            return compile_train_step(step, self.layout, {"tokens": abstract})

        return Loop(name, compile_step, self.leaves, {"tokens": tokens})


def in_turns(
    runs: Sequence[Callable[[int], Seconds]], rounds: int, steps: int
) -> list[list[Seconds]]:
    """Seconds per step of each run, a column for each, one warm-up round left out."""
    rows = []
    for number in range(rounds + 1):
        order = list(range(len(runs)))[:: 1 if number % 2 else -1]  # Neither is always first.
        row = {which: runs[which](steps) for which in order}
        rows.append([row[which] for which in range(len(runs))])
    return [list(column) for column in zip(*rows[1:], strict=True)]


def ratios(above: Sequence[Seconds], below: Sequence[Seconds]) -> list[str]:
    """The median and the range of above / below, round by round: by time, and by CPU time."""
    texts = []
    for clock in Seconds._fields:
        pairs = zip(above, below, strict=True)
        each = sorted(getattr(a, clock) / getattr(b, clock) for a, b in pairs)
        texts.append(f"{statistics.median(each):.3f} ({each[0]:.3f} to {each[-1]:.3f})")
    return texts


def report(
    bench: str, what: str, above: Sequence[Seconds], below: Sequence[Seconds], goal: str
) -> None:
    """Print one line with the ratio of above / below."""
    by_time, by_cpu_time = ratios(above, below)
    print(f"{bench}: {what}: {by_time}, by CPU time {by_cpu_time}; "
          f"{len(above)} rounds; goal: {goal}", flush=True)  # fmt: skip


def compare(bench: str, loops: Sequence[Loop], rounds: int, goal: str) -> None:
    """Run loops in turns and print a table: each one's speed, and that to the first one's.

    `ops` are the instructions of the program that XLA has made, `temp` is the memory it works in
    and `compile` the CPU time from Python's function to that program.
    """
    times = in_turns([loop.run for loop in loops], rounds, steps=1)
    base = times[0]
    print(f"{bench}: medians of {rounds} rounds; speed to {loops[0].name}'s; goal: {goal}")
    print(f"  {'':24} tokens/s   by time                   by CPU time               "
          "  ops  temp MB  compile s")  # fmt: skip
    for loop, column in zip(loops, times, strict=True):
        speed = BATCH * LENGTH / statistics.median(seconds.wall for seconds in column)
        by_time, by_cpu_time = ratios(base, column)
        ops = loop.call.as_text().count(" = ")
        temp = loop.call.memory_analysis().temp_size_in_bytes / 1e6
        print(f"  {loop.name:24} {speed:8.0f}   {by_time:23}   {by_cpu_time:23}   "
              f"{ops:5}  {temp:7.1f}  {loop.compile_seconds:9.1f}", flush=True)  # fmt: skip


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
