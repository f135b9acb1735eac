"""Plan a training: compile its step for the cluster's devices, and say what it costs there."""

from __future__ import annotations

import dataclasses
import importlib.metadata
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from launch.contract import SCHEMA
from launch.spec import Cluster, TrainSpec
from trainer.mesh import batch_sharding, make_mesh
from trainer.plan.bound import bounds, largest, measured_peaks, peaks_of
from trainer.plan.buffers import at_the_peak
from trainer.plan.collectives import Collective, Grid, collectives
from trainer.plan.compiled import Compiled, compile_for_plan
from trainer.plan.flops import count_flops
from trainer.plan.hlo import parse
from trainer.plan.least import least_bytes
from trainer.plan.lives import with_loops
from trainer.plan.loops import executions
from trainer.plan.suggest import suggestions
from trainer.plan.target import Target, make_target
from trainer.plan.words import Namer
from trainer.prepare import Prepared, prepare
from trainer.step import compile_train_step, make_train_step, reduces_at_once
from trainer.task import Task

_MOST_BUFFERS = 12
# What is assumed of the checkpoint's storage, where nothing is known of it.
CHECKPOINT_BYTES_PER_SECOND_AND_HOST = 1e9


def make_plan(spec: TrainSpec, task: Task, cluster: Cluster) -> dict[str, Any]:
    """Compile the step that a run of this config on this cluster starts, and read it.

    Args:
      spec: resolved for the cluster's devices.
      task: the model and its loss; its data is not read if it knows the form of an example.
      cluster: whose devices to compile for.

    Returns:
      The plan's record, plain JSON; docs/plan.md says what each key is.

    Raises:
      ConfigError: the state cannot be laid out, the compiler does not know the devices, or the
        mesh does not fit their grid.
    """
    target = make_target(cluster)
    mesh = make_mesh(spec.mesh, target.devices)
    prepared = prepare(spec, task, mesh)
    layout = prepared.layout
    batch = {
        name: jax.ShapeDtypeStruct(
            (spec.global_batch_size, *one.shape), one.dtype, sharding=batch_sharding(mesh)
        )
        for name, one in task.example_spec().items()
    }
    at_once = reduces_at_once(layout, target.platform, cluster.num_processes)
    step = make_train_step(
        task, layout, num_microbatches=spec.num_microbatches, one_all_reduce=at_once
    )
    compiled = compile_for_plan(
        lambda options: compile_train_step(step, layout, batch, compiler_options=options),
        step.__name__,
    )
    module = parse(compiled.text)
    # The mesh's own order of devices: slices outermost within each axis.
    order = {device: number for number, device in enumerate(target.devices)}
    places = [order[device] for device in mesh.devices.flat]
    grid = Grid(
        mesh.axis_names,
        tuple(mesh.shape.values()),
        tuple(target.slices[place] for place in places),
        tuple(target.hosts[place] for place in places),
        target.platform == "tpu",
    )
    found = collectives(module, grid)
    _, unknown_loops = executions(module)
    flops = count_flops(module)
    model, _ = layout.merge(layout.abstract)
    per_example = task.flops_per_example(model)
    model_flops = per_example * spec.global_batch_size if per_example else None
    links = _by_link(found)
    memory = compiled.memory
    peaks = peaks_of(target.chip) if target.chip else None
    if peaks is None and target.platform == "cpu" and cluster.backend == "local":
        peaks = measured_peaks(len(target.devices), memory.argument)
    state_bytes = memory.argument + memory.output
    parts = bounds(peaks, flops.total, state_bytes, links)
    bound, bound_by = largest(parts)
    devices = len(target.devices)
    mfu = None
    if bound and model_flops and peaks is not None and peaks.flops:
        mfu = model_flops / (devices * peaks.flops * bound)
    record: dict[str, Any] = {
        "schema": SCHEMA,
        "fits": _fits(compiled, target),
        **_memory_record(compiled, target),
        "largest_buffers": _largest_buffers(compiled, module, prepared, sorted(batch)),
        "ledger": {k: v for k, v in prepared.ledger.as_record().items() if k != "leaves"},
        "ledger_text": prepared.ledger.as_text(),
        "collectives": _grouped(found),
        "link_bytes": links,
        "least_bytes": _renamed(least_bytes(spec, task, layout), target),
        "unknown_loops": unknown_loops,
        "model_flops": model_flops,
        "model_flops_formula": task.flops_formula(),
        "compiled_flops": flops.total * devices,
        "remat_flops": flops.again * devices,
        "kernel_flops": flops.kernels * devices,
        "silent_kernels": list(flops.silent),
        "peaks": None if peaks is None else dataclasses.asdict(peaks),
        "bounds": parts,
        "step_seconds_bound": bound,
        "bound_by": bound_by,
        "mfu_bound": mfu,
        "compile_seconds": compiled.seconds,
        "program_bytes": len(compiled.text),
        **_checkpoint(prepared, cluster),
        "tokens_per_step": spec.global_batch_size * task.tokens_per_example(),
        "global_batch_size": spec.global_batch_size,
        "num_microbatches": spec.num_microbatches,
        "mesh": dataclasses.asdict(spec.mesh),
        "target": _target_record(target),
        "simulated": target.simulated,
        "versions": versions(),
        "remarks": prepared.remarks,
        "suggestions": [],
    }
    if record["fits"] is False:
        record["suggestions"] = suggestions(spec, cluster, record)
    return record


