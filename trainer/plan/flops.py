"""Floating-point operations of a compiled module's matmuls and convolutions, loops multiplied out.

XLA's own count (`cost_analysis`) takes a loop's body once, however often it runs. Only products are
counted, two operations for each: they are what a peak FLOP/s is about.
"""

from __future__ import annotations

import json
import math
import re
from typing import NamedTuple

import numpy as np

from trainer.plan.hlo import Computation, Instruction, Module, Shape, metadata
from trainer.plan.loops import executions

# JAX's splash attention says nothing of itself. Products [queries, keys, width of a head] of its
# kernels, by what their names begin with: scores and their use; scores again, and the gradients.
_SPLASH = {
    "splash_mha_fwd": 2, "splash_mqa_fwd": 2,
    "splash_mha_dq": 3, "splash_mqa_dq": 3,
    "splash_mha_dkv": 4, "splash_mqa_dkv": 4,
}  # fmt: skip
_LIST = r"\{([\d,]*)\}"


class Flops(NamedTuple):
    """What a device computes in one run of a module.

    Attributes:
      total: of products, all loops multiplied out.
      again: of `total`, those of a forward pass that the backward pass repeats (remat).
      kernels: of `total`, those in kernels that are no HLO (Pallas), as the kernels say themselves;
        of splash attention the causal half of its products.
      silent: kernels, by name, that say nothing; their FLOPs are not in `total`.
    """

    total: float
    again: float
    kernels: float
    silent: tuple[str, ...]


def count_flops(module: Module) -> Flops:
    """Count the products of a run of the module on one device."""
    counts, _ = executions(module)
    total = again = kernels = 0.0
    silent: set[str] = set()
    for name, times in counts.items():
        computation = module.computations[name]
        for instruction in computation.instructions.values():
            if instruction.opcode == "dot":
                done = times * _dot(instruction, computation)
            elif instruction.opcode == "convolution":
                done = times * _convolution(instruction, computation)
            elif instruction.opcode == "custom-call" and _is_kernel(instruction):
                done = times * (_said_by_kernel(instruction) or _splash(instruction, computation))
                kernels += done
                if not done:
                    silent.add(instruction.name.split(".")[0])
            else:
                continue
            total += done
            if "rematted_computation" in metadata(instruction.attributes)[0]:
                again += done
    return Flops(total, again, kernels, tuple(sorted(silent)))


def _shape(name: str, computation: Computation) -> Shape:
    return computation.instructions[name].shapes[0]


def _dot(instruction: Instruction, computation: Computation) -> float:
    left = _shape(instruction.operands[0], computation)
    found = re.search(rf"lhs_contracting_dims={_LIST}", instruction.attributes)
    dims = [int(dim) for dim in found[1].split(",") if dim] if found else []
    contracted = math.prod(left.dims[dim] for dim in dims)
    return 2.0 * instruction.shapes[0].size * contracted


def _convolution(instruction: Instruction, computation: Computation) -> float:
    """As XLA counts it: products with elements of the padding or between dilated ones are none.

    On TPU every matmul is a convolution; one with a batch dim is written with dilation.
    """
    found = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.attributes)
    if found is None:
        return 0.0
    lhs_labels, rhs_labels, out_labels = found.groups()
    lhs, rhs = (_shape(name, computation).dims for name in instruction.operands[:2])
    out = instruction.shapes[0].dims
    groups = _count(instruction, "feature_group_count") * _count(instruction, "batch_group_count")
    products = (
        lhs[lhs_labels.index("f")] * lhs[lhs_labels.index("b")] * rhs[rhs_labels.index("o")]
    ) / groups
    window = _window(instruction)
    for number in range(len(lhs_labels) - 2):
        label = str(number)
        products *= _positions(
            lhs[lhs_labels.index(label)],
            rhs[rhs_labels.index(label)],
            out[out_labels.index(label)],
            {key: values[number] for key, values in window.items()},
        )
    return 2.0 * products


def _count(instruction: Instruction, key: str) -> int:
    found = re.search(rf"{key}=(\d+)", instruction.attributes)
    return int(found[1]) if found else 1


def _window(instruction: Instruction) -> dict[str, list[tuple[int, ...]]]:
    """`window={size=2x3 pad=0_1x2_2 ...}` as the numbers of each dim, by key."""
    found = re.search(r"window=\{([^}]*)\}", instruction.attributes)
    fields = dict(part.split("=") for part in found[1].split()) if found else {}
    return {
        key: [tuple(int(n) for n in dim.split("_")) for dim in value.split("x")]
        for key, value in fields.items()
        if key in ("pad", "stride", "lhs_dilate", "rhs_dilate")
    }


def _positions(lhs: int, rhs: int, out: int, window: dict[str, tuple[int, ...]]) -> int:
    """Pairs of an output's and a kernel's place along one dim that meet a real element."""
    low = window.get("pad", (0,))[0]
    stride, lhs_step, rhs_step = (
        window.get(key, (1,))[0] for key in ("stride", "lhs_dilate", "rhs_dilate")
    )
    if rhs == 1 and low == 0 and stride == 1 and lhs_step == 1:
        return min(out, lhs)
    place = np.arange(out)[:, None] * stride + np.arange(rhs)[None, :] * rhs_step - low
    real = (place >= 0) & (place % lhs_step == 0) & (place // lhs_step < lhs)
    return int(real.sum())


def _is_kernel(instruction: Instruction) -> bool:
    return 'custom_call_target="tpu_custom_call"' in instruction.attributes


def _said_by_kernel(instruction: Instruction) -> float:
    """The FLOPs in a Pallas kernel's own estimate; 0 without one."""
    found = re.search(r'"cost_estimate":(\{[^{}]*\})', instruction.attributes)
    return float(json.loads(found[1]).get("flops", 0)) if found else 0.0


def _splash(instruction: Instruction, computation: Computation) -> float:
    """Of a kernel of splash attention under a causal mask, at the least; 0 of any other."""
    products = next(
        (number for name, number in _SPLASH.items() if instruction.name.startswith(name)), 0
    )
    arrays = [
        shape
        for operand in instruction.operands
        if operand in computation.instructions
        for shape in computation.instructions[operand].shapes
        if shape.dtype in ("bf16", "f16", "f32")
    ]
    if not products or len(arrays) < 2:
        return 0.0
    queries, keys = arrays[:2]  # [..., L, H] and [..., M, H].
    return products * 2.0 * queries.size * keys.dims[-2] / 2
