"""Plan every ready config of a language model on every ready TPU cluster; print a table.

    python -m scripts.plan_configs [--only=lm_8b] [--parallel=2]

Compiles for a minute or two each; what was compiled before comes from `muster plan`'s cache.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import subprocess
import sys
from typing import Any

CONFIGS = ("lm_1b", "lm_8b", "lm_70b")
# What a cluster needs besides the config: slices are replicas, and each has its own batch.
TWO_SLICES = {
    "lm_1b": ("--config.mesh.dcn_data=2", "--config.global_batch_size=1024"),
    "lm_8b": ("--config.mesh.dcn_data=2", "--config.global_batch_size=1024"),
    "lm_70b": ("--config.mesh.dcn_data=2", "--config.global_batch_size=512"),
}
CLUSTERS = ("tpu_v5e_256", "tpu_v5p_128", "tpu_v6e_256", "tpu_v5e_256_x2")
HEAD = (
    "config | cluster | arguments | temporaries | peak, of | ICI, to the least | DCN | bound | MFU"
)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="a part of the config's name")
    parser.add_argument("--parallel", type=int, default=1, help="compilations at a time")
    flags = parser.parse_args()
    cases = [
        (config, cluster) for config in CONFIGS for cluster in CLUSTERS if flags.only in config
    ]
    print(f"| {HEAD} |\n|{' --- |' * len(HEAD.split('|'))}", flush=True)
    with concurrent.futures.ThreadPoolExecutor(flags.parallel) as pool:
        for row in pool.map(lambda case: table_row(*case), cases):
            print(row, flush=True)


def table_row(config: str, cluster: str) -> str:
    """A case as a row of the table."""
    words = TWO_SLICES[config] if cluster.endswith("_x2") else ()
    done = subprocess.run(
        [
            *(sys.executable, "-m", "launch", "plan", "--json"),
            f"--config=configs/{config}.py",
            f"--cluster=configs/cluster/{cluster}.py",
            *words,
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    if not done.stdout:
        return f"| {config} | {cluster} | {done.stderr.strip().splitlines()[-1]} |"
    plan: dict[str, Any] = json.loads(done.stdout)
    sent, least = plan["link_bytes"], plan["least_bytes"]
    cells = [
        config,
        cluster,
        gigabytes(plan["argument_bytes"]),
        gigabytes(plan["temp_bytes"]),
        f"{gigabytes(plan['peak_bytes'])}, {gigabytes(plan['usable_hbm_bytes'])}",
        f"{gigabytes(sent['ici'])}, {sent['ici'] / least['ici']:.2f}",
        gigabytes(sent["dcn"]) if "dcn" in sent else "",
        f"{plan['step_seconds_bound']:.2f} s ({plan['bound_by']})",
        f"{plan['mfu_bound']:.0%}",
    ]
    fits = "" if plan["fits"] else " **does not fit**"
    return f"| {' | '.join(cells)} |{fits}"


def gigabytes(size: float) -> str:
    """Decimal, as the vendors count."""
    return f"{size / 1e9:.2f} GB"


if __name__ == "__main__":
    main()
