"""Experts' up projection for a few tokens, 4-bit weights, no tensor cores: see `quant_vector`."""

from __future__ import annotations

import triton
import triton.language as tl

from inductor_moe.kernels.dependent import place_next, wait_for_inputs
from inductor_moe.kernels.moe_activation import activate_halves, activate_ungated
from inductor_moe.kernels.quant_vector import (
    LANE_INPUTS,
    WORDS,
    code_floats,
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
    PLACE_NEXT: tl.constexpr,
):
    """A program for STEPS * R / PARTS outputs of one slot of one token."""
    wait_for_inputs()
    if PLACE_NEXT:
        place_next()
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


@triton.jit
def load_slots(
    w, scales, zeros, row, mask, word, group,
    ROW_WORDS: tl.constexpr, ROW_GROUPS: tl.constexpr, HAS_ZEROS: tl.constexpr,
):  # fmt: skip
    """Words [ROWS, WORDS], scales and zero points [ROWS] of rows, zeros where the mask is not."""
    words = tl.load(
        (w + row * ROW_WORDS)[:, None] + word, mask=mask[:, None], other=0,
        eviction_policy="evict_first",
    )  # fmt: skip
    place = row * ROW_GROUPS + group
    scale = tl.load(scales + place, mask=mask, other=0.0)
    zero = tl.load(zeros + place, mask=mask, other=0.0) if HAS_ZEROS else scale
    return words, scale, zero


