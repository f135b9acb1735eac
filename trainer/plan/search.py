"""Estimate all ways to run a training step on a cluster; compiles nothing.

    python -m trainer.plan.search --config=FILE --cluster=FILE [--config.x.y=V] [--cluster.x=V]
        [--accelerators=TYPE,...] [--device_batches=N,...]

Prints a JSON object: `rows`, each with the config's `fields` that it sets and the figures of an
estimate; and `left_out`, what cannot be, by reason. `muster plan --search` compiles the best.
"""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

from absl import flags

from launch.contract import SCHEMA
from launch.spec import (
    Cluster,
    ConfigError,
    MeshSpec,
    TrainSpec,
    cluster_spec,
    load_config,
    train_spec,
)
from trainer.command_line import parse_flags
from trainer.exit import run_main
from trainer.plan.candidates import REMAT, Candidate, candidates, meshes
from trainer.plan.target import prepare_environment


def main() -> None:
    """The command line."""
    run_main(lambda: print(json.dumps(searched(sys.argv))))


def searched(argv: list[str]) -> dict[str, Any]:
    """The record for a command line.

    Raises:
      ConfigError: whatever is wrong with the command line or the config.
    """
    own = flags.FlagValues()
    flags.DEFINE_list("accelerators", [], "TPU accelerator types to compare.", flag_values=own)
    flags.DEFINE_list("device_batches", [], "Examples per device and step.", flag_values=own)
    from_cluster = load_config("cluster", argv[1:])
    from_config = load_config("config", from_cluster.rest)
    parse_flags([argv[0], *from_config.rest], own)
    clusters = [cluster_spec(from_cluster.config)]
    if own.accelerators:
        words = from_cluster.words("cluster")
        clusters = [
            cluster_spec(load_config("cluster", [*words, f"--cluster.accelerator={name}"]).config)
            for name in own.accelerators
        ]
    spec = train_spec(from_config.config)
    # A model without the field in its file has nothing that could be overridden.
    remat = remat_policies(spec.model.get("remat"))
    prepare_environment(max(cluster.num_devices for cluster in clusters), clusters[0].env)
    search = Search(spec, remat, [int(number) for number in own.device_batches])
    for cluster in clusters:
        search.go_through(cluster)
    return search.record()


def remat_policies(own: str | None) -> list[str | None]:
    """What to try: the config's own policy too."""
    if own is None:
        return [None]
    return list(dict.fromkeys([own, *REMAT]))


class _Laid(NamedTuple):
    """A state on a mesh, or why it cannot be laid out there."""

    prepared: Any
    error: ConfigError | None


class Search:
    """Estimates, and what was left out."""

    def __init__(self, spec: TrainSpec, remat: Sequence[str | None], device_batches: Sequence[int]):
        from trainer.task import load_task

        self._spec = spec
        self._remat: list[str | None] = []
        self._device_batches = device_batches
        self._rows: list[dict[str, Any]] = []
        self._left_out: dict[str, dict[str, Any]] = {}
        self._tasks: dict[str | None, Any] = {}
        for policy in remat:
            model = spec.model if policy is None else {**spec.model, "remat": policy}
            try:
                self._tasks[policy] = load_task(spec.task, model, spec.data)
            except ConfigError:
                if policy == spec.model.get("remat"):
                    raise
                continue  # Another model's policy.
            self._remat.append(policy)
        self._traces: dict[str | None, Any] = {}
        self._remarks: list[str] = []

    def record(self) -> dict[str, Any]:
        """All of it, as JSON."""
        return {
            "schema": SCHEMA,
            "rows": self._rows,
            "left_out": list(self._left_out.values()),
            "remarks": list(dict.fromkeys(self._remarks)),
        }

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The ways that were estimated."""
        return self._rows

    def go_through(self, cluster: Cluster, only: Sequence[MeshSpec] | None = None) -> None:
        """Estimate all ways on a cluster, or those on some meshes."""
        from trainer.plan.target import make_target

        target = make_target(cluster)
        devices = cluster.num_devices
        batches = [number * devices for number in self._device_batches]
        batches = batches or [self._spec.global_batch_size]
        for mesh in meshes(devices, cluster.slices) if only is None else only:
            if reason := _unfit(mesh, target.devices, cluster):
                self._leave_out(reason, mesh)
                continue
            laid: dict[tuple[str, ...], _Laid] = {}
            ways = list(candidates(mesh, remat=self._remat, global_batch_sizes=batches))
            if not ways:
                self._leave_out("global_batch_size is not a multiple of data * fsdp", mesh)
            for way in ways:
                spec = way.spec(self._spec, devices)
                if way.optimizer_axes not in laid:
                    laid[way.optimizer_axes] = self._lay_out(spec, self._tasks[way.remat])
                prepared, error = laid[way.optimizer_axes]
                if error:
                    self._leave_out(f"{error.field or 'config'}: {_first_words(error)}", mesh)
                    continue
                self._rows.append(self._row(way, spec, prepared, cluster, target))

    def _lay_out(self, spec: TrainSpec, task: Any) -> _Laid:
        from trainer.mesh import abstract_mesh
        from trainer.prepare import prepare

        try:
            return _Laid(prepare(spec, task, abstract_mesh(spec.mesh)), None)
        except ConfigError as error:
            return _Laid(None, error)

    def _row(
        self, way: Candidate, spec: TrainSpec, prepared: Any, cluster: Cluster, target: Any
    ) -> dict[str, Any]:
        from trainer.plan.estimate import estimate
        from trainer.plan.trace import NOTHING, layout_on, trace

        task, chip = self._tasks[way.remat], target.chip
        if way.remat not in self._traces:
            try:
                self._traces[way.remat] = trace(
                    task, layout_on(target.devices[0], self._spec, task)
                )
            except Exception as error:  # A loss that does not go with one example on one device.
                what = " ".join(f"{type(error).__name__}: {error}".split())
                self._remarks.append(f"activations and products are not estimated: {what}")
                self._traces[way.remat] = NOTHING
        found = estimate(spec, task, prepared, self._traces[way.remat], chip)
        return {
            "accelerator": cluster.accelerator,
            "devices": cluster.num_devices,
            "tokens_per_step": spec.global_batch_size * task.tokens_per_example(),
            "fields": way.fields(),
            **dataclasses.asdict(found),
            "hbm_bytes": chip.hbm_bytes if chip else None,
            "usable_hbm_bytes": chip.usable_hbm_bytes if chip else None,
        }

    def _leave_out(self, reason: str, mesh: Any) -> None:
        like = re.sub(r"= \d+", "= N", reason)  # Of axes that differ in their size alone.
        entry = self._left_out.setdefault(like, {"reason": reason, "meshes": []})
        shape = dataclasses.asdict(mesh)
        if shape not in entry["meshes"]:
            entry["meshes"].append(shape)


def _unfit(mesh: Any, devices: Sequence[Any], cluster: Cluster) -> str:
    """Why a mesh does not fit the grid of chips; "" if it does."""
    from trainer.mesh import make_mesh

    if cluster.num_processes % (mesh.dcn_data * mesh.dcn_fsdp):
        return "dcn_data * dcn_fsdp parts are not whole processes"
    try:
        make_mesh(mesh, devices)
    except (ConfigError, NotImplementedError, ValueError):
        grid = f" {cluster.slice.topology}" if cluster.backend == "tpu" else ""
        return f"the mesh does not fit the grid{grid}"
    return ""


def _first_words(error: ConfigError) -> str:
    """What is wrong, without what to do."""
    return error.rule.partition(";")[0].split(" (largest")[0]


if __name__ == "__main__":
    main()
