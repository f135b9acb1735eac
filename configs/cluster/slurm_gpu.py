"""GPU nodes of a SLURM cluster: 2 nodes of 8 GPUs, one process for each GPU.

    muster run --config=configs/lm_bytes.py --cluster=configs/cluster/slurm_gpu.py \\
        --workdir=/shared/runs/first

Start it on a login node; the run directory must be seen by all nodes.
"""

from ml_collections import config_dict


def get_config() -> config_dict.ConfigDict:
    return config_dict.ConfigDict(
        {
            "backend": "slurm",
            "hosts": 2,  # nodes
            "processes_per_host": 8,
            "devices_per_process": 1,  # GPUs
            "grace_seconds": 60.0,
            # After a failure, and after preemptions, time limits and lost nodes.
            "restart": {"max_failures": 2, "max_preemptions": 20, "backoff_seconds": 10.0},
            "env": {},
            "setup": (),  # shell commands before the program, as in any batch script
            "slurm": {
                "partition": config_dict.placeholder(str),
                "account": config_dict.placeholder(str),
                "qos": config_dict.placeholder(str),
                "time": "04:00:00",
                "gpus_per_node": 8,
                "gpu_type": config_dict.placeholder(str),  # "h100"
                "cpus_per_process": 8,
                "mem": config_dict.placeholder(str),  # of a node: "64G"
                "warning_seconds": 120.0,  # before the time limit, to save and leave
            },
        }
    )
