"""Accelerator types have the chips, hosts and grids that Google's pages give."""

import subprocess
import sys

import pytest

from launch.spec import ConfigError
from launch.topology import CHIPS, accelerator, peak_flops


@pytest.mark.parametrize(
    ("name", "generation", "chips", "hosts", "grid"),
    [
        ("v4-8", "v4", 4, 1, (2, 2, 1)),
        ("v4-16", "v4", 8, 2, (2, 2, 2)),
        ("v4-64", "v4", 32, 8, (2, 4, 4)),
        ("v4-1536", "v4", 768, 192, (8, 8, 12)),
        ("v4-4096", "v4", 2048, 512, (8, 16, 16)),
        ("v5litepod-1", "v5e", 1, 1, (1, 1)),
        ("v5litepod-4", "v5e", 4, 1, (2, 2)),
        ("v5litepod-8", "v5e", 8, 1, (2, 4)),
        ("v5litepod-16", "v5e", 16, 4, (4, 4)),
        ("v5litepod-128", "v5e", 128, 32, (8, 16)),
        ("v5litepod-256", "v5e", 256, 64, (16, 16)),
        ("v5p-8", "v5p", 4, 1, (2, 2, 1)),
        ("v5p-32", "v5p", 16, 4, (2, 2, 4)),
        ("v5p-128", "v5p", 64, 16, (4, 4, 4)),
        ("v5p-256", "v5p", 128, 32, (4, 4, 8)),
        ("v5p-384", "v5p", 192, 48, (4, 4, 12)),
        ("v5p-512", "v5p", 256, 64, (4, 8, 8)),
        ("v5p-1920", "v5p", 960, 240, (4, 12, 20)),
        ("v5p-2048", "v5p", 1024, 256, (8, 8, 16)),
        ("v5p-6912", "v5p", 3456, 864, (12, 12, 24)),
        ("v5p-7808", "v5p", 3904, 976, (4, 4, 244)),
        ("v5p-12288", "v5p", 6144, 1536, (16, 16, 24)),
        ("v6e-8", "v6e", 8, 1, (2, 4)),
        ("v6e-32", "v6e", 32, 8, (4, 8)),
        ("v6e-256", "v6e", 256, 64, (16, 16)),
    ],
)
def test_types_are_as_documented(name, generation, chips, hosts, grid):
    found = accelerator(name)
    assert (found.generation, found.chips, found.hosts, found.grid) == (
        generation, chips, hosts, grid,
    )  # fmt: skip
    assert found.chips_per_host * hosts == chips
    assert found.chip is CHIPS[generation]


def test_topology_is_named_as_jax_names_it():
    assert accelerator("v5litepod-16").topology == "v5e:4x4"
    assert accelerator("v5p-128").topology == "v5p:4x4x4"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("v5e-16", "no such accelerator type; did you mean 'v5litepod-16'?"),
        ("v5litepood-16", "no such accelerator type; did you mean 'v5litepod-16'?"),
        ("V5P-128", "no such accelerator type; did you mean 'v5p-128'?"),
        ("h100", "no such accelerator type; types are v4-N, v5litepod-N, v5p-N, v6e-N"),
        ("", "no such accelerator type; types are"),
        ("v5p-100", "no slice has 100 cores; use v5p-64 or v5p-128"),
        ("v5p-8576", "no slice has 8576 cores; use v5p-8448 or v5p-8704"),
        ("v5p-99999", "no slice has 99999 cores; use v5p-12288"),
        ("v4-0", "no slice has 0 cores; use v4-8"),
        ("v6e-12", "no slice has 12 chips; use v6e-8 or v6e-16"),
        ("v5litepod-2", "no slice has 2 chips; use v5litepod-1 or v5litepod-4"),
    ],
)
def test_what_is_not_offered_is_refused_with_what_is(name, message):
    with pytest.raises(ConfigError) as caught:
        accelerator(name)
    assert str(caught.value).startswith(f"cluster.accelerator={name!r}: {message}")


@pytest.mark.parametrize(
    ("device_kind", "tera"),
    [
        ("TPU v4", 275),
        ("TPU v5 lite", 197),
        ("TPU v5", 459),
        ("TPU v5p", 459),
        ("TPU v6 lite", 918),
        ("NVIDIA A100-SXM4-40GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989.4),
        ("NVIDIA B200", 2250),
    ],
)
def test_peak_of_a_device_kind(device_kind, tera):
    assert peak_flops(device_kind) == tera * 1e12


@pytest.mark.parametrize(
    "device_kind", ["cpu", "", "TPU v99", "NVIDIA A1000", "NVIDIA H100 80GB HBM3 MIG 1g.10gb"]
)
def test_an_unknown_device_has_no_peak(device_kind):
    assert peak_flops(device_kind) is None


def test_tpu_peaks_and_names_agree_with_jaxs_own_table():
    info = pytest.importorskip("jax._src.pallas.mosaic.tpu_info")
    for kind in ("TPU v2", "TPU v3", "TPU v4", "TPU v5 lite", "TPU v5p", "TPU v6 lite", "TPU7x"):
        version = info.chip_version_from_device_kind(kind)
        cores = version.num_physical_tensor_cores_per_chip
        per_device = cores if version.supports_megacore else 1
        theirs = info._get_tpu_info_impl(version, cores).bf16_ops_per_second * per_device
        assert peak_flops(kind) == pytest.approx(theirs, rel=0.01)


def test_topology_needs_no_jax():
    code = "import sys, launch.topology; sys.exit(any(m in sys.modules for m in ('jax', 'numpy')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
