"""Plan one training for one cluster.

    python -m trainer.plan --config=FILE --cluster=FILE [--config.x.y=V] [--cluster.x=V]
        [--json] [--output=DIR]

Prints the report, or with --json the record; --output also writes both, plan.txt and plan.json.
Ends with 0 if the step fits, with 2 if it does not.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from absl import flags

from launch import contract
from launch.spec import cluster_spec, load_config, train_spec
from trainer.command_line import parse_flags
from trainer.exit import run_main
from trainer.plan.target import prepare_environment


def plan(argv: list[str]) -> int:
    """Carry out a command line; returns the exit code."""
    if "--help" in argv:
        print((__doc__ or "").strip())
        return contract.EXIT_DONE
    own = flags.FlagValues()
    flags.DEFINE_bool("json", False, "Print the record.", flag_values=own)
    flags.DEFINE_string("output", None, "A directory for plan.json and plan.txt.", flag_values=own)
    from_cluster = load_config("cluster", argv[1:])
    from_config = load_config("config", from_cluster.rest)
    parse_flags([argv[0], *from_config.rest], own)
    cluster = cluster_spec(from_cluster.config)
    spec = train_spec(from_config.config, cluster.num_devices)
    prepare_environment(cluster.num_devices, cluster.env)

    from trainer.plan.plan import make_plan
    from trainer.plan.text import report
    from trainer.task import load_task

    record = make_plan(spec, load_task(spec.task, spec.model, spec.data), cluster)
    text = report(record)
    as_json = json.dumps(record, indent=2)
    if own.output is not None:
        folder = Path(own.output)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "plan.json").write_text(as_json + "\n")
        (folder / "plan.txt").write_text(text + "\n")
    print(as_json if own.json else text, flush=True)
    return contract.EXIT_CONFIG if record["fits"] is False else contract.EXIT_DONE


if __name__ == "__main__":
    run_main(lambda: plan(sys.argv))
