"""Accelerators: how many chips and hosts a type has, and what a chip can do at most.

Standard library only. Figures are of one chip, in plain bytes and FLOPs. Sources:

- TPU: Google's pages cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e}, tables 'key specifications' and
  'configurations'. They say GB for capacities that are powers of two (16 GB is 2**34 bytes, as
  `jax._src.pallas.mosaic.tpu_info` has it; XLA leaves a program some 250 MB less), and give ICI as
  a chip's links together, both directions. For v4 the page gives no ICI figure; half of v5p's is
  what Google said of it when v5p came (2,400 against 4,800 Gbps each way). For DCN the pages say
  50 Gbps a chip (v5p), and of a pod of 256 chips 6.4 Tbps (v5e) and 25.6 Tbps (v6e).
- What XLA leaves to a program: its own word on refusing one (libtpu 0.0.42.1).
- TPU software: cloud.google.com/tpu/docs/runtimes, 'PyTorch/XLA, JAX and older'.
- NVIDIA: data sheets of A100, H100, H200 and HGX B200. Theirs are with sparsity for Tensor Cores;
  halved here, since training is dense. NVLink stands as their total of both directions.
"""

from __future__ import annotations

import dataclasses
import math
import re

from launch.errors import ConfigError, closest

GIB = 1 << 30
TERA = 1e12


@dataclasses.dataclass(frozen=True)
class Chip:
    """What one chip (one GPU) has.

    Attributes:
      name: generation, e.g. `v5p` or `h100`.
      cores: TensorCores of a TPU chip; 1 for a GPU. JAX shows one device per chip for all of these
        (v4 and v5p join their two cores).
      hbm_bytes: memory.
      peak_flops: bf16 FLOP/s, dense.
      hbm_bytes_per_second: memory bandwidth.
      ici_bytes_per_second: all ICI (NVLink) links together, both directions.
      dcn_bytes_per_second: a chip's share of the network between slices, one direction; None
        where it is not known.
      usable_hbm_bytes: what the compiler leaves of the memory to a program; None if not known.
    """

    name: str
    cores: int
    hbm_bytes: int
    peak_flops: float
    hbm_bytes_per_second: float
    ici_bytes_per_second: float
    dcn_bytes_per_second: float | None = None
    usable_hbm_bytes: int | None = None


CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v4", 2, 32 * GIB, 275 * TERA, 1200e9, 600e9, None, int(30.75 * GIB)),
        Chip("v5e", 1, 16 * GIB, 197 * TERA, 819e9, 400e9, 3.125e9, int(15.75 * GIB)),
        Chip("v5p", 2, 95 * GIB, 459 * TERA, 2765e9, 1200e9, 6.25e9, int(95.74 * GIB)),
        Chip("v6e", 1, 32 * GIB, 918 * TERA, 1640e9, 800e9, 12.5e9, int(31.25 * GIB)),
        Chip("a100-40gb", 1, 40 * GIB, 312 * TERA, 1555e9, 600e9),
        Chip("a100-80gb", 1, 80 * GIB, 312 * TERA, 2039e9, 600e9),
        Chip("h100", 1, 80 * GIB, 989.4 * TERA, 3350e9, 900e9),
        Chip("h200", 1, 141 * 10**9, 989.4 * TERA, 4800e9, 900e9),
        Chip("b200", 1, 180 * 10**9, 2250 * TERA, 8000e9, 1800e9),
    )
}


@dataclasses.dataclass(frozen=True)
class Accelerator:
    """A TPU slice, as its accelerator type names it.

    Attributes:
      type: e.g. `v5litepod-16`.
      chip: its chips, each one JAX device.
      grid: chips along each dim of the slice, e.g. (4, 4).
      hosts: TPU VMs.
    """

    type: str
    chip: Chip
    grid: tuple[int, ...]
    hosts: int

    @property
    def generation(self) -> str:
        """`v4`, `v5e`, `v5p` or `v6e`."""
        return self.chip.name

    @property
    def chips(self) -> int:
        """Chips of the slice: its JAX devices."""
        return math.prod(self.grid)

    @property
    def chips_per_host(self) -> int:
        """Chips of one TPU VM."""
        return self.chips // self.hosts

    @property
    def topology(self) -> str:
        """The slice as JAX and XLA name it, e.g. `v5e:4x4`."""
        return f"{self.generation}:{'x'.join(map(str, self.grid))}"


