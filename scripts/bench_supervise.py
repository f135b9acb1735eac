"""What a storm costs the launcher's mind: every host of a large gang fails or is lost in a second.

    python scripts/bench_supervise.py              # 1,024 and 4,096 hosts, each in a paired round

One process a host, in random order: a third are lost hosts, a third died of themselves, a third
died of the others and say so at length. Prints medians of CPU seconds, from the first report to the
verdict, and of the rounds' own ratios of the two sizes: 4 is linear growth. Also one look of the
watch at a gang whose every process reports.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # The tests' ends of real gangs.

from launch.events import (
    Close,
    Event,
    Exited,
    GangGone,
    HostLost,
    Progress,
    Raised,
    Stacks,
    Started,
    Tick,
)
from launch.spec import RestartPolicy
from launch.supervise import Policy, Supervisor
from tests.unit import jax_ends
from tests.unit.gang_play import failure
from tests.unit.test_stacks import SYNC

SMALL, LARGE = 1024, 4096


def storm(num_hosts: int, rng: random.Random) -> list[Event]:
    """The reports of a gang that falls apart within one second after 100."""
    events: list[Event] = []
    for process_id in range(num_hosts):
        at = 100.0 + rng.random()
        kind = rng.randrange(4)
        if kind == 0:
            events.append(HostLost(f"host{process_id}", at))
        elif kind == 1:
            events.append(Exited(process_id, None, 9, at, last_lines=("step 7",) * 20))
        elif kind == 2:
            lines = jax_ends.PEER_KILLED
            events.append(Exited(process_id, None, 6, at, last_lines=lines))
        else:
            raised = failure(f"ValueError: {jax_ends.GLOO_MESSAGE}", at)
            events += [Raised(process_id, raised), Stacks(process_id, SYNC, "S")]
    rng.shuffle(events)
    return events


def supervisor_of(num_hosts: int) -> Supervisor:
    """A supervisor whose gang runs and has reported step 7."""
    hosts = tuple(f"host{i}" for i in range(num_hosts))
    restart = RestartPolicy(max_failures=1, max_preemptions=1)
    supervisor = Supervisor(Policy(hosts, restart=restart, rng=random.Random(0)))
    supervisor.handle(Tick(), 0.0)
    for process_id in range(num_hosts):
        supervisor.handle(Started(process_id), 0.0)
        supervisor.handle(Progress(process_id, 7, "step", 99.0), 99.0)
    return supervisor


def seconds_of_storm(num_hosts: int, seed: int) -> float:
    """CPU seconds to take in a storm and judge it."""
    supervisor = supervisor_of(num_hosts)
    events = storm(num_hosts, random.Random(seed))
    start = time.process_time()
    for number, event in enumerate(events):
        supervisor.handle(event, 100.0 + number / len(events))
        supervisor.handle(Tick(), 100.0 + number / len(events))
    (close,) = supervisor.handle(GangGone(), 103.0)
    spent = time.process_time() - start
    assert isinstance(close, Close), "the storm was not judged"
    assert close.verdict.cause in ("killed", "host_lost"), close.verdict.message
    return spent


def seconds_of_look(num_hosts: int) -> float:
    """CPU seconds of one look at the progress of a gang that goes well."""
    supervisor = supervisor_of(num_hosts)
    start = time.process_time()
    actions = supervisor.handle(Tick(), 100.0)
    spent = time.process_time() - start
    assert not actions, "the gang goes well"
    return spent


def main() -> None:
    """Run the rounds and print what they cost."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    for name, measure in (
        ("storm", seconds_of_storm),
        ("look", lambda hosts, _: seconds_of_look(hosts)),
    ):
        pairs = [(measure(SMALL, seed), measure(LARGE, seed)) for seed in range(rounds)]
        small, large = (statistics.median(column) for column in zip(*pairs, strict=True))
        ratio = statistics.median(after / before for before, after in pairs)
        print(
            f"{name}: {SMALL} hosts {small * 1e3:.1f} ms, {LARGE} hosts {large * 1e3:.1f} ms of "
            f"CPU; ratio {ratio:.1f}"
        )


if __name__ == "__main__":
    main()
