"""What the delta-rule launchers share: traceable launches, tile sizes, padded dims."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from torch.library import wrap_triton
from triton.runtime.jit import JITFunction

LEVELS = 6
CHUNK = 2**LEVELS


class Tile(NamedTuple):
    """Block sizes and launch options of one kernel.

    registers: the most of a thread, 0 for the compiler's choice. A graph compiles a kernel that is
    given them as REGISTERS for so many (`compat.registers`).
    """

    key: int
    value: int
    warps: int
    stages: int = 1
    registers: int = 0


def traced(kernel: Any) -> Any:
    """The kernel as a node make_fx records; an interpreted kernel, which cannot be, as it is."""
    return wrap_triton(kernel) if isinstance(kernel, JITFunction) else kernel


def padded(width: int) -> int:
    """The block that holds a head dim: a power of two that the matrix units accept."""
    return max(16, triton.next_power_of_2(width))


class Limits(NamedTuple):
    """Of a GPU: major * 10 + minor, bytes that a program may stage, multiprocessors."""

    capability: int
    shared: int
    processors: int = 108


def limits(device: torch.device) -> Limits:
    """Those of the device; Ampere's where there is none to ask."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return Limits(80, 163 * 1024)
    properties = torch.cuda.get_device_properties(device)
    return Limits(
        properties.major * 10 + properties.minor,
        properties.shared_memory_per_block_optin,
        properties.multi_processor_count,
    )


def inner_contiguous(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def binary_decay(g: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Log decays to base two, which a compiled graph has from where it computes g.

    Below the least one exp2 is zero; sums never meet -inf minus -inf.
    """
    return torch.clamp_min(g.float() * 1.4426950408889634, -160.0).to(dtype).contiguous()


def strides(x: Tensor | None, dims: int) -> tuple[Any, ...]:
    """The outer strides of x, zeros where it is absent."""
    return (0,) * dims if x is None else tuple(x.stride()[:dims])
