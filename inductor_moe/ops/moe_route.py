"""`inductor_moe::moe_route`: from router logits to routing weights and expert numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from inductor_moe.ops.dispatch import kernels_serve

SCORINGS = ("softmax", "sigmoid", "logits")
MAX_EXPERTS = 4096
MAX_TOP_K = 64


def check_route(
    logits: Tensor,
    top_k: int,
    scoring: str,
    normalise: bool,
    bias: Tensor | None = None,
    epsilon: float = 0.0,
    floor: float = 0.0,
    scale: float = 1.0,
    groups: int = 1,
    kept_groups: int = 1,
    group_top: int = 1,
) -> None:
    """Raise ValueError naming the first argument of `moe_route` that is off."""
    del normalise, scale
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
    if bias is not None and (bias.shape != (experts,) or not bias.dtype.is_floating_point):
        raise ValueError(
            f"moe_route: bias has dtype {bias.dtype} and shape {list(bias.shape)}; "
            f"it must be a float tensor [{experts}]."
        )
    for name, number in (("epsilon", epsilon), ("floor", floor)):
        if not number >= 0:
            raise ValueError(f"moe_route: {name} is {number}; it must not be negative.")
    if groups < 1 or experts % groups:
        raise ValueError(f"moe_route: groups is {groups}; it must divide {experts} experts.")
    if not 1 <= kept_groups <= groups or kept_groups * (experts // groups) < top_k:
        raise ValueError(
            f"moe_route: kept_groups is {kept_groups} of {groups} groups with "
            f"{experts // groups} experts each; they must hold top_k = {top_k} experts."
        )
    if not 1 <= group_top <= experts // groups:
        raise ValueError(
            f"moe_route: group_top is {group_top}; it must be between 1 and "
            f"{experts // groups}, the experts of a group."
        )


def check_weights_dtype(op: str, dtype: torch.dtype) -> None:
    """Raise ValueError if routing weights cannot be of this dtype."""
    if not dtype.is_floating_point:
        raise ValueError(f"{op}: weights_dtype is {dtype}; it must be a floating-point dtype.")


@torch.library.custom_op("inductor_moe::moe_route", mutates_args=(), device_types="cpu")
def moe_route(
    logits: Tensor,
    top_k: int,
    scoring: str,
    normalise: bool,
    bias: Tensor | None = None,
    epsilon: float = 0.0,
    floor: float = 0.0,
    scale: float = 1.0,
    groups: int = 1,
    kept_groups: int = 1,
    group_top: int = 1,
    *,
    weights_dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """The top_k experts of each token and their weights.

    logits   [T, E]  any float, computed in fp32
    scoring          "softmax" over all experts, "sigmoid", or "logits" as they are
    normalise        divide the chosen scores by max(their sum, floor) + epsilon; a floor of 0
                     is none
    bias     [E]     any float, added to the scores that choose, not to those that weigh
    scale            of the weights, at last
    groups           of E // groups neighbours each; experts are chosen in the kept_groups best.
                     A group is as good as the sum of its group_top best experts, bias included
    returns weights [T, K] in weights_dtype and ids [T, K] int64, best first; ties go to the lowest
    expert
    Source: Shazeer et al., arXiv:1701.06538; sigmoid scores, groups: DeepSeek-V3,
    arXiv:2412.19437.
    """
    options = (bias, epsilon, floor, scale, groups, kept_groups, group_top)
    check_route(logits, top_k, scoring, normalise, *options)
    check_weights_dtype("moe_route", weights_dtype)
    return moe_route_cpu(logits, top_k, scoring, normalise, *options, weights_dtype=weights_dtype)


def moe_route_cpu(
    logits: Tensor,
    top_k: int,
    scoring: str,
    normalise: bool,
    bias: Tensor | None = None,
    epsilon: float = 0.0,
    floor: float = 0.0,
    scale: float = 1.0,
    groups: int = 1,
    kept_groups: int = 1,
    group_top: int = 1,
    *,
    weights_dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """`moe_route` in aten alone, traceable."""
    scores = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if scoring == "softmax":
        scores = torch.softmax(scores, -1)
    elif scoring == "sigmoid":
        scores = torch.sigmoid(scores)
    choice = scores if bias is None else scores + bias
    if kept_groups < groups:
        grouped = choice.view(-1, groups, logits.shape[1] // groups)
        quality = grouped.topk(group_top, -1)[0].sum(-1)
        kept = quality.topk(kept_groups, -1)[1]
        dropped = torch.ones_like(quality, dtype=torch.bool).scatter(1, kept, False)
        choice = grouped.masked_fill(dropped[..., None], float("-inf")).view_as(choice)
    weights, ids = torch.topk(choice, top_k, dim=-1)
    if choice is not scores:
        weights = scores.gather(1, ids)
    if normalise:
        total = weights.sum(-1, keepdim=True)
        weights = weights / ((total.clamp(min=floor) if floor > 0 else total) + epsilon)
    return (weights * scale).to(weights_dtype), ids


@moe_route.register_fake
def _moe_route_fake(
    logits: Tensor,
    top_k: int,
    scoring: str,
    normalise: bool,
    *options: Any,
    weights_dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    check_route(logits, top_k, scoring, normalise, *options)
    check_weights_dtype("moe_route", weights_dtype)
    shape = (logits.shape[0], top_k)
    return (
        logits.new_empty(shape, dtype=weights_dtype),
        logits.new_empty(shape, dtype=torch.int64),
    )


def moe_route_cuda(
    logits: Tensor,
    top_k: int,
    scoring: str,
    normalise: bool,
    bias: Tensor | None = None,
    epsilon: float = 0.0,
    floor: float = 0.0,
    scale: float = 1.0,
    groups: int = 1,
    kept_groups: int = 1,
    group_top: int = 1,
    *,
    weights_dtype: torch.dtype = torch.float32,
    wrap: Callable[[Any], Any] = lambda kernel: kernel,
) -> tuple[Tensor, Tensor]:
    """`moe_route` as one Triton launch; traceable with wrap=torch.library.wrap_triton."""
    from inductor_moe.kernels.moe_route import moe_route_kernel

    tokens, experts = logits.shape
    weights = torch.empty((tokens, top_k), dtype=weights_dtype, device=logits.device)
    ids = torch.empty((tokens, top_k), dtype=torch.int64, device=logits.device)
    if isinstance(tokens, int) and tokens == 0:
        return weights, ids
    constants = route_constants(
        experts, top_k, scoring, normalise, bias is not None,
        epsilon, floor, scale, groups, kept_groups, group_top,
    )  # fmt: skip
    wrap(moe_route_kernel)[(tokens,)](
        logits,
        logits if bias is None else bias,
        weights,
        ids,
        logits.stride(0),
        logits.stride(1),
        0 if bias is None else bias.stride(0),
        **constants,
        num_warps=1 if experts <= 512 else 4,
    )
    return weights, ids


def route_constants(
    experts: int,
    top_k: int,
    scoring: str,
    normalise: bool,
    has_bias: bool,
    epsilon: float = 0.0,
    floor: float = 0.0,
    scale: float = 1.0,
    groups: int = 1,
    kept_groups: int = 1,
    group_top: int = 1,
) -> dict[str, Any]:
    """The constants of the router's kernels."""
    if kept_groups == groups:
        groups = kept_groups = 1
    size = _power_of_two(experts // groups)
    return {
        "E": experts,
        "K": top_k,
        "SCORING": scoring,
        "NORMALISE": normalise,
        "EPSILON": epsilon,
        "FLOOR": floor,
        "SCALE": scale,
        "HAS_BIAS": has_bias,
        "GROUPS": groups,
        "KEPT_GROUPS": kept_groups,
        "GROUP_TOP": group_top,
        "BLOCK_G": _power_of_two(groups),
        "BLOCK_S": max(32 if groups == 1 else 1, size),
        "BLOCK_K": _power_of_two(top_k),
    }


def _power_of_two(least: int) -> int:
    return 1 << (least - 1).bit_length()


@moe_route.register_kernel("cuda")
def _moe_route_on_cuda(
    logits: Tensor,
    top_k: int,
    scoring: str,
    normalise: bool,
    *options: Any,
    weights_dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    check_route(logits, top_k, scoring, normalise, *options)
    check_weights_dtype("moe_route", weights_dtype)
    run = moe_route_cuda if kernels_serve(logits) else moe_route_cpu
    return run(logits, top_k, scoring, normalise, *options, weights_dtype=weights_dtype)
