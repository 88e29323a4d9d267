"""RMS norm and rotary embedding of the heads of one position, queries and keys in one launch.

With a cache, keys and values are stored there instead of being returned.
"""

from __future__ import annotations

import triton
import triton.language as tl

from inductor_moe.kernels.dependent import place_next, wait_for_inputs


@triton.jit
def norm_rope_kernel(
    q,  # [B, HQ, D], the last dim contiguous
    k,  # [B, HK, D]
    q_weight,  # [D] contiguous, with NORM
    k_weight,
    cos,  # [R], or [B, R]
    sin,
    q_out,  # [B, HQ, D] contiguous, written
    k_out,  # [B, HK, D]; [B, HK, L, D] with CACHE, written at the position
    v,  # [B, HK, DV] with CACHE
    v_out,  # [B, HK, L, DV] with CACHE, written at the position
    position,  # [1] with CACHE; below 0 it counts from the end
    length,
    heads_q,
    heads_k,
    q_b,
    q_h,
    k_b,
    k_h,
    v_b,
    v_h,
    v_d,
    k_out_b,
    k_out_h,
    k_out_l,
    k_out_d,
    v_out_b,
    v_out_h,
    v_out_l,
    v_out_d,
    cos_b,
    cos_r,
    sin_b,
    sin_r,
    EPS: tl.constexpr,
    OFFSET: tl.constexpr,
    NORM: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    R: tl.constexpr,  # rotated channels, the first ones; even
    CACHE: tl.constexpr,
    BLOCK_D: tl.constexpr,  # from D and DV on
):
    wait_for_inputs()
    place_next()
    head = tl.program_id(0)
    batch = tl.program_id(1).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    inside = d < D
    if CACHE:
        at = tl.load(position).to(tl.int64)
        at += tl.where(at < 0, length, 0)
        exists = (at >= 0) & (at < length)
        tl.device_assert(exists, "norm_rope_cache: the position is outside the cache")
        k_out += at * k_out_l
        if head >= heads_q + heads_k:
            own = head - heads_q - heads_k
            value = tl.load(v + batch * v_b + own * v_h + d * v_d, mask=d < DV, other=0.0)
            v_out += batch * v_out_b + own * v_out_h + at * v_out_l
            tl.store(v_out + d * v_out_d, value, mask=(d < DV) & exists)
            return
    HALF: tl.constexpr = R // 2
    partner = tl.where(d < HALF, d + HALF, tl.where(d < R, d - HALF, d))
    is_query = head < heads_q
    own = tl.where(is_query, head, head - heads_q)
    x = tl.where(is_query, q + batch * q_b + own * q_h, k + batch * k_b + own * k_h)
    out = tl.where(
        is_query, q_out + (batch * heads_q + own) * D, k_out + batch * k_out_b + own * k_out_h
    )
    step = tl.where(is_query, 1, k_out_d)
    value = tl.load(x + d, mask=inside, other=0.0).to(tl.float32)
    other = tl.load(x + partner, mask=inside, other=0.0).to(tl.float32)
    if NORM:
        weight = tl.where(is_query, q_weight, k_weight)
        scale = tl.rsqrt(tl.sum(value * value, 0) / D + EPS)
        own_weight = tl.load(weight + d, mask=inside, other=0.0).to(tl.float32) + OFFSET
        other_weight = tl.load(weight + partner, mask=inside, other=0.0).to(tl.float32) + OFFSET
        value = (value * scale * own_weight).to(out.dtype.element_ty).to(tl.float32)
        other = (other * scale * other_weight).to(out.dtype.element_ty).to(tl.float32)
    rotated = d < R
    c = tl.load(cos + batch * cos_b + d * cos_r, mask=rotated, other=1.0).to(tl.float32)
    s = tl.load(sin + batch * sin_b + d * sin_r, mask=rotated, other=0.0).to(tl.float32)
    value = value * c + tl.where(d < HALF, -other, other) * s
    if CACHE:
        inside = inside & (is_query | exists)
    tl.store(out + d * step, value.to(out.dtype.element_ty), mask=inside)
