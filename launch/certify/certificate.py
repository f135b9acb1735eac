"""The certificate: what was run, what was found, as JSON and in words."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from typing import Any

from launch import contract
from launch.certify.diagnose import INTERRUPTION_FREE
from launch.certify.interruptions import Pace
from launch.certify.judge import BIT_EXACT, BOUNDED, FAILED, Finding, OnTopology, tolerance_of
from launch.certify.trial import Hit, Trial
from launch.plan import code
from launch.spec import plain

AGAIN = "again"  # The run of what was not delivered at first.
FILE, PAGE = "certificate.json", "certificate.html"


@dataclasses.dataclass
class Outcome:
    """All that a certificate is made of, as far as it has come.

    Attributes:
      reference: the run without interruption.
      trials: all runs with interruptions on the same topology.
      hits: what became of the interruptions.
      not_applicable: names of interruptions that this config cannot suffer.
      topologies: the others.
      finding: why there is no certificate.
    """

    reference: Trial
    trials: list[Trial] = dataclasses.field(default_factory=list)
    hits: list[tuple[Trial, Hit]] = dataclasses.field(default_factory=list)
    not_applicable: list[str] = dataclasses.field(default_factory=list)
    topologies: list[OnTopology] = dataclasses.field(default_factory=list)
    others: list[Trial] = dataclasses.field(default_factory=list)
    finding: Finding | None = None

    @property
    def verdict(self) -> str:
        """Of all."""
        if self.finding is not None:
            return FAILED
        if self.hits:
            return BIT_EXACT  # Others have a verdict of their own.
        verdicts = [one.verdict for one in self.topologies]
        return BOUNDED if BOUNDED in verdicts else BIT_EXACT if BIT_EXACT in verdicts else FAILED


def config_hash(config: Any) -> str:
    """A digest of the resolved config."""
    text = json.dumps(plain(config), sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def record(
    outcome: Outcome, *, config: Any, pace: Pace, seed: int, began: float, command: Sequence[str]
) -> dict[str, Any]:
    """The certificate as JSON."""
    facts = outcome.reference.records().facts
    dtype, tolerance, drift = tolerance_of(facts)
    now = time.time()
    runs = [outcome.reference, *outcome.trials, *outcome.others]
    return {
        "schema": contract.SCHEMA,
        "verdict": outcome.verdict,
        "first_difference": outcome.finding.as_record() if outcome.finding else None,
        "interruptions": [interruption(trial, hit) for trial, hit in outcome.hits],
        "not_applicable": outcome.not_applicable,
        "topologies": [topology.as_record() for topology in outcome.topologies],
        "tolerance": {"dtype": dtype, "loss": tolerance.metric, "params": drift},
        "steps": pace.steps,
        "save_every_steps": pace.save_every,
        "eval_every_steps": pace.eval_every,
        "seed": seed,
        "num_processes": facts.get("num_processes"),
        "devices": facts.get("devices"),
        "mesh": facts.get("mesh"),
        "versions": facts.get("versions"),
        "config_sha256": config_hash(config),
        "code_sha256": code.digest(config.task),
        "command": list(command),
        "started_at": contract.utc(began),
        "ended_at": contract.utc(now),
        "seconds": round(now - began, 1),
        "runs": [
            {
                "name": run.name,
                "what": run.text,
                "directory": str(run.run),
                "seconds": None if run.seconds is None else round(run.seconds, 1),
                "losses": {str(step): loss for step, loss in run.records().losses.items()},
            }
            for run in runs
        ],
    }


def interruption(trial: Trial, hit: Hit) -> dict[str, Any]:
    """An interruption of a certificate."""
    planned = hit.interruption
    return {
        "id": planned.id,
        "name": planned.name,
        "kind": planned.kind,
        "phase": hit.phase or planned.phase,
        "step": hit.step,
        "planned_step": planned.step,
        "process": "all" if planned.process is None else planned.process,
        "delivered": hit.delivered,
        "where": hit.where,
        "trial": trial.name,
        "tries": 2 if trial.name == AGAIN else 1,
        "attempt": hit.attempt,
        "resumed_at": hit.resumed_at,
        "text": planned.text,
    }


def summary(certificate: Mapping[str, Any]) -> list[str]:
    """What the command says at its end."""
    lines = [headline(certificate)]
    first = certificate["first_difference"]
    if first:
        lines += [f"  {line}" for line in first["told"].splitlines()]
    hits = certificate["interruptions"]
    delivered = sum(hit["delivered"] for hit in hits)
    if hits:
        trials = len({hit["trial"] for hit in hits})
        lines.append(
            f"  same topology: {delivered} of {len(hits)} interruptions delivered in {trials} "
            f"run{'s' * (trials > 1)}"
        )
    for hit in hits:
        if not hit["delivered"]:
            lines.append(f"    not delivered: {hit['text']}: {hit['where']}")
    if certificate["not_applicable"]:
        names = ", ".join(certificate["not_applicable"])
        lines.append(f"    not applicable, as this config has no evaluations: {names}")
    lines += [f"  {topology_line(one, certificate)}" for one in certificate["topologies"]]
    return lines


def headline(certificate: Mapping[str, Any]) -> str:
    """The verdict in words."""
    steps = certificate["steps"]
    first = certificate["first_difference"]
    if first and first["cause"] in INTERRUPTION_FREE:
        return "not certified: two runs of it differ, without any interruption"
    return {
        BIT_EXACT: f"certified: interrupted and resumed, {steps} steps are the same bit for bit",
        BOUNDED: f"certified: resumed on other topologies, {steps} steps see the same data, and "
        "their numbers stay within the tolerance",
        FAILED: "not certified: a run that is interrupted is not the same run",
    }[certificate["verdict"]]


def topology_line(one: Mapping[str, Any], certificate: Mapping[str, Any]) -> str:
    """What became of one other topology, in words."""
    name = one["topology"]
    if one["verdict"] == BIT_EXACT:
        return f"{name}: the same bit for bit"
    if one["verdict"] == BOUNDED:
        drift, most = one["drift"], certificate["tolerance"]
        return (
            f"{name}: same data; params drift by {drift['params']:.1e} of their way (at most "
            f"{most['params']:g}), losses by {drift['loss']:.1e} (at most {most['loss']:g})"
        )
    if one["verdict"] == FAILED:
        return f"{name}: failed"
    return f"{name}: not possible: {one['reason']}"
