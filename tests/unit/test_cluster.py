"""Cluster configs: what is understood, and what is refused instead of being ignored."""

from __future__ import annotations

import pytest

from launch.spec import ConfigError, cluster_spec, load_config


def test_the_shipped_local_cluster_is_two_processes_of_four_devices():
    loaded = load_config("cluster", ["--cluster=configs/cluster/local.py"])
    cluster = cluster_spec(loaded.config)
    assert (cluster.num_processes, cluster.num_devices, cluster.backend) == (2, 8, "local")


@pytest.mark.parametrize(
    ("name", "processes", "gpus"), [("slurm_cpu", 4, None), ("slurm_gpu", 16, 8)]
)
def test_the_slurm_configs_can_be_used_and_overridden_as_they_are(name, processes, gpus):
    flags = [f"--cluster=configs/cluster/{name}.py", "--cluster.slurm.partition=batch"]
    flags += ["--cluster.slurm.exclusive=true", "--cluster.slurm.mem=64G"]
    cluster = cluster_spec(load_config("cluster", flags).config)
    assert (cluster.backend, cluster.num_processes, cluster.slurm.gpus) == (
        "slurm",
        processes,
        gpus,
    )
    assert (cluster.slurm.partition, cluster.slurm.mem) == ("batch", "64G")
    assert cluster.slurm.exclusive
    assert cluster.restart.max_preemptions > 0


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"backend": "locl"}, "cluster.backend='locl': did you mean 'local'?"),
        ({"backend": "tpu"}, "cluster.accelerator: is missing"),
        ({"hosts": 0}, "cluster.hosts=0: must be at least 1"),
        ({"hosts": "2"}, "cluster.hosts='2': must be int, is str"),
        ({"process_per_host": 2}, "cluster.process_per_host: no such field; did you mean"),
        ({"accelerator": "v5e-16"}, "cluster.accelerator='v5e-16': means nothing on backend"),
        ({"slices": 2}, "cluster.slices=2: means nothing on backend 'local'"),
        ({"setup": ["true"]}, "cluster.setup=('true',): not there yet on backend 'local'"),
        ({"slurm": {"partition": "x"}}, "cluster.slurm={'partition': 'x'}: means nothing"),
        ({"restart": {"max_failures": -1}}, "cluster.restart.max_failures=-1: must be 0 or more"),
        ({"restart": {"backoff_seconds": 400}}, "cluster.restart.backoff_seconds=400.0: must not"),
        ({"watch": {"data_seconds": 0}}, "cluster.watch.data_seconds=0.0: must be above 0"),
        ({"hosts": 2, "hosts_min": 3}, "cluster.hosts_min=3: must be from 1 to hosts=2"),
        ({"lease_seconds": 1}, "cluster.lease_seconds=1.0: must be at least 3"),
        ({"max_log_bytes": 10}, "cluster.max_log_bytes=10: must be at least 65536"),
        ({"env": {"A": 1}}, "cluster.env.A=1: must be a string; write '1' with quotes"),
        ({"env": {"A=B": "1"}}, "cluster.env.A=B='1': is not something an environment can hold"),
        ({"env": {"MUSTER_PROCESS_ID": "1"}}, "cluster.env.MUSTER_PROCESS_ID='1': is filled in"),
        ({"grace_seconds": -1}, "cluster.grace_seconds=-1.0: must be 0 or more"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line_that_names_field_and_value(fields, message):
    with pytest.raises(ConfigError) as caught:
        cluster_spec({"backend": "local", **fields})
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)
