"""How a training begins: from its newest checkpoint, from another run's params, or afresh.

The gate is here: what the step was saved with (config, code, versions) is compared with today's,
and what changes the numbers is refused unless the user named it (`launch.spec.resume`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from launch.spec import (
    ConfigError,
    Difference,
    RestoreSpec,
    TrainSpec,
    build,
    compare_code,
    compare_configs,
    compare_versions,
)
from launch.spec import resume as gate
from trainer import distributed, restore_plan
from trainer.agreement import fail_together
from trainer.changes import read_changes, record_change
from trainer.checkpoint import Checkpointer
from trainer.checkpoint_format import describe
from trainer.checkpoint_read import Restored, read_another
from trainer.distributed import say
from trainer.init_from import Source, find_source
from trainer.restore_plan import RestorePlan
from trainer.state import Leaves, StateLayout, init_state

OPTIMIZER_BEGAN = "optimizer_began"  # In a step's META.
_SHOWN = 8  # Differences in one line.


@dataclasses.dataclass
class Beginning:
    """How the training begins.

    Attributes:
      step: completed updates.
      leaves: the state, in the layout's order.
      data_position: where the data goes on; None for its beginning.
      optimizer_began: completed updates when the optimizer began, with its counters at 0.
    """

    step: int
    leaves: Leaves
    data_position: Any
    optimizer_began: int = 0


class Resume:
    """Decides how a run begins, and begins it. Collective: every process must make one.

    Args:
      spec: of the training.
      workdir: the run directory.
      record: what a checkpoint is saved with and compared by: `config`, `code`, `versions`.
      layout: of the train state.
    """

    def __init__(
        self, spec: TrainSpec, workdir: str, record: Mapping[str, Any], layout: StateLayout
    ):
        self._spec = spec
        self._workdir = workdir
        self._record = record
        self._layout = layout
        self._abstract = layout.as_dict(layout.abstract)
        self._history: list[dict[str, Any]] = []
        self._plan: RestorePlan | None = None
        self._lines: list[str] = []
        self._change: dict[str, Any] = {}

    def begin(self, saver: Checkpointer) -> Beginning:
        """Restore, or make a fresh state. Collective: every process must call this.

        Raises:
          ConfigError: a change that is not allowed, or a state that does not fit.
          CheckpointError: there are steps, and none can be used.
        """
        own = read_changes(self._workdir) if distributed.is_lead() else []
        self._history = distributed.broadcast("resume/changes", own)
        restored = saver.restore(self._abstract, self._of_step)
        if restored is not None:
            where = saver.directory / str(restored.step)
            say(f"resumed from step {restored.step} ({where})")
            began = Beginning(
                restored.step,
                self._leaves(restored),
                restored.data_position,
                restored.step
                if self._optimizer_is_fresh
                else restored.meta.get(OPTIMIZER_BEGAN, 0),
            )
            saver.keep(**{OPTIMIZER_BEGAN: began.optimizer_began})
        elif self._spec.init_from:
            began = Beginning(0, self._leaves(self._from_another()), None)
        else:
            return Beginning(0, init_state(self._layout), None)
        for line in self._lines:
            say(line)
        if self._change and distributed.is_lead():
            record_change(self._workdir, self._history, {"step": began.step, **self._change})
        return began

    # ---- The run's own checkpoint ----

    def _of_step(self, step: int, meta: Mapping[str, Any]) -> Mapping[str, str]:
        """The plan for a step of this run; refuses what must not be changed."""
        self._lines, self._change = [], {}
        self._check_init_from(step, meta)
        self._gate(step, meta)
        spec = self._spec.restore
        done = build(RestoreSpec, meta["config"].get("restore", {}), "config.restore")
        if spec.is_partial and done.as_record() == spec.as_record():
            self._lines.append(
                f"config.restore was applied before step {step} was saved: it is taken as it is"
            )
            spec = RestoreSpec()
        self._make_plan(meta, spec, f"step {step} of {self._workdir}")
        if spec.is_partial:
            self._change["restore"] = spec.as_record()
        assert self._plan is not None
        return self._plan.names

    def _gate(self, step: int, meta: Mapping[str, Any]) -> None:
        """Show what is harmless, accept what is named, refuse the rest. The lead decides."""
        allow = self._spec.restore.allow_change
        config = self._record["config"]
        judged = gate.judge(
            [
                *compare_configs(meta["config"], config),
                *compare_code(meta.get("code", {}), self._record.get("code", {})),
                *compare_versions(meta.get("versions", {}), self._record.get("versions", {})),
            ],
            allow,
            gate.changes_at(self._history, step),
        )
        error = None
        try:
            gate.check_names(allow, meta["config"], config, judged.refused)
            gate.refuse(self._workdir, judged)
        except ConfigError as found:
            error = [found.field, found.rule, found.value]
        # Code was compared between the processes before, but a file read late may be a newer one.
        error = distributed.broadcast("resume/gate", error)
        if error is not None:
            fail_together(ConfigError(*error), accuses=())
        idle = _idle(allow, judged.accepted, self._history)
        if idle:
            self._lines.append(f"note: nothing differs that {gate.FIELD}={','.join(idle)} allows")
        if judged.harmless:
            self._lines.append(f"changed since, harmless: {_listed(judged.harmless)}")
        if judged.accepted:
            self._lines.append(f"changed after step {step}, as allowed: {_listed(judged.accepted)}")
            self._change["changes"] = [
                {"field": found.field, "old": found.old, "new": found.new}
                for found in judged.accepted
            ]

    def _check_init_from(self, step: int, meta: Mapping[str, Any]) -> None:
        """A run that has steps cannot begin with another's params, but resume what did."""
        source = self._spec.init_from
        known = [record["init_from"]["source"] for record in self._history if "init_from" in record]
        if not source or source in (meta["config"].get("init_from"), *known):
            return
        rule = (
            f"this run is at step {step} already and cannot start from another's params; leave it "
            "out to resume, or give another --workdir"
        )
        fail_together(ConfigError("config.init_from", rule, source), accuses=())

    # ---- Another run's params ----

    def _from_another(self) -> Restored:
        text = self._spec.init_from
        error, source = None, None
        if distributed.is_lead():
            try:
                source = find_source(text)
            except ConfigError as found:
                error = [found.field, found.rule, found.value]
        error, source = distributed.broadcast("resume/init_from", (error, source))
        if error is not None:
            fail_together(ConfigError(*error), accuses=())
        assert source is not None
        directory, step = Source(*source)
        for record in self._history:  # An earlier start, which was ended before its first save.
            if (record.get("init_from") or {}).get("source") == text:
                step = record["init_from"]["step"]
        spec = self._spec.restore
        params = self._layout.params

        def plan(number: int, meta: Mapping[str, Any]) -> Mapping[str, str]:
            saved = meta["leaves"]
            theirs = meta.get("params") or [name for name in saved if name.startswith("model.")]
            self._make_plan(meta, spec, f"step {number} of {directory}", (theirs, params))
            assert self._plan is not None
            return self._plan.names

        restored = read_another(directory, step, self._abstract, plan)
        say(f"started from the params of step {restored.step} of {directory}")
        self._change["init_from"] = {
            "source": text,
            "directory": directory,
            "step": restored.step,
            "restore": spec.as_record() if spec.is_partial else None,
        }
        return restored

    # ---- Both ----

    @property
    def _optimizer_is_fresh(self) -> bool:
        return self._plan is not None and "optimizer.step" in self._plan.fresh

    def _make_plan(
        self,
        meta: Mapping[str, Any],
        spec: RestoreSpec,
        where: str,
        params: tuple[Sequence[str], frozenset[str]] | None = None,
    ) -> None:
        wanted = {name: describe(leaf) for name, leaf in self._abstract.items()}
        try:
            self._plan = restore_plan.make(meta["leaves"], wanted, spec, where, params)
        except ConfigError as error:
            fail_together(error, accuses=())  # All processes find the same.

    def _leaves(self, restored: Restored) -> Leaves:
        """The state of what was restored, and of fresh leaves for the rest."""
        assert self._plan is not None
        state = dict(restored.state)
        if self._plan.fresh:
            state |= init_state_of(self._layout, self._plan.fresh)
            self._lines.append(
                f"{len(restored.state)} leaves of the state are restored, {len(self._plan.fresh)} "
                f"start fresh"
            )
        if self._plan.renamed:
            self._lines.append(f"{self._plan.renamed} leaves have another name now")
        self._lines.append(restored.checked)
        return self._layout.from_dict(state)


def init_state_of(layout: StateLayout, names: Sequence[str]) -> dict[str, jax.Array]:
    """Some leaves of the initial state, by name; the others are never made. Collective."""
    wanted = frozenset(names)
    made = init_state(layout, wanted)
    return {name: leaf for name, leaf in zip(layout.names, made, strict=True) if name in wanted}


def _idle(
    allow: Sequence[str], accepted: Sequence[Difference], history: Sequence[Mapping[str, Any]]
) -> list[str]:
    """The names that allow nothing, now or earlier in the run: a restart gives them again."""
    fields = [found.name for found in accepted]
    for record in history:
        fields += [change["field"].removeprefix("config.") for change in record.get("changes", ())]
    return [name for name in allow if not any(gate.covers(name, field) for field in fields)]


def _listed(differences: Sequence[Difference]) -> str:
    more = len(differences) - _SHOWN
    shown = [
        found.field
        if found.field.startswith("code.")
        else f"{found.field} {found.old!r} -> {found.new!r}"
        for found in differences[:_SHOWN]
    ]
    return ", ".join(shown) + (f" and {more} more" if more > 0 else "")
