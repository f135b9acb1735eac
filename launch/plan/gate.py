"""The gate: `muster run` on TPUs plans first, and asks for no machines that cannot do."""

from __future__ import annotations

import sys
import time

from launch import rundir
from launch.plan import cache, planner
from launch.plan.cache import Plan
from launch.plan.planner import PlannerError, Question
from launch.plan.text import one_line
from launch.request import Request
from launch.spec import ConfigError
from launch.times import duration

SKIP = "--skip_plan goes without it"
# What is right on the machines can be unknown here: a topology to the compiler, data that is there.
_NOT_KNOWN_HERE = ("cluster.accelerator", "config.data")


def check(request: Request) -> Plan | None:
    """Plan what is to be run, and refuse what cannot fit.

    Returns:
      The plan; None where there is none to be had, or none is needed: it is not the trainer's step,
      it is not for TPUs, or somebody runs it already.

    Raises:
      ConfigError: it does not fit (the report is printed), or could not be trained for another
        reason.
    """
    question = _question(request)
    if question is None or rundir.owner(request.workdir) is not None:
        return None
    if planner.needs_libtpu(question.cluster):
        _say(f"warning: not planned: {planner.NO_LIBTPU}")
        return None
    plan = cache.find(question.key)
    began = time.monotonic()
    if plan is None:
        _say(f"compiling the training step for {question.place}, to see whether it fits; {SKIP}")
        try:
            plan = planner.make(question)
        except PlannerError as error:
            _say(f"warning: not planned: {error.short}")
            return None
        except ConfigError as error:
            if str(error).startswith(_NOT_KNOWN_HERE):
                _say(f"warning: not planned: {error}")
                return None
            raise ConfigError("", f"{error} (found while planning; {SKIP})") from None
    if not plan.fits:
        print(plan.text.rstrip("\n"), file=sys.stderr)
        raise ConfigError(
            "",
            f"the training step does not fit {question.place}: {one_line(plan.record)}; nothing "
            f"was asked for. `muster plan --search` looks for a way that fits; {SKIP}",
        )
    how = "planned before" if plan.cached else f"planned in {duration(time.monotonic() - began)}"
    _say(f"{one_line(plan.record)} ({how})")
    return plan


def foretell(request: Request) -> str:
    """What the gate would do, without doing it; "" where there is none."""
    question = _question(request)
    if question is None:
        return ""
    if planner.needs_libtpu(question.cluster):
        return f"not planned: {planner.NO_LIBTPU}"
    plan = cache.find(question.key)
    if plan is None:
        return "no plan yet: `muster run` compiles the step first, and refuses what does not fit"
    if plan.fits:
        return f"{one_line(plan.record)} (planned before)"
    return f"`muster run` refuses it: {one_line(plan.record)}"


def _question(request: Request) -> Question | None:
    """What there is to plan."""
    cluster = request.cluster
    if request.config is None or cluster.backend != "tpu" or cluster.on_cpu or request.skip_plan:
        return None
    return Question(request.sources, request.config, cluster)


def _say(text: str) -> None:
    print(f"muster: {text}", file=sys.stderr, flush=True)
