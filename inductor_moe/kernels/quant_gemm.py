"""GEMMs on packed weights: blocks of sorted rows by their experts, or one dense layer."""

from __future__ import annotations

import triton
import triton.language as tl

from inductor_moe.kernels.dependent import wait_for_inputs
from inductor_moe.kernels.moe_activation import gated_activation_tile, up_rows
from inductor_moe.kernels.quant_dot import code_columns, packed_dot, whole_rows


@triton.jit
def quantized_gemm_tile(
    a,  # [., K_DIM]
    w,  # [N, row_words] packed, of one expert
    scales,  # [N, groups]
    zeros,
    a_row,  # [BLOCK_M] int64, rows of a
    load_a,  # [BLOCK_M] those that exist
    n,  # [BLOCK_N] rows of w
    exists,  # [BLOCK_N]
    k_dim,
    row_words,
    groups,
    stride_a,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """[BLOCK_N, BLOCK_M] fp32: W[n] @ a[a_row].T

    Rows of a that do not exist are zeros. Another row in their place would be asked for by all of
    them and all programs, of the same lines of L2: twice the time of a block, or more.
    """
    word, first = code_columns(BITS, BLOCK_K)
    n_offset = n.to(tl.int64)
    w_ptrs = w + n_offset[:, None] * row_words + word[None, :]
    x_ptrs = a + a_row[None, :] * stride_a + first[:, None]
    scale_ptrs = scales + n_offset * groups
    zero_ptrs = zeros + n_offset * groups
    STEP_WORDS: tl.constexpr = BLOCK_K // 4 if BITS == 4 else BLOCK_K
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    no_sum = tl.zeros((BLOCK_M,), tl.float32)
    total = no_sum
    for start in range(0, k_dim, BLOCK_K):
        step = start // BLOCK_K
        group = start // GROUP if GROUP != 0 else 0
        load_w = exists[:, None] & (word < row_words - step * STEP_WORDS)[None, :]
        # The last step may hold groups past the end; where all inputs exist this is constant.
        row_left = tl.where(exists, k_dim if EVEN else k_dim - start, 0)
        acc, x_sum = packed_dot(
            acc, no_sum, w_ptrs, x_ptrs, load_w, (k_dim - start - first)[:, None], load_a[None, :],
            scale_ptrs + group, zero_ptrs + group, row_left,
            BITS, GROUP, HAS_ZEROS, EVEN,
        )  # fmt: skip
        if GROUP == 0 and HAS_ZEROS:
            total += x_sum
        w_ptrs += STEP_WORDS
        x_ptrs += BLOCK_K
    if GROUP == 0:
        acc = whole_rows(acc, total, scale_ptrs, zero_ptrs, exists, BITS, HAS_ZEROS)
    return acc


@triton.jit
def tile_of(m_blocks, group_m, n_blocks):
    """(block of rows, block of columns) of this program: `group_m` of rows take turns on one of
    columns, for L2."""
    pid = tl.program_id(0)
    per_group = group_m * n_blocks
    first_block = (pid // per_group) * group_m
    band_size = tl.minimum(m_blocks - first_block, group_m)
    return first_block + (pid % per_group) % band_size, (pid % per_group) // band_size


@triton.jit
def store_pairs(
    acc,  # [BLOCK_N, BLOCK_M] fp32
    bias,  # [N] of one expert, if HAS_BIAS
    routing,  # [BLOCK_M] weights of the rows, if HAS_WEIGHTS
    out_row,  # [BLOCK_M]
    out,  # [S, N or N / 2] contiguous, written
    n,  # [BLOCK_N] rows of w
    exists,  # [BLOCK_N]
    n_block,
    rows,  # that exist in the block
    inner,  # columns of out
    stride_bn,
    GATE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ALPHA: tl.constexpr,
    UP_OFFSET: tl.constexpr,
    LIMIT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Bias, activation and routing weights, and the rows where they belong."""
    OUT: tl.constexpr = BLOCK_N if GATE == "none" else BLOCK_N // 2
    if HAS_BIAS:
        value = tl.load(bias + n * stride_bn, mask=exists, other=0.0)
        acc += value.to(tl.float32)[:, None]
    value = gated_activation_tile(
        tl.trans(acc), BLOCK_M, BLOCK_N, GATE, "k", ACTIVATION, ALPHA, UP_OFFSET, LIMIT
    )
    if HAS_WEIGHTS:
        value *= routing.to(tl.float32)[:, None]
    i = n_block * OUT + tl.arange(0, OUT)
    out_ptrs = out + out_row.to(tl.int64)[:, None] * inner + i[None, :]
    keep = (tl.arange(0, BLOCK_M) < rows)[:, None] & (i < inner)[None, :]
    tl.store(out_ptrs, value.to(out.dtype.element_ty), mask=keep)


@triton.jit(do_not_specialize=["capacity", "group_m"])
def moe_quantized_gemm_kernel(
    a,  # [T, K_DIM] gathered by pair // a_repeat, or [S, K_DIM] in sorted order if A_SORTED
    w,  # [E, N, row_words] packed
    scales,  # [E, N, groups]
    zeros,  # [E, N, groups], if HAS_ZEROS
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
    rows_w,  # N
    row_words,
    groups,
    stride_a,
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
    HAS_ZEROS: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    wait_for_inputs()
    OUT: tl.constexpr = BLOCK_N if GATE == "none" else BLOCK_N // 2
    block, n_block = tile_of(capacity, group_m, tl.cdiv(inner, OUT))
    expert = tl.load(blocks + block)
    first_row = tl.load(blocks + capacity + block)
    rows = tl.load(blocks + 2 * capacity + block)
    if expert >= 0:
        row = first_row + tl.arange(0, BLOCK_M)
        in_block = tl.arange(0, BLOCK_M) < rows
        pair = tl.load(order + row, mask=in_block, other=0)
        a_row = row if A_SORTED else pair // a_repeat
        n, exists = up_rows(n_block, inner, GATE, "k", BLOCK_N)
        e = expert.to(tl.int64)
        routing = pair
        if HAS_WEIGHTS:
            # Ahead of the loop, which hides its latency.
            routing_ptrs = weights + (pair // TOP_K).to(tl.int64) * stride_st
            routing = tl.load(routing_ptrs + (pair % TOP_K) * stride_sk)
        acc = quantized_gemm_tile(
            a, w + e * rows_w * row_words, scales + e * rows_w * groups,
            zeros + e * rows_w * groups, a_row.to(tl.int64), in_block, n, exists,
            k_dim, row_words, groups, stride_a,
            BITS, GROUP, HAS_ZEROS, EVEN, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        store_pairs(
            acc, bias + e * stride_be, routing, row if OUT_SORTED else pair, out,
            n, exists, n_block, rows, inner, stride_bn,
            GATE, ACTIVATION, ALPHA, UP_OFFSET, LIMIT, HAS_BIAS, HAS_WEIGHTS, BLOCK_M, BLOCK_N,
        )  # fmt: skip


@triton.jit(do_not_specialize=["tokens"])
def quantized_linear_kernel(
    x,  # [M, K_DIM]
    w,  # [N, row_words] packed
    scales,  # [N, groups]
    zeros,  # [N, groups], if HAS_ZEROS
    bias,  # [N], if HAS_BIAS
    out,  # [M, N] contiguous, written
    tokens,
    n_dim,
    k_dim,
    row_words,
    groups,
    stride_x,
    stride_b,
    HAS_BIAS: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    EVEN: tl.constexpr,
    GROUP_M: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    wait_for_inputs()
    block, n_block = tile_of(tl.cdiv(tokens, BLOCK_M), GROUP_M, tl.cdiv(n_dim, BLOCK_N))
    m = block * BLOCK_M + tl.arange(0, BLOCK_M)
    n = n_block * BLOCK_N + tl.arange(0, BLOCK_N)
    exists = n < n_dim
    # Rows of w past the end repeat the last: no mask in the loop, and not stored.
    row = tl.minimum(n, n_dim - 1)
    acc = quantized_gemm_tile(
        x, w, scales, zeros, m.to(tl.int64), m < tokens, row, exists,
        k_dim, row_words, groups, stride_x,
        BITS, GROUP, HAS_ZEROS, EVEN, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    if HAS_BIAS:
        acc += tl.load(bias + n * stride_b, mask=exists, other=0.0).to(tl.float32)[:, None]
    out_ptrs = out + m.to(tl.int64)[:, None] * n_dim + n[None, :]
    keep = (m < tokens)[:, None] & exists[None, :]
    tl.store(out_ptrs, tl.trans(acc).to(out.dtype.element_ty), mask=keep)
