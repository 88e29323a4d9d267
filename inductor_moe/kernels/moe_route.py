"""The router's choice: scores, groups, top-k and normalisation of one token in one program."""

from __future__ import annotations

import triton
import triton.language as tl

from inductor_moe.kernels.dependent import wait_for_inputs


@triton.jit
def largest_of_16_bits(
    value,  # [N] fp16 or bf16
    e,  # [N] int32, distinct, below 2**16
    valid,  # [N]
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The K largest, [BLOCK_K] fp32, and their e; of equal ones the lower e first.

    A word of the value's bits, in their order, and of e needs one maximum of integers a round,
    which is one instruction of a warp.
    """
    LEAST: tl.constexpr = -(2**31)
    k = tl.arange(0, BLOCK_K)
    bits = value.to(tl.int16, bitcast=True).to(tl.int32)
    bits = tl.where(bits == -(2**15), 0, bits)  # -0.0 is 0.0
    left = tl.where(valid, ((bits ^ ((bits >> 31) & 0x7FFF)) << 16) | (0xFFFF - e), LEAST)
    chosen = tl.full((BLOCK_K,), LEAST, tl.int32)
    for slot in tl.static_range(K):
        best = tl.max(left, 0)
        chosen = tl.where(k == slot, best, chosen)
        left = tl.where(left == best, LEAST, left)
    bits = chosen >> 16
    bits = bits ^ ((bits >> 31) & 0x7FFF)
    return (
        bits.to(tl.int16).to(value.dtype, bitcast=True).to(tl.float32),
        0xFFFF - (chosen & 0xFFFF),
    )


@triton.jit
def largest_scores(
    row,  # [BLOCK_G * BLOCK_S] fp32 logits
    top,  # the largest
    e,
    valid,
    bias,
    stride_bias,
    E: tl.constexpr,
    K: tl.constexpr,
    SCORING: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    GROUPS: tl.constexpr,
    KEPT_GROUPS: tl.constexpr,
    GROUP_TOP: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Scores, or logits where these choose, of the K experts, [BLOCK_K] fp32, and the experts."""
    BY_LOGITS: tl.constexpr = GROUPS == 1 and not HAS_BIAS
    k = tl.arange(0, BLOCK_K)
    taken = valid == 0
    left = row
    score = row
    if not BY_LOGITS:
        if SCORING == "softmax":
            score = tl.exp(row - top)
            score = score / tl.sum(score, 0)
        elif SCORING == "sigmoid":
            score = 1.0 / (1.0 + tl.exp(-row))
        left = score
        if HAS_BIAS:
            left += tl.load(bias + e * stride_bias, mask=valid, other=0.0).to(tl.float32)
        left = tl.where(valid, left, float("-inf"))
    if KEPT_GROUPS < GROUPS:
        g = tl.arange(0, BLOCK_G)
        s = tl.arange(0, BLOCK_S)
        tile = tl.reshape(left, (BLOCK_G, BLOCK_S))
        group = tl.zeros((BLOCK_G,), tl.float32)
        for _ in tl.static_range(GROUP_TOP):
            best_of_group = tl.max(tile, 1)
            group += best_of_group
            is_best = tile == best_of_group[:, None]
            place = tl.min(tl.where(is_best, s[None, :], BLOCK_S), 1)
            tile = tl.where(s[None, :] == place[:, None], float("-inf"), tile)
        kept = g < 0
        for _ in tl.static_range(KEPT_GROUPS):
            open_groups = (g < GROUPS) & (kept == 0)
            best = tl.max(tl.where(open_groups, group, float("-inf")), 0)
            kept = kept | (g == tl.min(tl.where(open_groups & (group == best), g, GROUPS - 1), 0))
        of_kept = tl.broadcast_to(kept[:, None], (BLOCK_G, BLOCK_S))
        taken = taken | (tl.reshape(of_kept.to(tl.int32), (BLOCK_G * BLOCK_S,)) == 0)
        left = tl.where(taken, float("-inf"), left)
    chosen = tl.full((BLOCK_K,), float("-inf"), tl.float32)
    chosen_ids = tl.zeros((BLOCK_K,), tl.int32)
    for slot in tl.static_range(K):
        best = tl.max(left, 0)
        # The lowest expert with the best value; -inf stays eligible, padding does not.
        first = tl.min(tl.where((left == best) & (taken == 0), e, E - 1), 0)
        if not BY_LOGITS:
            best = tl.sum(tl.where(valid & (e == first), score, 0.0), 0)
        chosen = tl.where(k == slot, best, chosen)
        chosen_ids = tl.where(k == slot, first, chosen_ids)
        taken = taken | (e == first)
        left = tl.where(taken, float("-inf"), left)
    return chosen, chosen_ids


@triton.jit
def choose_experts(
    logits,  # [E] any float; read past L1, so other programs may have written it
    bias,  # [E] any float, if HAS_BIAS
    weights,  # [K] any float, written
    ids,  # [K] int64, written
    stride_e,
    stride_bias,
    E: tl.constexpr,
    K: tl.constexpr,
    SCORING: tl.constexpr,  # "softmax", "sigmoid" or "logits"
    NORMALISE: tl.constexpr,
    EPSILON: tl.constexpr,
    FLOOR: tl.constexpr,
    SCALE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    GROUPS: tl.constexpr,
    KEPT_GROUPS: tl.constexpr,
    GROUP_TOP: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_S: tl.constexpr,  # experts of a group
    BLOCK_K: tl.constexpr,
    FIRST: tl.constexpr,  # of the OWN experts that are counted from 0; others become E
    OWN: tl.constexpr,  # 0: all keep their number
):
    """One token's experts, best first, and their weights."""
    SIZE: tl.constexpr = E // GROUPS
    # The scores rise with the logits, so these choose where nothing else does.
    BY_LOGITS: tl.constexpr = GROUPS == 1 and not HAS_BIAS
    k = tl.arange(0, BLOCK_K)
    i = tl.arange(0, BLOCK_G * BLOCK_S)
    e = i // BLOCK_S * SIZE + i % BLOCK_S
    valid = (i // BLOCK_S < GROUPS) & (i % BLOCK_S < SIZE)
    loaded = tl.load(logits + e * stride_e, mask=valid, other=float("-inf"), cache_modifier=".cg")
    row = loaded.to(tl.float32)
    top = tl.max(row, 0)
    if BY_LOGITS and loaded.dtype.primitive_bitwidth == 16:
        chosen, chosen_ids = largest_of_16_bits(loaded, e, valid, K, BLOCK_K)
    else:
        chosen, chosen_ids = largest_scores(
            row, top, e, valid, bias, stride_bias, E, K, SCORING, HAS_BIAS,
            GROUPS, KEPT_GROUPS, GROUP_TOP, BLOCK_G, BLOCK_S, BLOCK_K,
        )  # fmt: skip
    value = chosen
    if BY_LOGITS and SCORING == "softmax":
        value = tl.exp(chosen - top)
        if not NORMALISE or EPSILON > 0 or FLOOR > 0:
            value = value / tl.sum(tl.exp(row - top), 0)
    elif BY_LOGITS and SCORING == "sigmoid":
        value = 1.0 / (1.0 + tl.exp(-chosen))
    if NORMALISE:
        total = tl.sum(tl.where(k < K, value, 0.0), 0)
        if FLOOR > 0:
            total = tl.maximum(total, FLOOR)
        value = value / (total + EPSILON)
    if OWN > 0:
        chosen_ids -= FIRST
        chosen_ids = tl.where((chosen_ids >= 0) & (chosen_ids < OWN), chosen_ids, E)
    tl.store(weights + k, (value * SCALE).to(weights.dtype.element_ty), mask=k < K)
    tl.store(ids + k, chosen_ids.to(tl.int64), mask=k < K)


@triton.jit
def moe_route_kernel(
    logits,  # [T, E] any float
    bias,  # [E] any float, if HAS_BIAS
    weights,  # [T, K] any float, contiguous
    ids,  # [T, K] int64, contiguous
    stride_t,
    stride_e,
    stride_bias,
    E: tl.constexpr,
    K: tl.constexpr,
    SCORING: tl.constexpr,
    NORMALISE: tl.constexpr,
    EPSILON: tl.constexpr,
    FLOOR: tl.constexpr,
    SCALE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    GROUPS: tl.constexpr,
    KEPT_GROUPS: tl.constexpr,
    GROUP_TOP: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    wait_for_inputs()
    t = tl.program_id(0).to(tl.int64)
    choose_experts(
        logits + t * stride_t, bias, weights + t * K, ids + t * K, stride_e, stride_bias,
        E, K, SCORING, NORMALISE, EPSILON, FLOOR, SCALE, HAS_BIAS,
        GROUPS, KEPT_GROUPS, GROUP_TOP, BLOCK_G, BLOCK_S, BLOCK_K, 0, 0,
    )  # fmt: skip
