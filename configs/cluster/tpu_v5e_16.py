"""16 chips of TPU v5e: one slice of 4 hosts, spot.

    gcloud auth login
    muster run --config=configs/lm_bytes.py --cluster=configs/cluster/tpu_v5e_16.py \\
        --workdir=runs/first --cluster.tpu.storage=gs://BUCKET/runs

`--dry_run` prints every gcloud command. What the run has asked for is deleted when it ends.
"""

from ml_collections import config_dict


def get_config() -> config_dict.ConfigDict:
    return config_dict.ConfigDict(
        {
            "backend": "tpu",
            "accelerator": "v5litepod-16",  # of a slice; says how many hosts and chips there are
            "slices": 1,
            "grace_seconds": 60.0,
            # After a failure, and after preemptions and lost machines.
            "restart": {"max_failures": 2, "max_preemptions": 50, "backoff_seconds": 10.0},
            "env": {},  # of every process; goes to the hosts over ssh alone
            "setup": (),  # shell commands, once on every host
            "tpu": {
                "project": config_dict.placeholder(str),  # gcloud's own
                "zones": ("us-west4-a",),  # tried in turn
                "way": "queued",  # or "direct"
                "provisioning": "spot",  # "on_demand", "spot" or "reserved"
                "storage": config_dict.placeholder(str),  # gs://BUCKET/DIRECTORY, for checkpoints
                "python": "python3.11",  # on the VMs; an environment is made from it
                "packages": (".[tpu]",),
                "constraints": "constraints.txt",
                "max_lifetime_seconds": 24 * 3600.0,
                "keep": False,  # the machines, after the run
                "price_per_chip_hour": config_dict.placeholder(float),  # shown by `muster status`
            },
        }
    )
