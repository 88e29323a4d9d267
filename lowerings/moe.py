"""Lowerings of the expert ops: our Triton kernels on a GPU, Inductor's C++ on a CPU."""

from __future__ import annotations

from typing import Any

import torch

from inductor_moe.lowerings.trace import lower
from inductor_moe.ops import moe


def register() -> None:
    """Register the lowerings of moe_experts, moe_up and moe_down_combine."""
    ops = torch.ops.inductor_moe
    lower(ops.moe_experts, moe_experts_lowering)
    lower(ops.moe_up, moe_up_lowering)
    lower(ops.moe_down_combine, moe_down_combine_lowering)


def moe_experts_lowering(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    return moe.moe_experts_cpu(x, *args, **kwargs)


def moe_up_lowering(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    return moe.moe_up_cpu(x, *args, **kwargs)


def moe_down_combine_lowering(h: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    return moe.moe_down_combine_cpu(h, *args, **kwargs)
