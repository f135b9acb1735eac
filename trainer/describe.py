"""What a config makes of a model, parameter by parameter, before anything runs.

    python -m trainer.describe --config=FILE [--cluster=FILE | --num_devices=N] [--config.x.y=V ...]

Prints a row per parameter: shape, dtype, logical axes, PartitionSpec, group, whether its weights
decay, and the state that the optimizer keeps for it, with the shape, dtype and PartitionSpec in
which that differs. Layers that are alike share a row, `layers.0-3.mlp.up`; with --nofold each has
its own. Needs no accelerator and makes no array.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Iterable, Sequence
from typing import Any

from absl import flags

from launch.spec import MeshSpec, TrainSpec, cluster_spec, load_config, train_spec
from trainer.command_line import parse_flags
from trainer.exit import run_main


def main() -> None:
    """The command line."""
    run_main(lambda: print(described(sys.argv)))


def described(argv: list[str]) -> str:
    """The text for a command line.

    Raises:
      ConfigError: whatever is wrong with the command line or the config.
    """
    if "--help" in argv:
        return (__doc__ or "").strip()
    own = flags.FlagValues()
    flags.DEFINE_integer("num_devices", None, "Devices to lay out for.", 1, flag_values=own)
    flags.DEFINE_bool("fold", True, "One row for layers that are alike.", flag_values=own)
    from_cluster = load_config("cluster", argv[1:], required=False)
    from_config = load_config("config", from_cluster.rest)
    parse_flags([argv[0], *from_config.rest], own)
    num_devices = own.num_devices
    if num_devices is None and from_cluster.config is not None:
        num_devices = cluster_spec(from_cluster.config).num_devices
    if num_devices is None:
        num_devices = _fewest_devices(train_spec(from_config.config).mesh)
    return describe(train_spec(from_config.config, num_devices), fold=own.fold)


def _fewest_devices(mesh: MeshSpec) -> int:
    sizes = [getattr(mesh, field.name) for field in dataclasses.fields(mesh)]
    return math.prod(size for size in sizes if size != -1)


def describe(spec: TrainSpec, fold: bool = True) -> str:
    """The table, what belongs to no parameter, the learning rates, the ledger, and warnings.

    Args:
      spec: resolved.
      fold: whether layers that are alike share a row.

    Raises:
      ConfigError: what `prepare` refuses.
    """
    import jax

    jax.config.update("jax_platforms", "cpu")  # Schedules are evaluated; nothing else is.
    from trainer.mesh import abstract_mesh
    from trainer.prepare import prepare
    from trainer.schedules import remarks
    from trainer.task import load_task

    prepared = prepare(spec, load_task(spec.task, spec.model, spec.data), abstract_mesh(spec.mesh))
    rows, others = rows_of(prepared)
    lines = [as_table(folded_rows(rows) if fold else rows), "", totals(prepared)]
    if others:
        lines.append(f"optimizer state that belongs to no parameter: {', '.join(others)}")
    steps = sorted({round(share * (spec.num_steps - 1)) for share in (0, 0.1, 0.25, 0.5, 1)})
    for group, rate in prepared.optimizer.learning_rates.items():
        shown = ", ".join(f"{float(rate(n)):.3g} at {n}" for n in steps)
        of = f" of {group}" if group else ""
        lines.append(f"learning rate{of}, by updates done: {shown}")
    lines += [prepared.ledger.as_text(), *prepared.remarks]
    lines += remarks(prepared.optimizer.schedules, spec.num_steps)
    return "\n".join(lines)


@dataclasses.dataclass(frozen=True)
class Row:
    """A parameter, every field as text: `axes` are the logical names, `state` what is kept."""

    parameter: str
    shape: str
    dtype: str
    axes: str
    spec: str
    group: str
    decayed: str
    state: str


def rows_of(prepared: Any) -> tuple[list[Row], list[str]]:
    """A row per parameter, and the arrays of the optimizer that belong to none.

    Args:
      prepared: from `trainer.prepare.prepare`.
    """
    from flax import nnx

    from trainer.opt_state import owner_of
    from trainer.param_paths import param_path

    facts, layout = prepared.optimizer.facts, prepared.layout
    entries = {entry.name: entry for entry in prepared.ledger.entries}
    model, optimizer = layout.merge(layout.abstract)
    variables = {
        ".".join(str(key) for key in path): variable
        for path, variable in nnx.to_flat_state(nnx.state(model, optimizer.wrt))
    }
    paths = [param_path(path) for path in [p.split(".") for p in variables]]
    kept: dict[str, dict[str, list[str]]] = {path: {} for path in paths}
    others = []
    prefix = "optimizer.opt_state."
    for name, entry in entries.items():
        if not name.startswith("optimizer."):
            continue
        place = name.removeprefix(prefix)
        owner = owner_of(place, variables)
        around = f".{place}.".rpartition(f".{owner}.") if owner else (place,)
        keys = [key for part in around[::2] for key in part.split(".") if key]
        field = next((key for key in reversed(keys) if not key.isdigit()), place)
        if owner is None:
            others.append(f"{field}{_shape(entry.shape)}" if entry.shape else field)
            continue
        param = entries[f"model.{owner}"]
        differs = [
            text
            for text, same in (
                (_shape(entry.shape), entry.shape == param.shape),
                (entry.dtype, entry.dtype == param.dtype),
                (entry.spec, entry.spec == param.spec),
            )
            if not same
        ]
        kept[owner].setdefault(" ".join(differs), []).append(field)
    rows = []
    for path, variable in variables.items():
        param = entries[f"model.{path}"]
        frozen = facts.is_frozen(path)
        axes = variable.get_metadata().get("out_sharding") or ()
        rows.append(
            Row(
                parameter=path,
                shape=_shape(param.shape),
                dtype=param.dtype,
                axes=", ".join(str(axis) for axis in axes),
                spec=param.spec,
                group=(facts.group(path) or "-") + (" (frozen)" if frozen else ""),
                decayed="yes" if facts.decayed(path) else "no",
                state="; ".join(
                    f"{', '.join(fields)} {differs}".strip()
                    for differs, fields in kept[path].items()
                )
                or "-",
            )
        )
    return rows, _counted(others)


def folded_rows(rows: Sequence[Row]) -> list[Row]:
    """Rows that differ in the numbers of their paths alone as one, `layers.0-3.mlp.up`."""
    from trainer.param_paths import folded

    alike: dict[Row, list[str]] = {}
    for row in rows:
        alike.setdefault(dataclasses.replace(row, parameter=""), []).append(row.parameter)
    firsts = {
        paths[0]: dataclasses.replace(row, parameter=name)
        for row, members in alike.items()
        for name, paths in folded(members).items()
    }
    return [firsts[row.parameter] for row in rows if row.parameter in firsts]


def totals(prepared: Any) -> str:
    """How many parameters there are, and how many numbers in them are trained and decay."""
    facts, params = prepared.optimizer.facts, prepared.layout.params
    sizes = {
        entry.name.removeprefix("model."): math.prod(entry.shape)
        for entry in prepared.ledger.entries
        if entry.name in params
    }
    trained = sum(size for path, size in sizes.items() if not facts.is_frozen(path))
    decayed = sum(size for path, size in sizes.items() if facts.decayed(path))
    return (
        f"{len(sizes)} parameters of {sum(sizes.values()):,} numbers: {trained:,} are trained, "
        f"{decayed:,} are decayed"
    )


def as_table(rows: Sequence[Row]) -> str:
    """Rows under a line of headings, columns padded to the widest."""
    names = [field.name for field in dataclasses.fields(Row)]
    cells = [names, *[[getattr(row, name) for name in names] for row in rows]]
    widths = [max(len(line[i]) for line in cells) for i in range(len(names))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in cells
    )


def _shape(shape: Iterable[int]) -> str:
    return f"[{', '.join(str(length) for length in shape)}]"


def _counted(names: Sequence[str]) -> list[str]:
    """['a', 'b', 'a'] -> ['a (2)', 'b']."""
    counts = {name: names.count(name) for name in dict.fromkeys(names)}
    return [f"{name} ({count})" if count > 1 else name for name, count in counts.items()]


if __name__ == "__main__":
    main()
