"""Makes plans: `python -m trainer.plan` in a process of its own, which ends when this one does."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import sys
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from launch import command, contract
from launch.plan import cache
from launch.plan.cache import Plan
from launch.program import is_secret, trainer_env
from launch.spec import Cluster, ConfigError

_LIMIT_SECONDS = 6 * 3600.0  # Against hanging only.
_SHOWN_LINES = 15
NO_LIBTPU = (
    "libtpu, which compiles for TPUs on a machine without any, is not installed here; "
    "pip install 'jax[tpu]' brings the right one"
)


@dataclasses.dataclass(frozen=True)
class Question:
    """A training step and where it is to run, checked as `muster run` checks it.

    Attributes:
      words: `--config=FILE`, `--cluster=FILE` and their overrides, each one word.
      config: what they make of the config, a ConfigDict.
      cluster: and of the cluster.
    """

    words: tuple[str, ...]
    config: Any
    cluster: Cluster

    @property
    def key(self) -> str:
        """By what the cache knows its plan."""
        return cache.key(self.config, self.cluster)

    @property
    def place(self) -> str:
        """Where it is to run, in words."""
        cluster = self.cluster
        if cluster.accelerator is None:
            return f"{cluster.num_devices} devices"
        return f"{cluster.slices} × {cluster.accelerator}"


class PlannerError(Exception):
    """The planner itself has failed; its text has what it said last, in lines."""

    @property
    def short(self) -> str:
        """The same in one line."""
        first, *said = str(self).splitlines()
        return f"{first}: {said[-1].strip()}" if said else first


def needs_libtpu(cluster: Cluster) -> bool:
    """Whether a plan for this cluster asks for libtpu, and there is none."""
    wanted = cluster.backend == "tpu" and not cluster.on_cpu
    return wanted and importlib.util.find_spec("libtpu") is None


def make(question: Question, over: threading.Event | None = None) -> Plan:
    """Compile the step, and keep the plan.

    Args:
      question: what to plan.
      over: nobody wants the plan any more when this is set.

    Raises:
      ConfigError: what the trainer would refuse.
      PlannerError: no plan for another reason.
    """
    key = question.key  # Of the code as it is before it is read by the planner.
    with tempfile.TemporaryDirectory(prefix="muster-plan-") as folder:
        done = ask("trainer.plan", question, [f"--output={folder}"], over)
        try:
            record = json.loads(Path(folder, contract.PLAN_RECORD).read_bytes())
            text = Path(folder, contract.PLAN_TEXT).read_text()
        except (OSError, ValueError):
            raise _failure(done) from None
    cache.keep(key, record, text)
    return Plan(record, text, cached=False)


def estimates(question: Question, words: Sequence[str]) -> dict[str, Any]:
    """What `python -m trainer.plan.search` says of the ways to run the step.

    Raises:
      ConfigError: what the trainer would refuse.
      PlannerError: no answer for another reason.
    """
    done = ask("trainer.plan.search", question, words)
    try:
        return json.loads(done.out)
    except ValueError:
        raise _failure(done) from None


def ask(
    module: str, question: Question, words: Sequence[str], over: threading.Event | None = None
) -> command.Done:
    """Run a module of the trainer's on a question, to its end."""
    cluster = question.cluster
    # A secret is of no use to a plan, and other users can see a command line.
    kept = [word for word in question.words if not _tells_a_secret(word)]
    return command.run(
        [sys.executable, "-m", module, *kept, *words],
        timeout_seconds=_LIMIT_SECONDS,
        env={**trainer_env(cluster.env), **cache.telling_env(cluster.env)},
        bound=True,
        over=over,
    )


def _tells_a_secret(word: str) -> bool:
    name = word.partition("=")[0]
    return name.startswith("--cluster.env.") and is_secret(name)


def _failure(done: command.Done) -> Exception:
    """What a planner that has given no plan has to say."""
    said = [line for line in done.err.splitlines() if line.strip()]
    if done.exit_code == contract.EXIT_CONFIG:
        errors = [line for line in said if line.startswith("error: ")]
        if errors:
            return ConfigError("", errors[-1].removeprefix("error: "))
    ended = {-9: "was killed", None: done.err}.get(
        done.exit_code, f"ended with exit code {done.exit_code}"
    )
    return PlannerError("\n".join([f"the planner {ended}", *said[-_SHOWN_LINES:]]))


def save(plan: Plan, run: Path) -> None:
    """Keep a plan with the run that it is of."""
    contract.write_atomically(run / contract.PLAN_RECORD, json.dumps(plan.record, indent=1) + "\n")
    contract.write_atomically(run / contract.PLAN_TEXT, plan.text.rstrip("\n") + "\n")
