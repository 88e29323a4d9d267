"""`inductor_moe::moe_route`: from router logits to routing weights and expert numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

SCORINGS = ("softmax", "sigmoid", "logits")
MAX_EXPERTS = 4096
MAX_TOP_K = 64


def check_route(logits: Tensor, top_k: int, scoring: str) -> None:
    """Raise ValueError naming the first argument of `moe_route` that is off."""
    if logits.dim() != 2 or not logits.dtype.is_floating_point:
        raise ValueError(
            f"moe_route: logits has dtype {logits.dtype} and shape {list(logits.shape)}; "
            "it must be a float tensor [T, E]."
        )
    experts = logits.shape[1]
    if experts > MAX_EXPERTS:
        raise ValueError(f"moe_route: logits has {experts} experts; at most {MAX_EXPERTS} fit.")
    if not 1 <= top_k <= min(experts, MAX_TOP_K):
        raise ValueError(
            f"moe_route: top_k is {top_k}; it must be between 1 and {min(experts, MAX_TOP_K)}."
        )
    if scoring not in SCORINGS:
        raise ValueError(f"moe_route: scoring is {scoring!r}; it must be one of {SCORINGS}.")


@torch.library.custom_op("inductor_moe::moe_route", mutates_args=(), device_types="cpu")
def moe_route(logits: Tensor, top_k: int, scoring: str, normalise: bool) -> tuple[Tensor, Tensor]:
    """The top_k experts of each token and their weights.

    logits   [T, E]  any float, computed in fp32
    scoring          "softmax" over all experts, "sigmoid", or "logits" as they are
    normalise        divide the chosen scores by their sum
    returns weights [T, K] fp32 and ids [T, K] int64, best first; ties go to the lowest expert
    Source: Shazeer et al., arXiv:1701.06538; sigmoid scores: DeepSeek-V3, arXiv:2412.19437.
    """
    check_route(logits, top_k, scoring)
    return moe_route_cpu(logits, top_k, scoring, normalise)


def moe_route_cpu(
    logits: Tensor, top_k: int, scoring: str, normalise: bool
) -> tuple[Tensor, Tensor]:
    """`moe_route` in aten alone, traceable."""
    wide = logits.float()
    if scoring == "softmax":
        wide = torch.softmax(wide, -1)
    elif scoring == "sigmoid":
        wide = torch.sigmoid(wide)
    weights, ids = torch.topk(wide, top_k, dim=-1)
    if normalise:
        weights = weights / weights.sum(-1, keepdim=True)
    return weights, ids


@moe_route.register_fake
def _moe_route_fake(
    logits: Tensor, top_k: int, scoring: str, normalise: bool
) -> tuple[Tensor, Tensor]:
    check_route(logits, top_k, scoring)
    shape = (logits.shape[0], top_k)
    return (
        logits.new_empty(shape, dtype=torch.float32),
        logits.new_empty(shape, dtype=torch.int64),
    )


def moe_route_cuda(
    logits: Tensor,
    top_k: int,
    scoring: str,
    normalise: bool,
    wrap: Callable[[Any], Any] = lambda kernel: kernel,
) -> tuple[Tensor, Tensor]:
    """`moe_route` as one Triton launch; traceable with wrap=torch.library.wrap_triton."""
    import triton

    from inductor_moe.kernels.moe_route import moe_route_kernel

    tokens, experts = logits.shape
    weights = torch.empty((tokens, top_k), dtype=torch.float32, device=logits.device)
    ids = torch.empty((tokens, top_k), dtype=torch.int64, device=logits.device)
    if isinstance(tokens, int) and tokens == 0:
        return weights, ids
    wrap(moe_route_kernel)[(tokens,)](
        logits,
        weights,
        ids,
        logits.stride(0),
        logits.stride(1),
        E=experts,
        K=top_k,
        SCORING=scoring,
        NORMALISE=normalise,
        BLOCK_E=max(32, triton.next_power_of_2(experts)),
        BLOCK_K=triton.next_power_of_2(top_k),
        num_warps=1 if experts <= 512 else 4,
    )
    return weights, ids


@moe_route.register_kernel("cuda")
def _moe_route_on_cuda(
    logits: Tensor, top_k: int, scoring: str, normalise: bool
) -> tuple[Tensor, Tensor]:
    check_route(logits, top_k, scoring)
    return moe_route_cuda(logits, top_k, scoring, normalise)
