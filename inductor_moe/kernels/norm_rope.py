"""RMS norm and rotary embedding of the heads of one position, queries and keys in one launch."""

from __future__ import annotations

import triton
import triton.language as tl

from inductor_moe.kernels.dependent import wait_for_inputs


@triton.jit
def norm_rope_kernel(
    q,  # [B, HQ, D], the last dim contiguous
    k,  # [B, HK, D]
    q_weight,  # [D] contiguous, with NORM
    k_weight,
    cos,  # [R], or [B, R]
    sin,
    q_out,  # [B, HQ, D] contiguous, written
    k_out,  # [B, HK, D]
    heads_q,
    heads_k,
    q_b,
    q_h,
    k_b,
    k_h,
    cos_b,
    cos_r,
    sin_b,
    sin_r,
    EPS: tl.constexpr,
    OFFSET: tl.constexpr,
    NORM: tl.constexpr,
    D: tl.constexpr,
    R: tl.constexpr,  # rotated channels, the first ones; even
    BLOCK_D: tl.constexpr,
):
    wait_for_inputs()
    head = tl.program_id(0)
    batch = tl.program_id(1).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    inside = d < D
    HALF: tl.constexpr = R // 2
    partner = tl.where(d < HALF, d + HALF, tl.where(d < R, d - HALF, d))
    is_query = head < heads_q
    own = tl.where(is_query, head, head - heads_q)
    x = tl.where(is_query, q + batch * q_b + own * q_h, k + batch * k_b + own * k_h)
    out = tl.where(
        is_query, q_out + (batch * heads_q + own) * D, k_out + (batch * heads_k + own) * D
    )
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
    tl.store(out + d, value.to(out.dtype.element_ty), mask=inside)
