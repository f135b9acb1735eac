"""What would make a step fit that does not: ways near to it that are estimated to."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from launch.spec import Cluster, TrainSpec
from trainer.plan.search import Search, remat_policies

_MOST = 3


def suggestions(
    spec: TrainSpec, cluster: Cluster, record: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """The ways with the fewest changes, of the same batch, that are estimated to fit.

    They keep the mesh, or give its `data` devices to `fsdp`; they differ in remat, microbatches and
    `sharding.optimizer_axes`. `muster plan --search` looks further.

    Args:
      spec: resolved.
      cluster: whose devices it does not fit.
      record: its plan: by how much the estimate of the step itself was wrong, so others' are taken
        to be.

    Returns:
      `overrides`, words for the command line, and `estimated_bytes` of the peak.
    """
    room = record["usable_hbm_bytes"] or record["hbm_bytes"]
    if room is None:
        return []
    mesh = spec.mesh
    wider = dataclasses.replace(mesh, data=1, fsdp=mesh.data * mesh.fsdp)
    search = Search(spec, remat_policies(spec.model.get("remat")), [])
    search.go_through(cluster, list(dict.fromkeys([mesh, wider])))
    own = _fields(spec)
    itself = [row for row in search.rows if not _changes(row, own)]
    times = 1.0
    if itself and itself[0]["temp_bytes"]:
        beyond = record["peak_bytes"] - itself[0]["state_bytes"]
        times = beyond / itself[0]["temp_bytes"]
    found = []
    for row in search.rows:
        peak = row["state_bytes"] + times * row["temp_bytes"]
        if peak <= room:
            changes = _changes(row, own)
            order = (len(changes), row["fields"]["num_microbatches"], peak)
            found.append((order, {"overrides": changes, "estimated_bytes": int(peak)}))
    found.sort(key=lambda pair: pair[0])
    return [one for _, one in found[:_MOST]]


def _fields(spec: TrainSpec) -> dict[str, Any]:
    """What a search sets, as the config has it."""
    return {
        **{f"mesh.{name}": size for name, size in dataclasses.asdict(spec.mesh).items()},
        "model.remat": spec.model.get("remat"),
        "num_microbatches": spec.num_microbatches,
        "sharding.optimizer_axes": spec.sharding.optimizer_axes,
        "global_batch_size": spec.global_batch_size,
    }


def _changes(row: Mapping[str, Any], own: Mapping[str, Any]) -> list[str]:
    # Quotes that need no escape in a shell's word.
    return [
        f"--config.{name}={value}".replace("'", '"')
        for name, value in row["fields"].items()
        if value != own[name]
    ]
