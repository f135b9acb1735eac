"""Our training step beside MaxText's, compiled for the same TPUs by the same compiler.

    python -m scripts.bench_maxtext                     # all rows, a minute or two each
    python -m scripts.bench_maxtext --only=llama2-7b-v5p
    python -m scripts.bench_maxtext --only=llama2-7b-v5p --model.remat=keep_qkv

No TPU is needed: libtpu compiles for a topology (`pip install 'jax[tpu]'`). Each row is a
model of Llama's shape at sequence length 4096, FSDP over all chips, float32 params and Adam state,
bfloat16 compute, full remat. MaxText's figures are constants, of version 0.2.5 with jax 0.12 and
libtpu 0.0.52: the two compare where these are installed here.

    arguments     GB per device; `ideal` is 12 bytes per param (itself, two moments) over all chips
    temporaries   GB per device, and as a share of MaxText's. Goal: at most 0.70
    ICI           bytes that a device sends in a step, over the least that FSDP has to send: every
                  weight gathered twice and every gradient scattered once. Goal: at most 1.05
    widest        the largest X of any array [tokens of a device, X], beside the vocabulary: no
                  array of all logits is there while it is smaller
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import math
from typing import Any, NamedTuple

from trainer.plan.target import prepare_environment

LENGTH = 4096
LLAMA2_7B = {
    "vocab_size": 32_000, "dim": 4096, "num_layers": 32, "num_heads": 32, "mlp_dim": 11_008,
    "mlp_chunk": 1024,
}  # fmt: skip
LLAMA31_8B = {
    "vocab_size": 128_256, "dim": 4096, "num_layers": 32, "num_heads": 32, "num_kv_heads": 8,
    "mlp_dim": 14_336, "rope_base": 500_000.0, "mlp_chunk": 1024,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Row:
    """A case, and MaxText's bytes per device in it.

    Attributes:
      model: of its config what differs between the cases.
      accelerator: as a cluster config names it.
      per_device: sequences.
      arguments, temporaries: MaxText's, GB.
    """

    model: dict[str, Any]
    accelerator: str
    per_device: int
    arguments: float
    temporaries: float


ROWS = {
    "llama2-7b-v5p": Row(LLAMA2_7B, "v5p-128", 4, 1.264, 9.196),
    "llama3.1-8b-v5p": Row(LLAMA31_8B, "v5p-128", 4, 1.509, 14.128),
    "llama2-7b-v5e": Row(LLAMA2_7B, "v5litepod-256", 2, 0.316, 4.244),
}


class Result(NamedTuple):
    """What our step of a row takes on each device, in bytes."""

    devices: int
    arguments: float
    temporaries: float
    ici: float
    least_ici: float
    widest: int
    seconds: float


def compile_row(row: Row, overrides: dict[str, Any]) -> Result:
    """Compile our step of a row, with overrides of its model's fields."""
    import jax

    from configs import llama
    from configs.cluster import tpu_v5p_128
    from launch.spec import cluster_spec, train_spec
    from trainer.mesh import batch_sharding, make_mesh
    from trainer.plan.collectives import Grid, collectives
    from trainer.plan.compiled import compile_for_plan
    from trainer.plan.hlo import parse
    from trainer.plan.least import least_bytes
    from trainer.plan.target import make_target
    from trainer.prepare import prepare
    from trainer.step import compile_train_step, make_train_step
    from trainer.task import load_task

    cluster_config = tpu_v5p_128.get_config()
    cluster_config.accelerator = row.accelerator
    target = make_target(cluster_spec(cluster_config))
    devices = len(target.devices)
    config = llama.training(10_000, row.per_device * devices, 1e-3)
    config.model = {
        **row.model, "tied_head": False, "dtype": "bfloat16", "scan_layers": True,
        "remat": "full", **overrides,
    }  # fmt: skip
    spec = train_spec(config, devices)
    mesh = make_mesh(spec.mesh, target.devices)
    task = load_task(spec.task, spec.model, spec.data)
    layout = prepare(spec, task, mesh).layout
    batch = {
        "tokens": jax.ShapeDtypeStruct(
            (spec.global_batch_size, LENGTH + 1), "uint32", sharding=batch_sharding(mesh)
        )
    }
    step = make_train_step(task, layout)
    compiled = compile_for_plan(
        lambda options: compile_train_step(step, layout, batch, compiler_options=options),
        step.__name__,
    )
    module = parse(compiled.text)
    grid = Grid(mesh.axis_names, tuple(mesh.shape.values()), (0,) * devices, target.hosts, True)
    return Result(
        devices,
        compiled.memory.argument,
        compiled.memory.temp,
        sum(one.sent_bytes for one in collectives(module, grid)),
        least_bytes(spec, task, layout)["ici"],
        widest(module, row),
        compiled.seconds,
    )


def line(name: str, row: Row, result: Result) -> str:
    """One row of the table."""
    ideal = 12 * num_params(row.model) / result.devices / 1e9
    temporaries = result.temporaries / 1e9
    return (
        f"{name:17} {row.arguments:8.3f} {row.temporaries:8.3f} | "
        f"{result.arguments / 1e9:8.3f} {ideal:6.3f} {temporaries:8.3f} "
        f"{temporaries / row.temporaries:6.3f} {result.ici / result.least_ici:6.3f} "
        f"{result.widest:6d} of {row.model['vocab_size']:6d} {result.seconds:4.0f}"
    )


def num_params(model: dict[str, Any]) -> int:
    """Of a Llama with an output head of its own."""
    D, F, V = model["dim"], model["mlp_dim"], model["vocab_size"]
    kv = D * model.get("num_kv_heads", model["num_heads"]) // model["num_heads"]
    layer = 2 * D * D + 2 * D * kv + 3 * D * F + 2 * D
    return model["num_layers"] * layer + 2 * D * V + D


def widest(module: Any, row: Row) -> int:
    """The largest X of arrays [N, X], where N are all tokens of a device, as one dim or two."""
    rows = row.per_device * LENGTH
    found = 0
    for name, computation in module.computations.items():
        if "fused" in name:
            continue  # What is inside of a fusion is never in memory.
        for instruction in computation.instructions.values():
            for shape in instruction.shapes:
                dims = [dim for dim in shape.dims if dim > 1]
                if len(dims) > 1 and math.prod(dims[:-1]) == rows:
                    found = max(found, dims[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=tuple(ROWS))
    options, rest = parser.parse_known_args()
    overrides = {}
    for argument in rest:
        if not (argument.startswith("--model.") and "=" in argument):
            parser.error(f"{argument}: only --model.FIELD=VALUE may be overridden")
        field, value = argument.removeprefix("--model.").split("=", 1)
        overrides[field] = ast.literal_eval(value) if value[:1].isdigit() else value
    prepare_environment(1, {})
    from trainer.plan.plan import versions

    print(", ".join(f"{name} {version}" for name, version in versions().items()))
    print(f"{'':17} {'MaxText 0.2.5':^17} | {'ours':^26} of its")
    print(
        f"{'':17} {'args':>8} {'temps':>8} | {'args':>8} {'ideal':>6} {'temps':>8} "
        f"{'temps':>6} {'ICI':>6} {'widest':>16} {'s':>4}"
    )
    for name, row in ROWS.items():
        if options.only in (None, name):
            print(line(name, row, compile_row(row, overrides)), flush=True)


if __name__ == "__main__":
    main()
