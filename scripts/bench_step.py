"""How quick a training step is, against what it could be: medians and ratios, no pass or fail.

    python scripts/bench_step.py                    # all, about ten minutes on two cores
    python scripts/bench_step.py --only=loop        # or another one of those below
    python scripts/bench_step.py --rounds=20        # more rounds where other work disturbs

loop          The trainer's steady step against a hand-written loop in pure JAX of the same model,
              optimizer and batch: matmuls of two dims, layers unrolled, buffers donated, no Flax,
              all compiled ahead of time. Both start from the same parameters and must see the same
              losses. Goal: at least 0.97 of its tokens/s.
groups        The same with three groups of parameters, each with an optimizer of its own.
accumulation  The same as `loop`, but the gradient is summed up over four microbatches.
together      Groups and accumulation, clipping, and a schedule of the learning rate.
extras        The trainer's step with `optimizer.skip`, with `optimizer.ema_decay`, and with both,
              against the same step without them.
host          A step of 100 and of 400 tiny parameters, in three groups too, against a bare call of
              an ahead-of-time compiled function that does the same to the same arrays. Goal: at
              most 1.1 times its time.
scaling       Two processes of one core each, in one `jax.distributed` gang over loopback, against
              one process on one core, at the same batch per process. Goal: at least 1.86 times its
              tokens/s.

What is compared is run in turns, in the same processes; each round gives one ratio, and the median
of those is what counts. CPU time is steadier than time where the machine has other work. Only Linux
can pin processes to cores, as `scaling` does.
"""

from __future__ import annotations

import argparse

from step_benchmarks.host import bench_host
from step_benchmarks.loop import CASES, bench_extras, bench_loop
from step_benchmarks.scaling import bench_scaling, scaling_member


def main() -> None:
    benches = {case: lambda rounds, case=case: bench_loop(case, rounds) for case in CASES}
    benches |= {"extras": bench_extras, "host": bench_host, "scaling": bench_scaling}
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=tuple(benches))
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--member", help=argparse.SUPPRESS)  # How `scaling` starts its processes.
    options = parser.parse_args()
    if options.member:
        return scaling_member(options.member, options.rounds)
    for name, bench in benches.items():
        if options.only in (None, name):
            bench(options.rounds)


if __name__ == "__main__":
    main()