# The TPU VM software for JAX, by generation.
RUNTIME_VERSIONS = {
    "v4": "tpu-ubuntu2204-base",
    "v5e": "v2-alpha-tpuv5-lite",
    "v5p": "v2-alpha-tpuv5",
    "v6e": "v2-alpha-tpuv6e",
}


@dataclasses.dataclass(frozen=True)
class _Family:
    """How one generation's types are named."""

    prefix: str  # before the dash
    chip: str
    counts: str  # what the number after the dash counts
    sizes: tuple[int, ...]  # numbers below the first whole cube, or all there are
    largest: int


_2D_SIZES = (1, 4, 8, 16, 32, 64, 128, 256)
_3D_SIZES = (8, 16, 32, 64)  # Beyond, multiples of a cube of 4x4x4 chips = 128 cores.
_CUBE_CORES = 128
_FAMILIES = {
    family.prefix: family
    for family in (
        _Family("v4", "v4", "cores", _3D_SIZES, 8192),
        _Family("v5litepod", "v5e", "chips", _2D_SIZES, 256),
        _Family("v5p", "v5p", "cores", _3D_SIZES, 12288),
        _Family("v6e", "v6e", "chips", _2D_SIZES, 256),
    )
}
_GRIDS = {
    1: (1, 1), 4: (2, 2), 8: (2, 4), 16: (4, 4), 32: (4, 8), 64: (8, 8), 128: (8, 16),
    256: (16, 16),
}  # fmt: skip
_SMALL_3D_GRIDS = {8: (2, 2, 1), 16: (2, 2, 2), 32: (2, 2, 4), 64: (2, 4, 4)}
_LONGEST_DIM = 256  # Chips. No longer one is offered: v5p-8576, of 67 cubes in a row, is not.


def accelerator(name: str, field: str = "cluster.accelerator") -> Accelerator:
    """Look up a TPU accelerator type: `v4-N`, `v5litepod-N`, `v5p-N` or `v6e-N`.

    N counts cores of v4 and v5p, two to a chip, and chips of v5e and v6e. The grid is the one that
    Cloud TPU gives when only the type is asked for.

    Args:
      name: the type.
      field: how messages call it.

    Raises:
      ConfigError: no such type (with the closest one), or no such size (with those next to it).
    """
    match = re.fullmatch(r"([a-z0-9]+)-(\d+)", name)
    family = _FAMILIES.get(match[1]) if match else None
    if match is None or family is None:
        examples = [f"{family.prefix}-{size}" for family in _FAMILIES.values()
                    for size in (*family.sizes, _CUBE_CORES, 2 * _CUBE_CORES)]  # fmt: skip
        hint = closest(name, examples)
        # The chip is called v5e, its accelerator type v5litepod.
        if name.startswith(("v5e-", "v5lite-")):
            hint = f"did you mean 'v5litepod-{name.split('-')[1]}'?"
        elif not hint.startswith("did"):
            hint = f"types are {', '.join(f'{prefix}-N' for prefix in _FAMILIES)}"
        raise ConfigError(field, f"no such accelerator type; {hint}", name)
    size = int(match[2])
    grid = _grid(family, size)
    if grid is None:
        raise ConfigError(
            field,
            f"no slice has {size} {family.counts}; use "
            + " or ".join(f"{family.prefix}-{near}" for near in _sizes_around(family, size)),
            name,
        )
    chips = math.prod(grid)
    # Up to 8 chips of v5e and v6e sit in one VM; more come in VMs of 4, as do all of v4 and v5p.
    hosts = 1 if len(grid) == 2 and chips <= 8 else chips // 4
    return Accelerator(name, CHIPS[family.chip], grid, hosts)


