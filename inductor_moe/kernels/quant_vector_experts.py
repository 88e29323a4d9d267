"""Experts' up projection for a few tokens, 4-bit weights, no tensor cores: see `quant_vector`."""

from __future__ import annotations

import triton
import triton.language as tl

from inductor_moe.kernels.dependent import wait_for_inputs
from inductor_moe.kernels.moe_activation import activate_halves, activate_ungated
from inductor_moe.kernels.quant_vector import (
    LANE_INPUTS,
    WORDS,
    load_rows,
    part_inputs,
    row_sums,
)


@triton.jit
def quantized_up_vector_kernel(
    x,  # [T, K], or [T * TOP_K, K] with x_repeat 1
    w,  # [E, N, K / 4] packed
    scales,  # [E, N, K / GROUP]
    zeros,  # [E, N, K / GROUP], if HAS_ZEROS
    ids,  # [T, TOP_K]
    gate_w,  # [shared_inner, K / 4] packed, the shared expert's gate, if SHARED and gated
    gate_scales,
    gate_zeros,
    up_w,  # [shared_inner, K / 4] packed, if SHARED
    up_scales,
    up_zeros,
    h,  # [T, (TOP_K + SHARED) * inner] contiguous, written; of skipped pairs the activation of 0
    x_repeat,
    experts,
    inner,
    stride_x,
    stride_it,
    stride_ik,
    TOP_K: tl.constexpr,
    SHARED: tl.constexpr,  # slots of the shared expert, each of `inner` rows
    GATE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ALPHA: tl.constexpr,
    UP_OFFSET: tl.constexpr,
    LIMIT: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    GROUP: tl.constexpr,
    LANES: tl.constexpr,  # these as in `vector_rows`
    PARTS: tl.constexpr,
    SPANS: tl.constexpr,
    R: tl.constexpr,
    STEPS: tl.constexpr,  # of R / PARTS outputs
    AHEAD: tl.constexpr,
):
    """A program for STEPS * R / PARTS outputs of one slot of one token."""
    wait_for_inputs()
    SLOTS: tl.constexpr = TOP_K + SHARED
    ROW_WORDS: tl.constexpr = PARTS * SPANS * LANES * WORDS
    ROW_GROUPS: tl.constexpr = PARTS * SPANS * LANES * LANE_INPUTS // GROUP
    pair = tl.program_id(0)
    token = pair // SLOTS
    slot = pair % SLOTS
    routed = slot < TOP_K
    loaded = tl.load(ids + token * stride_it + slot * stride_ik, mask=routed, other=0)
    valid = (loaded >= 0) & (loaded < experts)
    expert = tl.where(valid, loaded, 0).to(tl.int64)

    # Output i has rows i * apart of these two, of which an ungated expert has only the second.
    halves: tl.constexpr = 1 if GATE == "none" else 2
    row = expert * (halves * inner)
    apart = 2 if GATE == "interleaved" else 1
    gate_row = row
    up_row = row + (0 if GATE == "none" else 1 if GATE == "interleaved" else inner)
    g, g_scales, g_zeros = w, scales, zeros
    u, u_scales, u_zeros = w, scales, zeros
    if SHARED:
        own = ((slot - TOP_K) * inner).to(tl.int64)
        gate_row = tl.where(routed, gate_row, own)
        up_row = tl.where(routed, up_row, own)
        apart = tl.where(routed, apart, 1)
        g = tl.where(routed, g, gate_w)
        g_scales = tl.where(routed, g_scales, gate_scales)
        g_zeros = tl.where(routed, g_zeros, gate_zeros)
        u = tl.where(routed, u, up_w)
        u_scales = tl.where(routed, u_scales, up_scales)
        u_zeros = tl.where(routed, u_zeros, up_zeros)
    g += gate_row * ROW_WORDS
    g_scales += gate_row * ROW_GROUPS
    g_zeros += gate_row * ROW_GROUPS
    u += up_row * ROW_WORDS
    u_scales += up_row * ROW_GROUPS
    u_zeros += up_row * ROW_GROUPS

    r = tl.arange(0, R)
    AT_ONCE: tl.constexpr = R // PARTS
    first = tl.program_id(1) * (STEPS * AT_ONCE)
    gates = ()
    ups = ()
    for i in tl.static_range(STEPS + AHEAD):
        if i == AHEAD:
            x += (pair // x_repeat).to(tl.int64) * stride_x
            inputs = part_inputs(x, r, LANES, PARTS, SPANS)
            n = first + tl.arange(0, AT_ONCE)
            h += token.to(tl.int64) * SLOTS * inner + slot * inner
        if i < STEPS:
            # Outputs past the end repeat the last, and are not stored.
            v = tl.minimum(first + i * AT_ONCE + r // PARTS, inner - 1) * apart * PARTS + r % PARTS
            part = load_rows(u, u_scales, u_zeros, v, LANES, SPANS, GROUP, HAS_ZEROS)
            ups = ups + (part,)  # noqa: RUF005
            if GATE != "none":
                part = load_rows(g, g_scales, g_zeros, v, LANES, SPANS, GROUP, HAS_ZEROS)
                gates = gates + (part,)  # noqa: RUF005
        if i >= AHEAD:
            # What was multiplied for a skipped pair may be anything.
            up = row_sums(ups[i - AHEAD], inputs, HAS_ZEROS, PARTS, SPANS, R)
            up = tl.where(valid, up, 0.0)
            if GATE == "none":
                out = activate_ungated(up, ACTIVATION, ALPHA, LIMIT)
            else:
                gate = row_sums(gates[i - AHEAD], inputs, HAS_ZEROS, PARTS, SPANS, R)
                gate = tl.where(valid, gate, 0.0)
                out = activate_halves(gate, up, ACTIVATION, ALPHA, UP_OFFSET, LIMIT)
            tl.store(h + n, out.to(h.dtype.element_ty), mask=n < inner)
            n += AT_ONCE
