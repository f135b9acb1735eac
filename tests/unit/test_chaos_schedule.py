"""The schedule of faults: what it holds, and that a seed says it all."""

from __future__ import annotations

import collections
import itertools

import pytest

from tests.testing.chaos.schedule import (
    NEEDS_MOUNTS,
    RESTARTS,
    SHARES,
    START_PHASES,
    make_schedule,
    num_steps,
)


@pytest.mark.parametrize("seed", range(5))
def test_fifty_faults_hold_every_kind_by_its_share_whatever_the_seed(seed):
    faults = make_schedule(seed, 50)
    assert collections.Counter(fault.kind for fault in faults) == SHARES
    assert [fault.number for fault in faults] == list(range(50))
    steps = [fault.step for fault in faults]
    assert steps == sorted(set(steps))
    assert steps[0] > 0
    assert steps[-1] + 40 < num_steps(50)
    for before, fault in itertools.pairwise(faults):
        # There is a start to be hit.
        assert fault.when not in START_PHASES or before.kind in RESTARTS


def test_a_seed_makes_the_same_schedule_every_time_and_another_one_another():
    assert make_schedule(3, 500) == make_schedule(3, 500)
    assert make_schedule(3, 500) != make_schedule(4, 500)
    whens = {fault.when for fault in make_schedule(3, 500)}
    assert whens == {"step", "saving", *START_PHASES}


def test_without_mounts_the_other_kinds_share_what_is_left():
    counts = collections.Counter(fault.kind for fault in make_schedule(1, 50, mounts=False))
    assert counts.total() == 50
    assert set(counts) == set(SHARES) - set(NEEDS_MOUNTS)