def _grid(family: _Family, size: int) -> tuple[int, ...] | None:
    """Chips along each dim of a slice; None for a size that is not offered."""
    if size > family.largest:
        return None
    if family.counts == "chips":
        return _GRIDS.get(size)
    if size in _SMALL_3D_GRIDS:
        return _SMALL_3D_GRIDS[size]
    cubes, rest = divmod(size, _CUBE_CORES)
    if rest or not cubes:
        return None
    grid = tuple(4 * dim for dim in _most_cubic(cubes))
    return grid if grid[-1] <= _LONGEST_DIM else None


def _most_cubic(count: int) -> tuple[int, int, int]:
    """Three factors in ascending order, with the smallest sum."""
    factors = [
        (a, b, count // (a * b))
        for a in range(1, math.isqrt(count) + 1)
        if count % a == 0
        for b in range(a, math.isqrt(count // a) + 1)
        if count // a % b == 0
    ]
    return min(factors, key=sum)


def _sizes_around(family: _Family, size: int) -> list[int]:
    """The sizes on offer next to `size`, below and above."""
    offered = list(family.sizes)
    if family.counts == "cores":
        multiples = range(_CUBE_CORES, family.largest + 1, _CUBE_CORES)
        offered += [size for size in multiples if _grid(family, size)]
    below = [other for other in offered if other < size]
    above = [other for other in offered if other > size]
    return below[-1:] + above[:1]


# JAX's `device_kind` -> peak bf16 FLOP/s of one JAX device. TPU names as in
# `jax._src.pallas.mosaic.tpu_info`; v2, v3 and 7x show one device per core, with half the chip's
# peak each (46, 140 and 2,307 TFLOP/s).
_TPU_PEAKS = {
    "TPU v2": 23 * TERA,
    "TPU v3": 70 * TERA,
    "TPU v4": CHIPS["v4"].peak_flops,
    "TPU v5 lite": CHIPS["v5e"].peak_flops,
    "TPU v5e": CHIPS["v5e"].peak_flops,
    "TPU v5": CHIPS["v5p"].peak_flops,
    "TPU v5p": CHIPS["v5p"].peak_flops,
    "TPU v6 lite": CHIPS["v6e"].peak_flops,
    "TPU v6e": CHIPS["v6e"].peak_flops,
    "TPU7x": 1153.5 * TERA,
}

# The beginning of a GPU's name, more special ones first. Cards with less power than the SXM module
# have peaks of their own.
_GPU_PEAKS = (
    ("NVIDIA A100", CHIPS["a100-40gb"].peak_flops),
    ("NVIDIA H100 PCIe", 756 * TERA),
    ("NVIDIA H100 NVL", 835.5 * TERA),
    ("NVIDIA H100", CHIPS["h100"].peak_flops),
    ("NVIDIA H200 NVL", 835.5 * TERA),
    ("NVIDIA H200", CHIPS["h200"].peak_flops),
    ("NVIDIA GH200", CHIPS["h100"].peak_flops),
    ("NVIDIA B200", CHIPS["b200"].peak_flops),
    ("NVIDIA GB200", 2500 * TERA),
)


def peak_flops(device_kind: str) -> float | None:
    """Peak dense bf16 FLOP/s of one JAX device; None for a CPU, a part of a GPU and the unknown.

    Args:
      device_kind: of a `jax.Device`, e.g. `TPU v5 lite` or `NVIDIA H100 80GB HBM3`.
    """
    if " MIG " in f"{device_kind} ":  # A part of a GPU, of a size that the name tells by halves.
        return None
    if device_kind in _TPU_PEAKS:
        return _TPU_PEAKS[device_kind]
    for beginning, peak in _GPU_PEAKS:
        # A whole word: 'NVIDIA A1000' is another card.
        if re.match(rf"{re.escape(beginning)}\b", device_kind):
            return peak
    return None
