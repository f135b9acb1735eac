"""From the records of all trials to verdicts, and to what a difference points to."""

from __future__ import annotations

import dataclasses
import json
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from launch import command, contract, rundir
from launch.certify import compare, diagnose
from launch.certify.compare import Difference, Tolerance
from launch.certify.diagnose import Diagnosis
from launch.certify.records import Records
from launch.certify.topologies import Topology
from launch.certify.trial import Trial
from launch.program import trainer_env

BIT_EXACT, BOUNDED, FAILED = "bit_exact", "same_data_bounded_drift", "failed"
NOT_POSSIBLE = "not_possible"

# Of a run on another topology. Sums are taken in another order there, and the optimizer makes more
# of the difference with every step; see docs/certify.md for what was measured, and for how much
# larger the drift of a run is that has lost something.
TOLERANCES = {"float32": (1e-3, 1e-2), "bfloat16": (1e-2, 5e-2)}
_DRIFT_SECONDS = 3600.0


@dataclasses.dataclass(frozen=True)
class Finding:
    """Why a certificate is not given.

    Attributes:
      trial: the run that differs, or could not go on.
      difference: the first; None where there is none to be told.
      diagnosis: what it points to.
    """

    trial: str
    difference: Difference | None
    diagnosis: Diagnosis

    @property
    def text(self) -> str:
        """In words, a line for each."""
        if self.difference is None:
            return self.diagnosis.text
        return f"{told(self.difference)}\n{self.diagnosis.text}"

    def as_record(self) -> dict[str, Any]:
        """As JSON, `first_difference` of a certificate."""
        record = self.difference.as_record() if self.difference else {}
        return {"trial": self.trial, **record, **self.diagnosis.as_record(), "told": self.text}


@dataclasses.dataclass
class OnTopology:
    """What became of the run on another topology.

    Attributes:
      topology: which.
      verdict: of it alone; `not_possible` for one that config, cluster or trainer refuse.
      reason: why not.
      drift: see `trainer.certify.drift.measure`, and `loss`, the largest of a step.
    """

    topology: Topology
    verdict: str
    reason: str = ""
    drift: Mapping[str, Any] | None = None

    def as_record(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "name": self.topology.name,
            "topology": self.topology.text,
            "words": list(self.topology.words),
            "verdict": self.verdict,
            "reason": self.reason,
            "drift": self.drift,
        }


def told(difference: Difference) -> str:
    """A difference in one line."""
    found = difference
    more = f" and {len(found.others)} more" if found.others else ""
    where = f"attempt {found.attempt}, which went on from step {found.resumed_at}"
    if found.what == compare.ROWS:
        what = f"row {found.name}{more} of the batch of step {found.step}"
    elif found.what == compare.MISSING:
        return f"step {found.step} is not on record: {found.name}"
    elif found.what == compare.STATE:
        what = f"the state after step {found.step}: {found.name}{more}"
    elif found.what in ("initial", "restored"):
        what = f"the state of step {found.step} that it began with: {found.name}{more}"
    else:
        what = f"{found.name} of step {found.step}: {found.expected!r} without the interruption, "
        what += f"{found.found!r} with it"
    return f"first difference ({where}): {what}"


def failed_run(trial: Trial) -> Finding:
    """Of a trial that could not be brought to its end."""
    text = f"{trial.text} did not come to its end: {trial.last_words()}; see {trial.run}"
    return Finding(trial.name, None, Diagnosis("did_not_finish", text))


def differences(reference: Trial, trials: Sequence[Trial], steps: int) -> dict[str, Difference]:
    """The first difference of each interrupted run that has one, by its name."""
    found = {}
    for trial in trials:
        one = compare.first_difference(reference.records(), trial.records(), steps=steps)
        if one is not None:
            found[trial.name] = one
    return found


def explain(
    difference: Difference, trial: Trial, reference: Records, runs: Callable[[str], list[Trial]]
) -> Finding:
    """Say what a difference points to, by runs without any interruption.

    Args:
      difference: of an interrupted run.
      trial: that run.
      reference: without interruption.
      runs: makes further uninterrupted runs and gives them ended: of `repeat` one more, of `hash`
        two with the same PYTHONHASHSEED, or none where the cluster sets one.
    """
    run = trial.records()
    found = diagnose.after_interruption(difference, reference, run)
    if diagnose.is_certain(difference, found):
        return Finding(trial.name, difference, found)
    if difference.attempt == 0:  # Up to there nobody has interrupted it.
        repeat, again = trial, difference
    else:
        (repeat,) = runs("repeat")
        one_more = compare.first_difference(reference, repeat.records())
        if one_more is None:
            return Finding(trial.name, difference, found)
        again = one_more
    by_hash = None
    if again.what == compare.ROWS and (two := runs("hash")):
        one, other = (run.records() for run in two)
        by_hash = compare.first_difference(one, other) is None
    found = diagnose.without_interruption(again, reference, repeat.records(), by_hash)
    return Finding(repeat.name, again, found)


