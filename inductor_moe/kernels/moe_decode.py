"""Experts for few pairs: no sort, each program streams rows of one token's experts.

Programs of the same rows and different pairs are neighbours in launch order, so an expert that
several tokens share is read from memory once. An expert that every token passes through takes
SHARED more slots of a token, a routed expert's rows each, in the same launches.
"""

from __future__ import annotations

import triton
import triton.language as tl

from inductor_moe.kernels.dependent import wait_for_inputs
from inductor_moe.kernels.moe_activation import (
    gated_activation_tile,
    shared_rows,
    up_rows,
    weight_offsets,
)


@triton.jit
def moe_up_decode_kernel(
    x,  # [T, H], or [T * K, H] with x_repeat 1
    w_up,  # [E, N, H]
    bias_up,  # [E, N], if HAS_BIAS
    ids,  # [T, K]
    shared_gate,  # [shared_inner, H], if SHARED and gated
    shared_up,  # [shared_inner, H], if SHARED
    h,  # [T, K * I + shared_inner] contiguous, written; of skipped pairs the activation of zeros
    x_repeat,
    experts,
    hidden,
    inner,
    shared_inner,
    stride_x,
    stride_we,
    stride_wn,
    stride_wh,
    stride_be,
    stride_bn,
    stride_it,
    stride_ik,
    stride_sg,
    stride_su,
    TOP_K: tl.constexpr,
    SHARED: tl.constexpr,
    GATE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ALPHA: tl.constexpr,
    UP_OFFSET: tl.constexpr,
    LIMIT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    W_INNER: tl.constexpr,
    ALIGNED: tl.constexpr,  # rows of weights start at multiples of 16 bytes
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    UNROLL: tl.constexpr,
):
    wait_for_inputs()
    pair = tl.program_id(0)
    block = tl.program_id(1)
    token = pair // (TOP_K + SHARED)
    slot = pair % (TOP_K + SHARED)
    routed = slot < TOP_K
    expert = tl.load(ids + token * stride_it + slot * stride_ik, mask=routed, other=0)
    valid = (expert >= 0) & (expert < experts)
    expert = tl.where(valid, expert, 0).to(tl.int64)
    n, exists = up_rows(block, inner, GATE, W_INNER, BLOCK_N)
    n_offset, _ = weight_offsets(n, n, stride_wn, stride_wh, W_INNER)
    w_rows = w_up + expert * stride_we + n_offset
    if SHARED:
        tl.static_assert(W_INNER == "k" and not HAS_BIAS)
        half, row = shared_rows(n, inner, (slot - TOP_K) * inner, GATE)
        own_gate = shared_gate + row.to(tl.int64) * stride_sg
        own_up = shared_up + row.to(tl.int64) * stride_su
        w_rows = tl.where(routed, w_rows, tl.where(half == 0, own_gate, own_up))
        if ALIGNED:
            # Triton 3.8 and later forget it in a choice of pointers.
            w_rows = tl.multiple_of(w_rows, 16)
        exists = exists & (routed | (row < shared_inner))
    x_row = x + (pair // x_repeat).to(tl.int64) * stride_x
    load_row = (exists & valid)[:, None]

    acc = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    for start in tl.range(0, hidden, BLOCK_K, loop_unroll_factor=UNROLL):
        k = start + tl.arange(0, BLOCK_K)
        _, k_offset = weight_offsets(n, k, stride_wn, stride_wh, W_INNER)
        w_ptrs = w_rows[:, None] + k_offset[None, :]
        w_tile = tl.load(w_ptrs, mask=load_row & (k < hidden)[None, :], other=0.0)
        x_tile = tl.load(x_row + k, mask=k < hidden, other=0.0)
        acc += w_tile.to(tl.float32) * x_tile.to(tl.float32)[None, :]
    up = tl.sum(acc, 1)
    if HAS_BIAS:
        bias = bias_up + expert * stride_be + n * stride_bn
        up += tl.load(bias, mask=exists & valid, other=0.0).to(tl.float32)

    out = gated_activation_tile(
        up[None, :], 1, BLOCK_N, GATE, W_INNER, ACTIVATION, ALPHA, UP_OFFSET, LIMIT
    )
    OUT: tl.constexpr = BLOCK_N if GATE == "none" else BLOCK_N // 2
    i = block * OUT + tl.arange(0, OUT)
    row_h = TOP_K * inner + shared_inner
    column = slot * inner + i
    h_ptrs = h + token.to(tl.int64) * row_h + column
    stored = (i < inner) & (column < row_h)
    tl.store(h_ptrs[None, :], out.to(h.dtype.element_ty), mask=stored[None, :])


@triton.jit
def moe_down_decode_kernel(
    h,  # [T, K, I], then [T, shared_inner] from column K * I on, if SHARED
    w_down,  # [E, H, I]
    bias_down,  # [E, H], if HAS_BIAS
    ids,  # [T, K]
    weights,  # [T, K], if HAS_WEIGHTS
    shared_down,  # [H, shared_inner], if SHARED
    logits,  # [T, 1], if HAS_LOGITS: the shared expert is scaled by their sigmoid
    y,  # [T * SPLIT, H] contiguous, written: each token's slots in SPLIT partial sums
    experts,
    hidden,
    inner,
    shared_inner,
    stride_ht,
    stride_hk,
    stride_we,
    stride_wh,
    stride_wi,
    stride_be,
    stride_bh,
    stride_it,
    stride_ik,
    stride_st,
    stride_sk,
    stride_sd,
    stride_lt,
    TOP_K: tl.constexpr,
    SHARED: tl.constexpr,
    HAS_LOGITS: tl.constexpr,
    SPLIT: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    W_INNER: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    UNROLL: tl.constexpr,
):
    wait_for_inputs()
    row = tl.program_id(0)
    token = row // SPLIT
    part = row % SPLIT
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    exists = n < hidden
    k_blocks = tl.cdiv(inner, BLOCK_K)

    acc = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    bias_sum = tl.zeros((BLOCK_N,), tl.float32)
    # One flat loop over slots and blocks of I, so that unrolling overlaps loads across slots.
    steps = tl.cdiv(TOP_K - part, SPLIT) * k_blocks
    for step in tl.range(0, steps, 1, loop_unroll_factor=UNROLL):
        slot = part + (step // k_blocks) * SPLIT
        expert = tl.load(ids + token * stride_it + slot * stride_ik)
        valid = (expert >= 0) & (expert < experts)
        expert = tl.where(valid, expert, 0).to(tl.int64)
        scale = 1.0
        if HAS_WEIGHTS:
            scale = tl.load(weights + token * stride_st + slot * stride_sk).to(tl.float32)
        scale = tl.where(valid, scale, 0.0)
        k = (step % k_blocks) * BLOCK_K + tl.arange(0, BLOCK_K)
        load_k = (k < inner) & valid
        n_offset, k_offset = weight_offsets(n, k, stride_wh, stride_wi, W_INNER)
        w_ptrs = w_down + expert * stride_we + n_offset[:, None] + k_offset[None, :]
        w_tile = tl.load(w_ptrs, mask=exists[:, None] & load_k[None, :], other=0.0)
        h_row = h + token.to(tl.int64) * stride_ht + slot * stride_hk
        h_tile = tl.load(h_row + k, mask=load_k, other=0.0).to(tl.float32) * scale
        acc += w_tile.to(tl.float32) * h_tile[None, :]
        if HAS_BIAS:
            first = (step % k_blocks) == 0
            bias = bias_down + expert * stride_be + n * stride_bh
            bias_tile = tl.load(bias, mask=exists & valid & first, other=0.0)
            bias_sum += scale * bias_tile.to(tl.float32)
    if SHARED:
        scale = 1.0
        if HAS_LOGITS:
            scale = tl.sigmoid(tl.load(logits + token * stride_lt).to(tl.float32))
        # The last part has the fewest slots.
        end = tl.where(part == SPLIT - 1, shared_inner, 0)
        h_row = h + token.to(tl.int64) * stride_ht + TOP_K * stride_hk
        w_rows = shared_down + n.to(tl.int64) * stride_sd
        for start in tl.range(0, end, BLOCK_K, loop_unroll_factor=UNROLL):
            k = start + tl.arange(0, BLOCK_K)
            load_k = k < end
            w_mask = exists[:, None] & load_k[None, :]
            w_tile = tl.load(w_rows[:, None] + k[None, :], mask=w_mask, other=0.0)
            h_tile = tl.load(h_row + k, mask=load_k, other=0.0).to(tl.float32) * scale
            acc += w_tile.to(tl.float32) * h_tile[None, :]
    out = tl.sum(acc, 1) + bias_sum
    tl.store(y + row.to(tl.int64) * hidden + n, out.to(y.dtype.element_ty), mask=exists)
