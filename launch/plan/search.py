"""`muster plan --search`: estimate all ways to run a step, compile the best, and rank them."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from launch import contract
from launch.plan import cache, planner
from launch.plan.choice import SEARCHED, Correction, Way, next_way, overrides
from launch.plan.planner import PlannerError, Question
from launch.plan.ranking import as_record, as_text, describe, not_alike
from launch.plan.text import one_line
from launch.spec import (
    ConfigError,
    LoadedConfig,
    cluster_spec,
    load_config,
    train_spec,
)
from launch.times import duration

_COMPILED = 6
_WAIT_SECONDS = 0.2


def search(config: LoadedConfig, cluster: LoadedConfig, flags: Mapping[str, str]) -> int:
    """Search, and print what was found.

    Args:
      config, cluster: as they were given.
      flags: the others.

    Returns:
      EXIT_DONE if a way fits, EXIT_CONFIG if none of those that were compiled does,
      EXIT_RESUMABLE if it was interrupted: the same command goes on.
    """
    most = _number(flags, "compile", _COMPILED, least=0)
    parallel = _number(flags, "parallel", max(1, len(os.sched_getaffinity(0)) // 2), least=1)
    wanted = _lists(flags)
    base = _Base.of(config, cluster)
    question = Question(base.words, base.config, cluster_spec(cluster.config))
    _say(f"estimating the ways to run this step on {question.place}")
    try:
        found = planner.estimates(question, wanted)
    except PlannerError as error:
        print(f"muster: error: {error}", file=sys.stderr)
        return contract.EXIT_FAILED
    ways = [base.way(row) for row in found["rows"]]
    if not ways:
        reasons = "; ".join(entry["reason"] for entry in found["left_out"])
        raise ConfigError("", f"no way to run this step on {question.place}: {reasons}")
    for remark in found.get("remarks", ()):
        _say(f"warning: {remark[:500]}")
    _say(f"{len(ways)} ways are estimated; compiling up to {most}, {parallel} at a time")
    interrupted = _Compilation(base, ways, most).run(parallel)
    if interrupted:
        _say("interrupted; the same command goes on where it was")
    if "json" in flags:
        print(json.dumps(as_record(ways, found["left_out"], interrupted), indent=1))
    else:
        print(as_text(ways, found["left_out"]))
    if interrupted:
        return contract.EXIT_RESUMABLE
    correction = Correction.of(ways)
    tried = [way for way in ways if way.record is not None] or ways
    return contract.EXIT_DONE if any(map(correction.fits, tried)) else contract.EXIT_CONFIG


def _number(flags: Mapping[str, str], name: str, default: int, least: int) -> int:
    text = flags.get(name, str(default))
    if not text.isdecimal() or int(text) < least:
        raise ConfigError(f"--{name}", f"must be a number from {least}", text)
    return int(text)


def _lists(flags: Mapping[str, str]) -> list[str]:
    """The flags that the estimates need, checked."""
    numbers = flags.get("device_batches", "1").split(",")
    if not all(number.isdecimal() and int(number) >= 1 for number in numbers):
        rule = "must be numbers of examples per device: 4,8"
        raise ConfigError("--device_batches", rule, flags["device_batches"])
    names = ("accelerators", "device_batches")
    return [f"--{name}={flags[name]}" for name in names if name in flags]


@dataclasses.dataclass(frozen=True)
class _Base:
    """What is the same of all ways.

    Attributes:
      words: of config and cluster, without what sets a field that is searched.
      config: by these words.
      own: its values of the fields that are searched.
      accelerator: the cluster's own.
    """

    words: tuple[str, ...]
    config: Any
    own: Mapping[str, Any]
    accelerator: str | None

    @classmethod
    def of(cls, config: LoadedConfig, cluster: LoadedConfig) -> _Base:
        kept = [word for word in config.words("config") if not _is_searched(word)]
        for word in config.overrides:
            if _is_searched(word):
                _say(f"{word} is left out: it is what is searched")
        base = load_config("config", kept).config
        spec = train_spec(base)
        own = {f"mesh.{name}": size for name, size in dataclasses.asdict(spec.mesh).items()}
        own |= {
            "model.remat": spec.model.get("remat"),
            "num_microbatches": spec.num_microbatches,
            "sharding.optimizer_axes": spec.sharding.optimizer_axes,
            "global_batch_size": spec.global_batch_size,
        }
        words = (*kept, *cluster.words("cluster"))
        return cls(words, base, own, cluster_spec(cluster.config).accelerator)

    def way(self, row: Mapping[str, Any]) -> Way:
        """A row of the estimates."""
        fields = dict(row["fields"])
        fields["sharding.optimizer_axes"] = tuple(fields["sharding.optimizer_axes"])
        words = overrides(fields, self.own)
        if row["accelerator"] != self.accelerator:
            words = (f"--cluster.accelerator={row['accelerator']}", *words)
        return Way(
            fields=fields,
            accelerator=row["accelerator"],
            devices=row["devices"],
            tokens=row["tokens_per_step"],
            estimate=row,
            overrides=words,
        )

    def question(self, way: Way) -> Question:
        """What to ask to have it compiled."""
        words = [*self.words, *way.overrides]
        cluster = load_config("cluster", words)
        config = load_config("config", cluster.rest)
        return Question(tuple(words), config.config, cluster_spec(cluster.config))


def _is_searched(word: str) -> bool:
    name = word.partition("=")[0].removeprefix("--config.")
    # The global batch is only searched when it is asked for, and then given by every way.
    return name != "global_batch_size" and any(
        name == field or name.startswith(f"{field}.") for field in SEARCHED
    )


class _Compilation:
    """Compiles the best ways, some at a time."""

    def __init__(self, base: _Base, ways: Sequence[Way], most: int):
        self._base = base
        self._ways = ways
        self._apart = not_alike(ways)
        self._most = most
        self._started = self._done = 0
        self._busy: list[Way] = []
        self._lock = threading.Lock()
        self._over = threading.Event()
        self._failures: list[BaseException] = []

    def run(self, parallel: int) -> bool:
        """Compile; whether it was interrupted. Nothing runs any more when it returns."""
        workers = [threading.Thread(target=self._work) for _ in range(min(parallel, self._most))]
        interrupted = False
        with _terminated_as_interrupted():
            try:
                for worker in workers:
                    worker.start()
                while any(worker.is_alive() for worker in workers):
                    time.sleep(_WAIT_SECONDS)
            except KeyboardInterrupt:
                interrupted = True
            finally:
                self._over.set()
                for worker in workers:
                    if worker.ident is not None:
                        worker.join()
        if self._failures:
            raise self._failures[0]
        return interrupted

    def _work(self) -> None:
        while way := self._take():
            try:
                self._compile(way)
            except BaseException as error:
                self._failures.append(error)
                self._over.set()
            finally:
                with self._lock:
                    self._busy.remove(way)

    def _take(self) -> Way | None:
        with self._lock:
            if self._over.is_set() or self._started >= self._most:
                return None
            way = next_way(self._ways, self._busy)
            if way is not None:
                self._started += 1
                self._busy.append(way)
            return way

    def _compile(self, way: Way) -> None:
        began, name = time.monotonic(), describe(way, self._apart)
        with self._lock:  # Loading a config file is not for two threads at a time.
            question = self._base.question(way)
            found = cache.find(question.key)
        try:
            found = found or planner.make(question, self._over)
        except (ConfigError, PlannerError) as error:
            if self._over.is_set():
                return
            why = error.short if isinstance(error, PlannerError) else str(error)
            way.error = f"{name}: {why}"
            self._tell(way.error)
            return
        way.record = found.record
        how = "planned before" if found.cached else duration(time.monotonic() - began)
        self._tell(f"{name}: {one_line(found.record)} ({how})")

    def _tell(self, text: str) -> None:
        with self._lock:
            self._done += 1
            _say(f"[{self._done}/{self._most}] {text}")


@contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """SIGTERM is as good as Ctrl-C."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _say(text: str) -> None:
    print(f"muster: {text}", file=sys.stderr, flush=True)