def tolerance_of(facts: Mapping[str, Any]) -> tuple[str, Tolerance, float]:
    """(dtype, tolerance of the losses, tolerance of the drift) by what the model computes in."""
    dtype = facts.get("compute_dtype") or "float32"
    loss, drift = TOLERANCES.get(dtype, TOLERANCES["bfloat16"])
    return dtype, Tolerance(metric=loss, states=False), drift


def on_topology(
    topology: Topology,
    trial: Trial,
    reference: Records,
    drift: Mapping[str, Any],
    steps: int,
) -> tuple[OnTopology, Finding | None]:
    """Judge the run on another topology.

    Args:
      topology: which.
      trial: its run, ended well.
      reference: on the topology of the cluster config.
      drift: see `trainer.certify.drift.measure`.
      steps: of the reference.
    """
    _, tolerance, most = tolerance_of(reference.facts)
    run = trial.records()
    drift = {**drift, "loss": compare.largest_loss_drift(reference, run)}
    difference = compare.first_difference(reference, run, tolerance, steps)
    if difference is not None:
        found = diagnose.after_interruption(difference, reference, run)
        if difference.what == compare.METRIC:
            after = difference.step - difference.resumed_at
            text = (
                f"On {topology.text} the loss drifts by {drift['loss']:.2g} (relative), more than "
                f"{tolerance.metric:g}, with the same rows, {after} steps after it went on. On its "
                "own topology the run may well resume: a step that depends on how many processes "
                "or devices there are (statistics of a part of the batch, a generator of each "
                "process) does this, or numbers so unstable that rounding decides."
            )
            found = Diagnosis("drift", text)
        finding = Finding(trial.name, difference, found)
        return OnTopology(topology, FAILED, finding.text, drift), finding
    if drift["unequal"]:
        name = drift["unequal"][0]
        text = f"On {topology.text} {name}, which is no floating-point number, ends otherwise."
    elif drift["params"] is None or drift["params"] > most:
        name = drift["worst"]["leaf"]
        text = (
            f"On {topology.text} the params drift by {drift['params'] or float('inf'):.2g} of the "
            f"way they went, more than {most:g}; most of all {name}. Rows, losses and learning "
            "rates agree."
        )
    else:
        verdict = BIT_EXACT if drift["exact"] and not drift["loss"] else BOUNDED
        return OnTopology(topology, verdict, "", drift), None
    found = Diagnosis("drift", text)
    place = Difference(-1, steps, compare.STATE, name)
    return OnTopology(topology, FAILED, text, drift), Finding(trial.name, place, found)


def measure_drift(
    parted: Trial,
    step: int,
    steps: int,
    trials: Sequence[Trial],
    *,
    env: Mapping[str, str],
    over: threading.Event,
) -> dict[str, Any]:
    """Have the last states compared, by a process that has JAX; it reads them on this machine.

    Args:
      parted: the reference.
      step: that the others went on from.
      steps: of all.
      trials: the others.
      env: that the cluster config sets.
      over: nobody wants to know any more when this is set.

    Raises:
      RuntimeError: it could not; the text has what it said last.
    """
    folder = parted.folder
    request = {
        "parted": str(parted.checkpoint(step)),
        "reference": str(parted.checkpoint(steps)),
        "runs": {trial.name: str(trial.checkpoint(steps)) for trial in trials},
        "kinds": parted.records().facts.get("kinds", {}),
    }
    rundir.write_private(folder / "drift_request.json", request)
    answer = folder / "drift.json"
    done = command.run(
        [
            *(sys.executable, "-m", "trainer.certify.drift"),
            *(str(folder / "drift_request.json"), str(answer)),
        ],
        timeout_seconds=_DRIFT_SECONDS,
        env={**trainer_env(env), "JAX_PLATFORMS": "cpu", contract.CERTIFY_PLAN: ""},
        bound=True,
        over=over,
    )
    if not done.ok:
        raise RuntimeError(f"the states could not be compared: {done.last_word}")
    return json.loads(answer.read_bytes())
