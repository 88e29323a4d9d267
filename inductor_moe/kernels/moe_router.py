"""A router for a few tokens as one launch: residual, RMS norm, logits, and the choice of experts.

Every program normalises a token for itself and computes some of its logits. The token's last to
finish, as a counter tells, chooses the experts from all of them.
"""

from __future__ import annotations

import triton
import triton.language as tl

from inductor_moe.kernels.dependent import place_next, wait_for_inputs
from inductor_moe.kernels.moe_route import choose_experts


@triton.jit
def moe_router_kernel(
    x,  # [T, H] contiguous
    residual,  # [T, H] contiguous, if HAS_RESIDUAL
    norm_weight,  # [H] contiguous, if HAS_NORM
    router,  # [E, H] contiguous
    gate,  # [H] contiguous, if HAS_GATE
    bias,  # [E] any float, if HAS_BIAS
    total,  # [T, H] written, if HAS_RESIDUAL
    normed,  # [T, H] written, if HAS_NORM
    logits,  # [T, PITCH] in x.dtype, the first E + 1 of a row written; the gate's last
    weights,  # [T, K] any float, written
    ids,  # [T, K] int64, written
    counters,  # int32, T elements from `index` on 0; the number of a token's programs afterwards
    index,
    stride_bias,
    NORM_EPS: tl.constexpr,
    NORM_OFFSET: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_NORM: tl.constexpr,
    HAS_GATE: tl.constexpr,
    HIDDEN: tl.constexpr,
    BLOCK_H: tl.constexpr,
    ROWS: tl.constexpr,  # logits of a program; 1 if there is one token
    PITCH: tl.constexpr,
    EARLY: tl.constexpr,  # see `vector_rows`
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
    FIRST: tl.constexpr,
    OWN: tl.constexpr,
):
    if not EARLY:
        wait_for_inputs()
    program = tl.program_id(0)
    token = 0 if ROWS == 1 else tl.program_id(1)
    h = tl.arange(0, BLOCK_H)
    inside = h < HIDDEN
    routers = ()
    for i in tl.static_range(ROWS):
        row = program * ROWS + i
        weight_row = router + row.to(tl.int64) * HIDDEN
        if HAS_GATE:
            weight_row = tl.where(row < E, weight_row, gate)
        exists = inside if ROWS == 1 else inside & (row < E + HAS_GATE)
        routers = routers + (tl.load(weight_row + h, mask=exists, other=0.0),)  # noqa: RUF005
    if EARLY:
        wait_for_inputs()
        place_next()
    value = tl.load(x + token * HIDDEN + h, mask=inside, other=0.0)
    if HAS_RESIDUAL:
        other = tl.load(residual + token * HIDDEN + h, mask=inside, other=0.0)
        value = (value.to(tl.float32) + other.to(tl.float32)).to(x.dtype.element_ty)
        if program == 0:
            tl.store(total + token * HIDDEN + h, value, mask=inside)
    if HAS_NORM:
        scale = tl.load(norm_weight + h, mask=inside, other=0.0).to(tl.float32) + NORM_OFFSET
        wide = value.to(tl.float32)
        wide *= tl.rsqrt(tl.sum(wide * wide, 0) / HIDDEN + NORM_EPS) * scale
        value = wide.to(x.dtype.element_ty)
        if program == 0:
            tl.store(normed + token * HIDDEN + h, value, mask=inside)
    logits += token * PITCH
    for i in tl.static_range(ROWS):
        row = program * ROWS + i
        logit = tl.sum(routers[i].to(tl.float32) * value.to(tl.float32), 0)
        if ROWS == 1 or row < E + HAS_GATE:
            tl.store(logits + row, logit.to(logits.dtype.element_ty))
    # Every thread's store comes before the count, and the count before the last one's loads.
    tl.debug_barrier()
    before = tl.atomic_add(counters + index + token, 1, sem="acq_rel", scope="gpu")
    if before == tl.num_programs(0) - 1:
        choose_experts(
            logits, bias, weights + token * K, ids + token * K, 1, stride_bias,
            E, K, SCORING, NORMALISE, EPSILON, FLOOR, SCALE, HAS_BIAS,
            GROUPS, KEPT_GROUPS, GROUP_TOP, BLOCK_G, BLOCK_S, BLOCK_K, FIRST, OWN,
        )  # fmt: skip
