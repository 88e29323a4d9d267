"""A linear layer on packed weights for a few rows: each warp sums a slice of the inputs.

A layer of few outputs has too few blocks of whole rows to read its weights at the memory's speed.
"""

from __future__ import annotations

import triton
import triton.language as tl

from inductor_moe.kernels.dependent import wait_for_inputs
from inductor_moe.kernels.quant_dot import code_columns, packed_dot, whole_rows
from inductor_moe.kernels.quant_gemm import tile_of


@triton.jit
def quantized_slices_tile(
    a,  # [., K_DIM]
    w,  # [N, row_words] packed
    scales,  # [N, groups]
    zeros,
    a_row,  # [BLOCK_M] int64, rows of a
    load_a,  # [BLOCK_M] those that exist
    n,  # [BLOCK_N] rows of w
    exists,  # [BLOCK_N]
    k_dim,
    k_slice,  # inputs of a slice, whole groups and steps
    row_words,
    groups,
    stride_a,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    EVEN: tl.constexpr,
    PARTS: tl.constexpr,  # slices, one for each warp
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """[BLOCK_N, BLOCK_M] fp32: W[n] @ a[a_row].T"""
    WIDTH: tl.constexpr = 4 if BITS == 4 else 1
    STEP_WORDS: tl.constexpr = BLOCK_K // WIDTH
    word, first = code_columns(BITS, BLOCK_K)
    # Whole steps, said so that loads have 16 bytes: an argument is known to divide by 16 alone.
    k_first = tl.arange(0, PARTS) * (k_slice // BLOCK_K) * BLOCK_K
    row = n.to(tl.int64)[None, :]
    w_ptrs = w + (row * row_words + (k_first // WIDTH)[:, None])[:, :, None] + word[None, None, :]
    k = k_first[:, None] + first[None, :]
    x_ptrs = a + k[:, :, None] + (a_row * stride_a)[None, None, :]
    group_first = (k_first // GROUP if GROUP != 0 else k_first * 0)[:, None]
    scale_ptrs = scales + row * groups + group_first
    zero_ptrs = zeros + row * groups + group_first
    acc = tl.zeros((PARTS, BLOCK_N, BLOCK_M), tl.float32)
    no_sum = tl.zeros((PARTS, BLOCK_M), tl.float32)
    total = no_sum
    for start in range(0, k_slice, BLOCK_K):
        step = start // BLOCK_K
        group = start // GROUP if GROUP != 0 else 0
        k_left = k_dim - k_first - start
        words_left = row_words - k_first // WIDTH - step * STEP_WORDS
        load_w = exists[None, :, None] & (word[None, :] < words_left[:, None])[:, None, :]
        # The scales of a slice past the end belong to no group.
        row_left = tl.where(exists[None, :], k_dim if EVEN else k_left[:, None], 0)
        acc, x_sum = packed_dot(
            acc, no_sum, w_ptrs, x_ptrs, load_w, (k_left[:, None] - first[None, :])[:, :, None],
            load_a[None, None, :], scale_ptrs + group, zero_ptrs + group, row_left,
            BITS, GROUP, HAS_ZEROS, EVEN,
        )  # fmt: skip
        if GROUP == 0 and HAS_ZEROS:
            total += x_sum
        w_ptrs += STEP_WORDS
        x_ptrs += BLOCK_K
    out = tl.sum(acc, 0)
    if GROUP == 0:
        first_group = n.to(tl.int64) * groups
        out = whole_rows(
            out, tl.sum(total, 0), scales + first_group, zeros + first_group, exists,
            BITS, HAS_ZEROS,
        )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["tokens"])
def quantized_slices_kernel(
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
    k_slice,
    stride_b,
    HAS_BIAS: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    EVEN: tl.constexpr,
    PARTS: tl.constexpr,
    GROUP_M: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """`quantized_linear_kernel` with slices of the inputs."""
    wait_for_inputs()
    block, n_block = tile_of(tl.cdiv(tokens, BLOCK_M), GROUP_M, tl.cdiv(n_dim, BLOCK_N))
    m = block * BLOCK_M + tl.arange(0, BLOCK_M)
    n = n_block * BLOCK_N + tl.arange(0, BLOCK_N)
    exists = n < n_dim
    # Rows of w past the end repeat the last and are not stored. Rows of x are not read again: many
    # warps of all programs would ask L2 for the same lines.
    acc = quantized_slices_tile(
        x, w, scales, zeros, tl.minimum(m, tokens - 1).to(tl.int64), m < tokens,
        tl.minimum(n, n_dim - 1), exists, k_dim, k_slice, row_words, groups, stride_x,
        BITS, GROUP, HAS_ZEROS, EVEN, PARTS, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    if HAS_BIAS:
        acc += tl.load(bias + n * stride_b, mask=exists, other=0.0).to(tl.float32)[:, None]
    out_ptrs = out + m.to(tl.int64)[:, None] * n_dim + n[None, :]
    keep = (m < tokens)[:, None] & exists[None, :]
    tl.store(out_ptrs, tl.trans(acc).to(out.dtype.element_ty), mask=keep)
