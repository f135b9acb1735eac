"""This machine: one host, 2 processes of 4 CPU devices each in one gang.

    muster run --config=configs/lm_bytes.py --cluster=configs/cluster/local.py --workdir=runs/quickstart
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.backend = "local"
    config.hosts = 1  # On the local backend a host is one agent process.
    config.processes_per_host = 2
    config.devices_per_process = 4  # Simulated CPU devices.
    return config
