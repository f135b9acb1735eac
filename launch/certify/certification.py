"""Makes a certificate: which runs, in which order, and what is written at the end."""

from __future__ import annotations

import dataclasses
import os
import random
import sys
import time
from collections.abc import Mapping, Sequence

from launch import contract
from launch.certify import certificate, interruptions, judge, page
from launch.certify.certificate import Outcome
from launch.certify.diagnose import Diagnosis
from launch.certify.fleet import Fleet, clear
from launch.certify.interruptions import Interruption, Pace
from launch.certify.judge import Finding, OnTopology
from launch.certify.topologies import Topology
from launch.certify.trial import Trial, as_json
from launch.request import Request
from launch.spec import ConfigError
from launch.times import duration


@dataclasses.dataclass(frozen=True)
class Options:
    """How a certificate is made.

    Attributes:
      seed: of where and whom the interruptions hit.
      parallel: how many runs at once.
      keep: whether the runs' checkpoints stay.
      as_json: whether the certificate is printed.
      words: the command line, for the record.
    """

    seed: int
    parallel: int
    keep: bool
    as_json: bool
    words: tuple[str, ...]


class NoReference(Exception):
    """The training fails without any interruption."""


class Certification:
    """One certificate in the making.

    Args:
      request: what `muster run` would run.
      pace: of the runs.
      names: of the interruptions.
      others: topologies, the impossible ones as well.
      options: the rest.
    """

    def __init__(
        self,
        request: Request,
        *,
        pace: Pace,
        names: Sequence[str],
        others: Sequence[Topology],
        options: Options,
    ):
        self._request = request
        self._pace = pace
        self._names, self._not_applicable = interruptions.applicable(names, pace)
        self._others = others
        self._seed, self._parallel = options.seed, options.parallel
        self._options = options
        self._folder = request.workdir / "certify"
        self._began = time.time()
        self._fleet = Fleet(self._folder / "state", self._parallel, self._say)
        self._outcome = Outcome(self._trial("reference", "no interruption"))

    def clean(self) -> None:
        """Delete what an earlier certificate has left, once nothing of it runs any more."""
        clear(self._folder)
        for name in (certificate.FILE, certificate.PAGE):
            (self._request.workdir / name).unlink(missing_ok=True)

    def run(self) -> int:
        """All of it; the exit code."""
        count = len(self._names)
        self._say(
            f"{self._pace.steps} steps, a save every {self._pace.save_every}; {count} "
            f"interruption{'s' * (count != 1)} and {len(self._others)} other topologies, "
            f"{self._parallel} run{'s' * (self._parallel > 1)} at a time"
        )
        with self._fleet:
            self._same_topology()
            if self._outcome.finding is None:
                self._other_topologies()
        return self._write()

    # ------------------------------------------------------------------ the same topology

    def _same_topology(self) -> None:
        outcome = self._outcome
        outcome.not_applicable = list(self._not_applicable)
        reference = outcome.reference
        reference.prepare(self._plan(reference, keep_all=True))
        shared = interruptions.shared_out(self._names, max(1, self._parallel - 1))
        trials = self._interrupted(shared, "interrupted")
        if self._parallel == 1:
            self._fleet.run([reference])
            self._check_reference()
            self._fleet.run(trials)
        else:
            self._fleet.run([reference, *trials])
            self._check_reference()
        outcome.trials = trials
        outcome.hits = [(trial, hit) for trial in trials for hit in trial.hits()]
        self._judge(trials)
        missed = [hit.interruption.name for _, hit in outcome.hits if not hit.delivered]
        if missed and outcome.finding is None:
            again = self._interrupted([list(dict.fromkeys(missed))], certificate.AGAIN)
            self._fleet.run(again)
            outcome.trials += again
            outcome.hits = [one for one in outcome.hits if one[1].interruption.name not in missed]
            outcome.hits += [(trial, hit) for trial in again for hit in trial.hits()]
            self._judge(again)
        missed = [hit.interruption.text for _, hit in outcome.hits if not hit.delivered]
        if missed and outcome.finding is None:
            text = f"not proven: {len(missed)} interruptions could not be delivered: {missed[0]}"
            outcome.finding = Finding(trials[-1].name, None, Diagnosis("not_delivered", text))

    def _interrupted(self, shared: Sequence[Sequence[str]], prefix: str) -> list[Trial]:
        """Runs that suffer these interruptions, ready to start."""
        trials: list[Trial] = []
        first = 1 + max((hit.interruption.id for _, hit in self._outcome.hits), default=0)
        chance = random.Random(self._seed)
        for number, names in enumerate(shared):
            planned = interruptions.schedule(
                names,
                self._pace,
                self._request.cluster.num_processes,
                chance.randrange(1 << 30),
                first,
            )
            first += len(planned)
            count = len(planned)
            text = f"{count} interruption{'s' * (count > 1)}"
            name = f"{prefix}-{number + 1}" if len(shared) > 1 else prefix
            trials.append(self._trial(name, text, interrupted=planned))
            trials[-1].prepare(self._plan(trials[-1]))
        return trials

    def _check_reference(self) -> None:
        """Refuse what cannot be trained at all."""
        reference = self._outcome.reference
        code = reference.poll()
        if code == contract.EXIT_CONFIG:
            raise ConfigError("", reference.config_error())
        if code != contract.EXIT_DONE:
            text = "without any interruption the training does not come to its end"
            self._say(f"{text}: {reference.last_words()}")
            raise NoReference(f"{text}; see {reference.folder / 'output.log'}")

    def _judge(self, trials: Sequence[Trial]) -> None:
        outcome = self._outcome
        unfinished = [trial for trial in trials if trial.poll() != contract.EXIT_DONE]
        found = judge.differences(outcome.reference, trials, self._pace.steps)
        told = [t for t in trials if t.name in found and found[t.name].what != "missing"]
        if told:
            self._say("they differ; looking for the reason")
            records = outcome.reference.records()
            outcome.finding = judge.explain(
                found[told[0].name], told[0], records, self._uninterrupted
            )
        elif unfinished:
            outcome.finding = judge.failed_run(unfinished[0])
        elif found:
            name, difference = next(iter(found.items()))
            trial = next(trial for trial in trials if trial.name == name)
            records = outcome.reference.records()
            outcome.finding = judge.explain(difference, trial, records, self._uninterrupted)

    def _uninterrupted(self, which: str) -> list[Trial]:
        """Further runs without interruption; see `judge.explain`."""
        if which == "repeat":
            trials = [self._trial("repeat", "no interruption, once more")]
        else:
            env = {**os.environ, **self._request.cluster.env}
            if env.get("PYTHONHASHSEED", "random") != "random":
                return []
            fixed = ("--cluster.env.PYTHONHASHSEED=0",)
            names = ("hash-1", "hash-2")
            trials = [self._trial(name, "no interruption, fixed hashes", fixed) for name in names]
        for trial in trials:
            trial.prepare(self._plan(trial))
        self._fleet.run(trials)
        return trials

    # ------------------------------------------------------------------ other topologies

    def _other_topologies(self) -> None:
        outcome, parted = self._outcome, self._pace.save_every * 2
        checkpoint = outcome.reference.checkpoint(parted)
        trials: list[tuple[Topology, Trial]] = []
        for topology in self._others:
            if topology.impossible:
                outcome.topologies.append(
                    OnTopology(topology, judge.NOT_POSSIBLE, topology.impossible)
                )
                continue
            text = f"goes on from step {parted} on {topology.text}"
            trial = self._trial(topology.name, text, topology.words)
            trial.prepare(self._plan(trial), checkpoint)
            trials.append((topology, trial))
        self._fleet.run([trial for _, trial in trials])
        ran = []
        for topology, trial in trials:
            if trial.poll() == contract.EXIT_CONFIG:
                reason = trial.config_error()
                outcome.topologies.append(OnTopology(topology, judge.NOT_POSSIBLE, reason))
            elif trial.poll() != contract.EXIT_DONE:
                finding = judge.failed_run(trial)
                outcome.finding = outcome.finding or finding
                outcome.topologies.append(OnTopology(topology, judge.FAILED, finding.text))
            else:
                ran.append((topology, trial))
        if not ran:
            return
        outcome.others = [trial for _, trial in ran]
        self._say("comparing the states")
        try:
            drift = judge.measure_drift(
                outcome.reference,
                parted,
                self._pace.steps,
                outcome.others,
                env=self._request.cluster.env,
                over=self._fleet.interrupted,
            )
        except RuntimeError as error:
            self._fleet.check()
            outcome.finding = Finding("drift", None, Diagnosis("not_compared", str(error)))
            return
        for topology, trial in ran:
            judged, found = judge.on_topology(
                topology, trial, outcome.reference.records(), drift[trial.name], self._pace.steps
            )
            outcome.topologies.append(judged)
            outcome.finding = outcome.finding or found

    # ------------------------------------------------------------------ the end

    def _write(self) -> int:
        outcome, workdir = self._outcome, self._request.workdir
        record = certificate.record(
            outcome,
            config=self._request.config,
            pace=self._pace,
            seed=self._seed,
            began=self._began,
            command=self._options.words,
        )
        text = as_json(record)
        contract.write_atomically(workdir / certificate.FILE, text, mode=0o600)
        contract.write_atomically(workdir / certificate.PAGE, page.render(record), mode=0o600)
        certified = record["verdict"] != judge.FAILED
        if certified and not self._options.keep:
            for trial in (outcome.reference, *outcome.trials, *outcome.others):
                trial.forget_checkpoints()
        if self._options.as_json:
            print(text, end="")
        else:
            print("\n".join(certificate.summary(record)))
            took = duration(record["seconds"])
            print(f"  took {took}; {workdir / certificate.FILE}, {workdir / certificate.PAGE}")
        return contract.EXIT_DONE if certified else contract.EXIT_FAILED

    def _trial(
        self,
        name: str,
        text: str,
        words: Sequence[str] = (),
        interrupted: Sequence[Interruption] = (),
    ) -> Trial:
        return Trial(
            name,
            text,
            self._folder / name,
            [*self._request.sources, *words],
            interruptions=interrupted,
            num_processes=self._request.cluster.num_processes,
            backend=self._request.cluster.backend,
        )

    def _plan(self, trial: Trial, keep_all: bool = False) -> Mapping[str, object]:
        directory = str(trial.directory)
        return interruptions.plan_of(directory, self._pace, trial.interruptions, keep_all)

    def _say(self, text: str) -> None:
        since = time.time() - self._began
        print(f"muster certify [{since:4.0f} s]: {text}", file=sys.stderr, flush=True)
