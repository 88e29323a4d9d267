"""What the GPU at hand can do at best, measured."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from inductor_moe.bench.timing import microseconds


@dataclass(frozen=True)
class Ceilings:
    """Bytes read a second, bytes copied (read plus written) a second, bf16 FLOP a second."""

    read: float
    copy: float
    flops: float


def measure(device: str = "cuda") -> Ceilings:
    """A sum over and a copy of 1 GiB, and an 8192^3 bf16 product of random numbers.

    On a CPU the sizes are a hundredth: these are figures to compare with, not to publish.
    """
    small = device == "cpu"
    count, edge = (1 << 22, 256) if small else (1 << 29, 8192)
    x = torch.randn(count, device=device, dtype=torch.bfloat16)
    y = torch.empty_like(x)
    a, b = (torch.randn(edge, edge, device=device, dtype=torch.bfloat16) for _ in range(2))
    read, _ = microseconds(lambda t: t.view(torch.int64).max(), [(x,)])
    copy, _ = microseconds(lambda t: y.copy_(t), [(x,)])
    product, _ = microseconds(lambda s, t: s @ t, [(a, b)])
    size = x.element_size() * count
    return Ceilings(size / read * 1e6, 2 * size / copy * 1e6, 2 * edge**3 / product * 1e6)
