"""`muster` on this machine, where host local1 has a clock an hour off and an agent that is slow to
say what has ended: `python -m tests.testing.skewed run ...`."""

from __future__ import annotations

import sys
import time
import types
from typing import Any

from launch import main
from launch.agent import agent, owner, process
from launch.backends import host_plan, local
from launch.channel import LocalChannel

SKEW_SECONDS = 3600.0
DELAY_SECONDS = 0.3


def be_agent() -> None:
    """Be the agent of local1: Muster's own, with another clock."""
    clock: Any = types.SimpleNamespace(**vars(time))
    clock.monotonic = lambda: time.monotonic() + SKEW_SECONDS
    clock.time = lambda: time.time() - SKEW_SECONDS
    for module in (agent, owner, process):
        module.time = clock
    report = agent.Agent._report

    def report_late(self: Any, **event: Any) -> None:
        if event["event"] == "exited":
            time.sleep(DELAY_SECONDS)
        report(self, **event)

    agent.Agent._report = report_late
    agent.main([])


def run(argv: list[str]) -> int:
    """Be `muster`."""
    start_agent = local.start_agent

    def start_skewed(plan: Any, *rest: Any) -> LocalChannel:
        program = host_plan.AGENT
        if plan["host"] == "local1":
            host_plan.AGENT = [sys.executable, "-m", "tests.testing.skewed"]
        try:
            return start_agent(plan, *rest)
        finally:
            host_plan.AGENT = program

    local.start_agent = start_skewed
    return main.main(argv)


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]) if len(sys.argv) > 1 else be_agent())
