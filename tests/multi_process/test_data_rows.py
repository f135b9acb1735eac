"""Two real processes put their own rows together into one global batch, as one alone does."""

import os
import socket
import subprocess
import sys

import numpy as np

from tests.testing import elastic, tiny
from tests.testing.configs import elastic as elastic_config
from tests.testing.gangs import ROOT, MusterCommand
from trainer.data.reader import Reader
from trainer.task import load_task

PROGRAM = """
import sys
import numpy as np
import jax
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from launch.spec import ConfigError
from trainer.data.identity import identify
from trainer.data.pipeline import BatchIterator, rows_of_process, to_global
from trainer.data.same import check_gang
from trainer.data.sources import training_order

port, process = sys.argv[1], int(sys.argv[2])
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 2)
jax.distributed.initialize(f"localhost:{port}", 2, process, local_device_ids=[0, 1],
                           initialization_timeout=60)

class Numbers:
    def __len__(self):
        return 50
    def __getitem__(self, index):
        return {"x": np.full(3, index, np.int32)}

dataset = training_order(Numbers(), seed=5)
devices = np.array(jax.devices()).reshape(2, 2)  # [process, device]
layouts = {
    "tensor within": devices,
    "tensor across": devices.T,  # Both processes need the same rows.
    "data interleaved": devices.T.reshape(4, 1),
}
for name, layout in layouts.items():
    mesh = Mesh(layout, ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    rows = rows_of_process(sharding, 8)
    iterator = BatchIterator(dataset, 8, rows)
    for step in range(3):
        with jax.transfer_guard("disallow"):
            batch = to_global(next(iterator), sharding, rows, 8)
        found = multihost_utils.process_allgather(batch["x"], tiled=True)
        wanted = np.stack([dataset[step * 8 + i]["x"] for i in range(8)])
        np.testing.assert_array_equal(found, wanted)
        for shard in batch["x"].addressable_shards:
            np.testing.assert_array_equal(np.asarray(shard.data), wanted[shard.index])
    print(name, "rows", *rows, "position", iterator.position()["next_index"])
    iterator.close()

# Hosts whose files differ, or come in another order.
check_gang(identify(dataset, "data"))
class Others(Numbers):
    def __getitem__(self, index):
        return super().__getitem__((index + process) % 50)
try:
    check_gang(identify(training_order(Others(), seed=5), "data"))
except ConfigError as error:
    print(error, error.accuses)
"""

LAYOUTS = {
    "tensor within": ["0 1 2 3", "4 5 6 7"],
    "tensor across": ["0 1 2 3 4 5 6 7"] * 2,
    "data interleaved": ["0 1 4 5", "2 3 6 7"],
}


def test_the_global_batch_is_the_same_for_every_layout_of_two_processes():
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        port = listener.getsockname()[1]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(port), str(process)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for process in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=120)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    for index, (process, output) in enumerate(zip(processes, outputs, strict=True)):
        assert process.returncode == 0, "\n---\n".join(outputs)
        for layout, rows in LAYOUTS.items():
            assert f"{layout} rows {rows[index]} position 3\n" in output
        assert "process 1 has other data than process 0 (example 0 of the data is another" in output
        assert output.endswith("(1,)\n")


def expected_fingerprint(config, spans, batch_size=16):
    """What a single process reads: (first step, last step, weights of web and books)."""
    seen, position = np.int32(0), None
    for first, last, web, books in spans:
        config.data.mixture.web.weight, config.data.mixture.books.weight = web, books
        task = load_task(config.task, config.model.to_dict(), config.data.to_dict())
        reader = Reader(task.train_data(config.seed), batch_size, range(batch_size), "data")
        if position:
            reader.restore(position)
        for _ in range(first, last):
            with np.errstate(over="ignore"):
                seen = elastic.next_fingerprint(np, seen, next(reader))
        position = reader.position()
        reader.close()
    return int(seen)


def test_a_packed_mixture_goes_on_at_another_number_of_processes_with_other_weights(tmp_path):
    # A file for each source: fewer than there are processes.
    muster, paths = MusterCommand(tmp_path), elastic.write_documents(tmp_path)
    flags = [f"--config={ROOT}/tests/testing/configs/elastic.py"]
    flags += [f"--config.data.mixture.{name}.path={path}" for name, path in paths.items()]
    first = muster.run(*flags)
    assert first.returncode == 0, first.stderr
    assert "70.0% web: " in first.stdout
    assert "rows of 16 tokens, 9" in first.stdout  # Per cent that are no padding.
    # An index for the filter, and one for each packing; made by both, each by one alone.
    assert sorted(name.split("-")[0] for name in os.listdir(muster.workdir / "data")) == [
        "filter",
        "packing",
        "packing",
    ]
    other = muster.run(*flags, "--config.data.mixture.web.path=elsewhere", "--config.num_steps=6")
    assert other.returncode == 2
    assert "data.mixture.web.path" in other.stderr

    flags += ["--config.num_steps=6", "--config.data.mixture.web.weight=0.2"]
    second = muster.run(*flags, "--cluster.processes_per_host=1")
    assert second.returncode == 0, second.stderr
    assert "1 process(es)" in second.stdout
    assert "data: the mixture changes at example 48: web 0.7 -> 0.2" in second.stdout

    config = elastic_config.get_config()
    for name, path in paths.items():
        config.data.mixture[name].path = path
    wanted = expected_fingerprint(config, [(0, 3, 0.7, 0.3), (3, 6, 0.2, 0.3)])
    assert int(tiny.read_state(muster.workdir, 6)["model.seen"]) == wanted
    assert wanted != expected_fingerprint(config, [(0, 6, 0.7, 0.3)])
