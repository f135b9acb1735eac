"""This machine as a cluster: 2 processes of 4 CPU devices each, in one gang.

    muster run --config=configs/lm_bytes.py --cluster=configs/cluster/local.py --workdir=runs/first

More processes: `--cluster.processes_per_host=4`. Rehearse two machines: `--cluster.hosts=2`.
"""

from ml_collections import config_dict


def get_config() -> config_dict.ConfigDict:
    return config_dict.ConfigDict(
        {
            "backend": "local",
            "hosts": 1,  # each is one agent process, standing for a machine
            "processes_per_host": 2,
            "devices_per_process": 4,  # CPU devices; they share this machine's cores
            "grace_seconds": 60.0,  # after Ctrl-C or SIGTERM, to save a checkpoint
            # Further attempts after failures, and after preemptions and lost hosts.
            "restart": {"max_failures": 0, "max_preemptions": 0},
            "env": {},  # `--cluster.env.NAME=VALUE` adds to it
        }
    )
