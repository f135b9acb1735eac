"""JAX's own detection on a TPU VM, with the environment that a process gets there: the machine's
metadata (a fake), and no word of Muster's that would hide it."""

import http.server
import json
import os
import subprocess
import sys
import threading

import pytest

from launch import contract
from launch.backends.tpu import remote
from launch.program import Program
from launch.spec import cluster_spec

DETECT = """
import json, os, sys
from jax._src.clusters import cloud_tpu_cluster, cluster
# What JAX finds out by libtpu's presence and the machine's firmware.
cloud_tpu_cluster.running_in_cloud_tpu_vm = cluster.running_in_cloud_tpu_vm = True
os.environ.pop("TPU_SKIP_MDS_QUERY", None)  # Set where that is not so.
for env in json.load(sys.stdin):
    os.environ.update(env)
    address = os.environ["JAX_COORDINATOR_ADDRESS"]
    find = cluster.ClusterEnv.auto_detect_unset_distributed_params
    print(json.dumps(find(address, None, None, None, None, 5)))
"""


@pytest.fixture
def metadata():
    """Metadata servers of workers: `/WORKER/HOSTS` before the usual path says of which."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            _, worker, hosts, *_, key = self.path.split("/")
            endpoints = ",".join(f"unknown:unknown:10.0.0.{i}" for i in range(int(hosts)))
            said = {"agent-worker-number": worker, "worker-network-endpoints": endpoints}
            data = said.get(key, "").encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(("accelerator", "slices"), [("v5litepod-16", 1), ("v4-16", 2)])
def test_jax_finds_the_place_that_we_count_on(metadata, accelerator, slices):
    cluster = cluster_spec(
        {
            "backend": "tpu",
            "accelerator": accelerator,
            "slices": slices,
            "tpu": {"zones": ("us-west4-a",)},
        }
    )
    plans = remote.rendered(cluster, Program(("python", "x.py")), {}, None, "run")
    each = cluster.hosts // slices
    envs = []
    for index, plan in enumerate(plans):
        [process] = plan["processes"]
        where = f"{metadata}/{index % each}/{each}"
        envs.append({**process["env"], "GCE_METADATA_IP": where})
    clean = {
        k: v for k, v in os.environ.items() if not k.startswith(("OMPI_", "SLURM_", "MUSTER_"))
    }
    done = subprocess.run(
        [sys.executable, "-c", DETECT],
        input=json.dumps([{k: v for k, v in env.items() if k != "PATH"} for env in envs]),
        env=clean,
        capture_output=True,
        text=True,
        check=True,
    )
    found = [json.loads(line) for line in done.stdout.splitlines()]
    ours = [
        [env["JAX_COORDINATOR_ADDRESS"], cluster.hosts, int(env[contract.PROCESS_ID]), None]
        for env in envs
    ]
    assert found == ours
