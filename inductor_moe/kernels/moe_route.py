"""The router's choice: scores, top-k and normalisation of one token in one program."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def moe_route_kernel(
    logits,  # [T, E] any float
    weights,  # [T, K] fp32, contiguous
    ids,  # [T, K] int64, contiguous
    stride_t,
    stride_e,
    E: tl.constexpr,
    K: tl.constexpr,
    SCORING: tl.constexpr,  # "softmax", "sigmoid" or "logits"
    NORMALISE: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    t = tl.program_id(0).to(tl.int64)
    e = tl.arange(0, BLOCK_E)
    k = tl.arange(0, BLOCK_K)
    row = tl.load(logits + t * stride_t + e * stride_e, mask=e < E, other=float("-inf"))
    row = row.to(tl.float32)
    top = tl.max(row, 0)
    left = row
    chosen = tl.full((BLOCK_K,), float("-inf"), tl.float32)
    chosen_ids = tl.zeros((BLOCK_K,), tl.int32)
    taken = e >= E
    for slot in tl.static_range(K):
        best = tl.max(left, 0)
        # The lowest expert with the best logit; -inf logits stay eligible, padding does not.
        first = tl.min(tl.where((left == best) & (taken == 0), e, E - 1), 0)
        chosen = tl.where(k == slot, best, chosen)
        chosen_ids = tl.where(k == slot, first, chosen_ids)
        taken = taken | (e == first)
        left = tl.where(taken, float("-inf"), left)
    if SCORING == "softmax":
        value = tl.exp(chosen - top)
        if not NORMALISE:
            value = value / tl.sum(tl.exp(row - top), 0)
    elif SCORING == "sigmoid":
        value = 1.0 / (1.0 + tl.exp(-chosen))
    else:
        value = chosen
    if NORMALISE:
        value = value / tl.sum(tl.where(k < K, value, 0.0), 0)
    tl.store(weights + t * K + k, value, mask=k < K)
    tl.store(ids + t * K + k, chosen_ids.to(tl.int64), mask=k < K)