def versions() -> dict[str, str]:
    """Of what the program comes from."""
    found = {}
    for name in ("jax", "jaxlib", "libtpu", "flax", "optax"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _fits(compiled: Compiled, target: Target) -> bool | None:
    """The compiler's word for TPUs; elsewhere by the device's memory, if it is known."""
    if target.platform == "tpu":
        return compiled.fits
    if target.chip is None:
        return None
    return compiled.peak <= target.chip.hbm_bytes


def _memory_record(compiled: Compiled, target: Target) -> dict[str, Any]:
    memory, chip = compiled.memory, target.chip
    usable = compiled.usable_bytes or (chip.usable_hbm_bytes if chip else None)
    return {
        "peak_bytes": compiled.peak,
        "hbm_bytes": chip.hbm_bytes if chip else None,
        "usable_hbm_bytes": usable,
        "argument_bytes": memory.argument,
        "output_bytes": memory.output,
        "alias_bytes": memory.alias,
        "temp_bytes": memory.temp,
        "code_bytes": memory.code,
    }


def _largest_buffers(
    compiled: Compiled, module: Any, prepared: Prepared, batch: Sequence[str]
) -> list[dict[str, Any]]:
    """The largest arguments and temporaries at the peak."""
    if compiled.dump is None:
        return []
    namer = Namer(module, prepared.layout, batch)
    rows: list[dict[str, Any]] = []
    for one in compiled.dump.allocations:
        if one.parameter is not None:
            name = namer.argument(one.parameter)
            shape = one.buffers[0].shape.split("{")[0] if one.buffers else ""
            rows.append({"kind": "argument", "name": name, "bytes": one.size, "shape": shape,
                         "what": _role(name)})  # fmt: skip
    for buffer in at_the_peak(with_loops(compiled.dump, module)):
        rows.append({"kind": "temporary", **namer.temporary(buffer)._asdict()})
    rows.sort(key=lambda row: -row["bytes"])
    return rows[:_MOST_BUFFERS]


def _role(name: str) -> str:
    if name.startswith("model."):
        return "parameter"
    return "optimizer state" if name.startswith("optimizer.") else "input"


def _by_link(found: Sequence[Collective]) -> dict[str, float]:
    links: dict[str, float] = {}
    for one in found:
        links[one.link] = links.get(one.link, 0.0) + one.sent_bytes
    return links


def _renamed(least: Mapping[str, float], target: Target) -> dict[str, float]:
    """Away from TPUs it is not told apart which link carries what."""
    return dict(least) if target.platform == "tpu" else {"all": sum(least.values())}


def _grouped(found: Sequence[Collective]) -> list[dict[str, Any]]:
    """Collectives of one kind, along the same axes, over one link, of one dtype, together."""
    groups: dict[tuple[Any, ...], dict[str, Any]] = {}
    for one in found:
        key = (one.kind, one.axes, one.link, one.dtype)
        row = groups.setdefault(
            key,
            {"kind": one.kind, "axes": list(one.axes), "link": one.link, "dtype": one.dtype,
             "count": 0.0, "bytes": 0.0},
        )  # fmt: skip
        row["count"] += one.count
        row["bytes"] += one.sent_bytes
    return sorted(groups.values(), key=lambda row: -row["bytes"])


def _checkpoint(prepared: Prepared, cluster: Cluster) -> dict[str, Any]:
    size = sum(entry.total_bytes for entry in prepared.ledger.entries)
    rate = CHECKPOINT_BYTES_PER_SECOND_AND_HOST
    return {
        "checkpoint_bytes": size,
        "checkpoint_bytes_per_second": rate * cluster.hosts,
        "checkpoint_seconds": size / (rate * cluster.hosts),
    }


def _target_record(target: Target) -> dict[str, Any]:
    return {
        "name": target.name,
        "platform": target.platform,
        "devices": len(target.devices),
        "chip": target.chip.name if target.chip else None,
    }
