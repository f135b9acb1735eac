"""`muster plan`: what a training step needs on a cluster, before any machine is asked for."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping, Sequence

from launch import contract
from launch.plan import cache, planner
from launch.plan.planner import PlannerError, Question
from launch.request import check_config
from launch.spec import ConfigError, cluster_spec, load_config
from launch.times import duration

# Flags of a search alone.
SEARCH_FLAGS = ("accelerators", "device_batches", "compile", "parallel")


def plan(arguments: Sequence[str], flags: Mapping[str, str]) -> int:
    """Plan one step, or look for the best way to run it.

    Args:
      arguments: `--config`, `--cluster` and their overrides.
      flags: the other flags that were given.

    Returns:
      EXIT_DONE if it fits (of a search: if any way does), EXIT_CONFIG if it does not, EXIT_FAILED
      if there is no plan.

    Raises:
      ConfigError: something in it cannot be.
    """
    stray = [name for name in SEARCH_FLAGS if name in flags]
    if stray and "search" not in flags:
        raise ConfigError(f"--{stray[0]}", "is for a search; give --search as well")
    from_cluster = load_config("cluster", arguments)
    from_config = load_config("config", from_cluster.rest)
    if from_config.rest:
        raise ConfigError("", f"muster plan takes no argument; got {list(from_config.rest)}")
    cluster = cluster_spec(from_cluster.config)
    if planner.needs_libtpu(cluster):
        raise ConfigError("", planner.NO_LIBTPU)
    if "search" in flags:
        from launch.plan.search import search

        return search(from_config, from_cluster, flags)
    check_config(from_config.config, cluster)
    words = (*from_config.words("config"), *from_cluster.words("cluster"))
    try:
        return _plan(Question(words, from_config.config, cluster), as_json="json" in flags)
    except PlannerError as error:
        print(f"muster: error: {error}", file=sys.stderr)
        return contract.EXIT_FAILED


def _plan(question: Question, as_json: bool) -> int:
    """Have a plan, and print it."""
    found = cache.find(question.key)
    if found is None:
        _say(f"compiling the training step for {question.place}")
        began = time.monotonic()
        found = planner.make(question)
        _say(f"compiled in {duration(time.monotonic() - began)}")
    if as_json:
        print(json.dumps(found.record, indent=1))
    else:
        print(found.text.rstrip("\n"))
    return contract.EXIT_DONE if found.fits else contract.EXIT_CONFIG


def _say(text: str) -> None:
    print(f"muster: {text}", file=sys.stderr, flush=True)
