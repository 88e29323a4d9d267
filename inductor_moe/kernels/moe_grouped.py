"""Experts for many pairs: one grouped GEMM over blocks of sorted rows, and the sum over slots."""

from __future__ import annotations

import triton
import triton.language as tl

from inductor_moe.kernels.dependent import wait_for_inputs
from inductor_moe.kernels.moe_activation import (
    gated_activation_tile,
    up_rows,
    weight_offsets,
)


@triton.jit
def grouped_gemm_tile(
    a,
    w_expert,
    bias_expert,
    weights,
    order,
    out,
    first_row,
    rows,
    n_block,
    a_repeat,
    k_dim,
    inner,
    stride_a,
    stride_wn,
    stride_wk,
    stride_bn,
    stride_st,
    stride_sk,
    TOP_K: tl.constexpr,
    A_SORTED: tl.constexpr,
    OUT_SORTED: tl.constexpr,
    GATE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ALPHA: tl.constexpr,
    UP_OFFSET: tl.constexpr,
    LIMIT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr,
    W_INNER: tl.constexpr,
    EVEN_N: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    m = tl.arange(0, BLOCK_M)
    # Rows past the block's end repeat its last row: no mask in the loop, and not stored. A block
    # has none where PyTorch runs the kernel on zeros, while it makes a package.
    row = first_row + tl.maximum(tl.minimum(m, rows - 1), 0)
    pair = tl.load(order + row)
    a_row = row if A_SORTED else pair // a_repeat
    n, exists = up_rows(n_block, inner, GATE, W_INNER, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    a_ptrs = a + a_row.to(tl.int64)[:, None] * stride_a + k[None, :]
    n_offset, k_offset = weight_offsets(n, k, stride_wn, stride_wk, W_INNER)
    w_ptrs = w_expert + n_offset[None, :] + k_offset[:, None]

    if HAS_WEIGHTS:
        # Ahead of the loop, which hides its latency.
        scale_ptrs = weights + (pair // TOP_K).to(tl.int64) * stride_st
        scale = tl.load(scale_ptrs + (pair % TOP_K) * stride_sk)

    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, k_dim, BLOCK_K):
        if EVEN_K:
            a_tile = tl.load(a_ptrs)
            if EVEN_N:
                w_tile = tl.load(w_ptrs)
            else:
                w_tile = tl.load(w_ptrs, mask=exists[None, :], other=0.0)
        else:
            in_k = k < k_dim - start
            a_tile = tl.load(a_ptrs, mask=in_k[None, :], other=0.0)
            w_tile = tl.load(w_ptrs, mask=exists[None, :] & in_k[:, None], other=0.0)
        acc = tl.dot(a_tile, w_tile, acc, input_precision="ieee")
        a_ptrs += BLOCK_K
        if W_INNER == "k":
            w_ptrs += BLOCK_K
        else:
            w_ptrs += BLOCK_K * stride_wk

    if HAS_BIAS:
        bias = tl.load(bias_expert + n * stride_bn, mask=exists, other=0.0)
        acc += bias.to(tl.float32)[None, :]
    value = gated_activation_tile(
        acc, BLOCK_M, BLOCK_N, GATE, W_INNER, ACTIVATION, ALPHA, UP_OFFSET, LIMIT
    )
    if HAS_WEIGHTS:
        value *= scale.to(tl.float32)[:, None]
    out_row = row if OUT_SORTED else pair
    OUT: tl.constexpr = BLOCK_N if GATE == "none" else BLOCK_N // 2
    i = n_block * OUT + tl.arange(0, OUT)
    out_ptrs = out + out_row.to(tl.int64)[:, None] * inner + i[None, :]
    keep = (m < rows)[:, None] & (i < inner)[None, :]
    tl.store(out_ptrs, value.to(out.dtype.element_ty), mask=keep)


@triton.jit(do_not_specialize=["capacity", "group_m"])
def moe_grouped_gemm_kernel(
    a,  # [T, K_DIM] gathered by pair // a_repeat, or [S, K_DIM] in sorted order if A_SORTED
    w,  # [E, N, K_DIM]
    bias,  # [E, N], if HAS_BIAS
    weights,  # [T, K], if HAS_WEIGHTS; scales the output rows
    order,  # [S] int32, pairs sorted by expert
    blocks,  # [3, capacity] int32: expert or -1, first row, row count
    out,  # [S, N or N / 2] contiguous, written, in sorted order if OUT_SORTED else in pair order
    a_repeat,
    capacity,
    group_m,  # blocks that take turns on one tile of columns, for L2
    k_dim,
    inner,  # columns of out
    stride_a,
    stride_we,
    stride_wn,
    stride_wk,
    stride_be,
    stride_bn,
    stride_st,
    stride_sk,
    TOP_K: tl.constexpr,
    A_SORTED: tl.constexpr,
    OUT_SORTED: tl.constexpr,
    GATE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ALPHA: tl.constexpr,
    UP_OFFSET: tl.constexpr,
    LIMIT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr,
    W_INNER: tl.constexpr,
    EVEN_N: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    TAIL_M: tl.constexpr,  # a shorter block for an expert's last rows, or BLOCK_M
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    wait_for_inputs()
    OUT: tl.constexpr = BLOCK_N if GATE == "none" else BLOCK_N // 2
    n_blocks = tl.cdiv(inner, OUT)
    pid = tl.program_id(0)
    per_group = group_m * n_blocks
    group = pid // per_group
    first_block = group * group_m
    group_size = tl.minimum(capacity - first_block, group_m)
    block = first_block + (pid % per_group) % group_size
    n_block = (pid % per_group) // group_size

    expert = tl.load(blocks + block)
    first_row = tl.load(blocks + capacity + block)
    rows = tl.load(blocks + 2 * capacity + block)
    if expert >= 0:
        w_expert = w + expert.to(tl.int64) * stride_we
        bias_expert = bias + expert.to(tl.int64) * stride_be
        short = False
        if TAIL_M < BLOCK_M:
            short = rows <= TAIL_M
            if short:
                grouped_gemm_tile(
                    a, w_expert, bias_expert, weights, order, out, first_row, rows, n_block,
                    a_repeat, k_dim, inner, stride_a, stride_wn, stride_wk, stride_bn,
                    stride_st, stride_sk, TOP_K, A_SORTED, OUT_SORTED, GATE, ACTIVATION, ALPHA,
                    UP_OFFSET, LIMIT, HAS_BIAS, HAS_WEIGHTS, W_INNER, EVEN_N, EVEN_K,
                    TAIL_M, BLOCK_N, BLOCK_K,
                )  # fmt: skip
        if not short:
            grouped_gemm_tile(
                a, w_expert, bias_expert, weights, order, out, first_row, rows, n_block,
                a_repeat, k_dim, inner, stride_a, stride_wn, stride_wk, stride_bn,
                stride_st, stride_sk, TOP_K, A_SORTED, OUT_SORTED, GATE, ACTIVATION, ALPHA,
                UP_OFFSET, LIMIT, HAS_BIAS, HAS_WEIGHTS, W_INNER, EVEN_N, EVEN_K,
                BLOCK_M, BLOCK_N, BLOCK_K,
            )  # fmt: skip


@triton.jit
def moe_combine_kernel(
    rows,  # [T * SLOTS, H] contiguous
    ids,  # [T, SLOTS], if HAS_IDS: rows of ids outside [0, E) are not read
    y,  # [T, H] contiguous, written
    experts,
    hidden,
    stride_it,
    stride_ik,
    SLOTS: tl.constexpr,
    HAS_IDS: tl.constexpr,
    BLOCK: tl.constexpr,
    UNROLL: tl.constexpr,
):
    wait_for_inputs()
    token = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    exists = n < hidden
    acc = tl.zeros((BLOCK,), tl.float32)
    for slot in tl.range(0, SLOTS, 1, loop_unroll_factor=UNROLL):
        keep = exists
        if HAS_IDS:
            expert = tl.load(ids + token * stride_it + slot * stride_ik)
            keep = keep & (expert >= 0) & (expert < experts)
        row = rows + (token * SLOTS + slot) * hidden
        acc += tl.load(row + n, mask=keep, other=0.0).to(tl.float32)
    tl.store(y + token * hidden + n, acc.to(y.dtype.element_ty), mask=exists)