@triton.jit
def quantized_down_vector_kernel(
    h,  # [T, TOP_K + SHARED, K], each K contiguous
    w,  # [E, H, K / 4] packed
    scales,  # [E, H, K / GROUP]
    zeros,  # [E, H, K / GROUP], if HAS_ZEROS
    ids,  # [T, TOP_K]
    weights,  # [T, TOP_K], if HAS_WEIGHTS
    down_w,  # [H, SHARED * K / 4] packed, the shared expert's, if SHARED
    down_scales,  # [H, SHARED * K / GROUP]
    down_zeros,
    logits,  # [T, 1], if HAS_LOGITS: the shared expert is scaled by their sigmoid
    y,  # [T, H] contiguous, written
    experts,
    hidden,
    stride_ht,
    stride_hk,
    stride_it,
    stride_ik,
    stride_st,
    stride_sk,
    stride_lt,
    TOP_K: tl.constexpr,
    SHARED: tl.constexpr,
    SLOTS: tl.constexpr,  # a power of two from TOP_K + SHARED on
    HAS_LOGITS: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    GROUP: tl.constexpr,  # a power of two from 64 to K
    LANES: tl.constexpr,  # of a row: K / 32
    SIDE: tl.constexpr,  # rows beside each other in a warp: 32 / LANES
    STEPS: tl.constexpr,  # 2**LEVELS
    LEVELS: tl.constexpr,
    EARLY: tl.constexpr,  # see `vector_rows`; ids are not those that the kernel before wrote
):
    """A program for STEPS * SIDE outputs of one token.

    A tensor has a row for each lane, of each output beside it, of each slot: warps share the
    slots. With two dims there is one way to lay it out.
    """
    if not EARLY:
        wait_for_inputs()
    ROW_WORDS: tl.constexpr = LANES * WORDS
    ROW_GROUPS: tl.constexpr = LANES * LANE_INPUTS // GROUP
    token = tl.program_id(0)
    r = tl.arange(0, SLOTS * SIDE * LANES)
    lane = r % LANES
    slot = r // (SIDE * LANES)
    routed = slot < TOP_K
    # From L2, where writes are seen: L1 may hold what was there before.
    loaded = tl.load(
        ids + token * stride_it + slot * stride_ik, mask=routed, other=-1,
        cache_modifier=".cg" if EARLY else "",
    )  # fmt: skip
    used = routed & (loaded >= 0) & (loaded < experts)
    expert_row = tl.where(used, loaded, 0).to(tl.int64) * hidden
    own = (slot >= TOP_K) & (slot < TOP_K + SHARED)
    word = lane[:, None] * WORDS + tl.arange(0, WORDS)[None, :]
    group = lane // 2 * 64 // GROUP
    first = tl.program_id(1) * (STEPS * SIDE)
    side = r // LANES % SIDE
    steps = ()
    for i in tl.static_range(STEPS):
        # Rows past the end repeat the last, and are not stored.
        row = tl.minimum(first + i * SIDE + side, hidden - 1).to(tl.int64)
        loaded = load_slots(
            w, scales, zeros, row + expert_row, used, word, group,
            ROW_WORDS, ROW_GROUPS, HAS_ZEROS,
        )  # fmt: skip
        words, scale, zero = loaded
        if SHARED:
            # Not one load with a choice of pointers: newer Tritons then forget their alignment.
            words_s, scale_s, zero_s = load_slots(
                down_w, down_scales, down_zeros, row * SHARED + (slot - TOP_K), own, word, group,
                ROW_WORDS, ROW_GROUPS, HAS_ZEROS,
            )  # fmt: skip
            words |= words_s
            scale += scale_s
            zero += zero_s
        steps = steps + ((words, scale, zero),)  # noqa: RUF005

    if EARLY:
        wait_for_inputs()
        place_next()
    if SHARED:
        used |= own
    # Of skipped pairs h may be anything.
    x_ptrs = h + token.to(tl.int64) * stride_ht + slot * stride_hk
    x_ptrs = (x_ptrs + lane // 2 * 64 + lane % 2 * WORDS)[:, None] + tl.arange(0, WORDS)[None, :]
    x0 = tl.load(x_ptrs, mask=used[:, None], other=0.0).to(tl.float32)
    x1 = tl.load(x_ptrs + 16, mask=used[:, None], other=0.0).to(tl.float32)
    x2 = tl.load(x_ptrs + 32, mask=used[:, None], other=0.0).to(tl.float32)
    x3 = tl.load(x_ptrs + 48, mask=used[:, None], other=0.0).to(tl.float32)
    even = tl.sum(x0 + x2, 1)
    odd = tl.sum(x1 + x3, 1)
    offset = 256.0 * even + 16.0 * odd
    factor = tl.where(used, 1.0, 0.0)
    if HAS_WEIGHTS:
        loaded = tl.load(
            weights + token * stride_st + slot * stride_sk, mask=used & routed, other=0.0
        )
        factor = tl.where(routed, loaded.to(tl.float32), factor)
    if HAS_LOGITS:
        logit = tl.load(logits + token * stride_lt).to(tl.float32)
        factor = tl.where(routed, factor, factor * tl.sigmoid(logit))
    outs = ()
    for i in tl.static_range(STEPS):
        words, scale, zero = steps[i]
        part = code_floats(words, 0) * x0
        part += code_floats(words, 1) * x1
        part += code_floats(words, 2) * x2
        part += code_floats(words, 3) * x3
        center = zero.to(tl.float32) if HAS_ZEROS else 8.0
        part = tl.sum(part, 1) - (offset + center * (even + odd))
        part *= scale.to(tl.float32) * factor
        part = tl.sum(tl.reshape(part, (SLOTS, SIDE, LANES)), 2)
        outs = outs + (part,)  # noqa: RUF005
    # The warps meet once, for all steps.
    for level in tl.static_range(LEVELS):
        halves = ()
        for i in tl.static_range(STEPS >> (level + 1)):
            halves = halves + (tl.join(outs[i], outs[i + (STEPS >> (level + 1))]),)  # noqa: RUF005
        outs = halves
    out = tl.reshape(tl.sum(outs[0], 0), (SIDE, STEPS))
    n = first + tl.arange(0, SIDE)[:, None] + tl.arange(0, STEPS)[None, :] * SIDE
    y_ptrs = y + token.to(tl.int64) * hidden + n
    tl.store(y_ptrs, out.to(y.dtype.element_ty), mask=n < hidden)
