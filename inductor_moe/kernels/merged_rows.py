"""Linear layers of one input as one launch, for a small batch: each weight is read once.

A program has rows of one weight; those of dense rows come first.
"""

from __future__ import annotations

import triton
import triton.language as tl

from inductor_moe.kernels.dependent import wait_for_inputs
from inductor_moe.kernels.merged_linear import pick
from inductor_moe.kernels.quant_gemm import quantized_gemm_tile
from inductor_moe.kernels.quant_slices import quantized_slices_tile


@triton.jit
def dense_tile(
    x,  # [., K]
    w,  # [D, K] contiguous
    x_row,  # [BLOCK_M] int64, rows of x
    row,  # [BLOCK_D] rows of w
    k_dim,
    stride_x,
    EVEN: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """[BLOCK_D, BLOCK_M] fp32: W[row] @ x[x_row].T, each warp with a slice of the inputs"""
    k_slice = tl.cdiv(k_dim, PARTS * BLOCK_K) * BLOCK_K
    k = (tl.arange(0, PARTS) * k_slice)[:, None] + tl.arange(0, BLOCK_K)[None, :]
    w_ptrs = w + (row.to(tl.int64) * k_dim)[None, :, None] + k[:, None, :]
    x_ptrs = x + (x_row * stride_x)[None, None, :] + k[:, :, None]
    acc = tl.zeros((PARTS, BLOCK_D, BLOCK_M), tl.float32)
    for start in range(0, k_slice, BLOCK_K):
        if EVEN:
            weight, value = tl.load(w_ptrs + start), tl.load(x_ptrs + start)
        else:
            inside = k < k_dim - start
            weight = tl.load(w_ptrs + start, mask=inside[:, None, :], other=0.0)
            value = tl.load(x_ptrs + start, mask=inside[:, :, None], other=0.0)
        acc = tl.dot(weight, value, acc)
    return tl.sum(acc, 0)


@triton.jit
def store_rows(
    acc,  # [BLOCK_N, BLOCK_M] fp32
    out,  # [M, N] contiguous, written
    m,  # [BLOCK_M]
    n,  # [BLOCK_N]
    tokens,
    rows,  # N
):
    out_ptrs = out + m.to(tl.int64)[:, None] * rows + n[None, :]
    keep = (m < tokens)[:, None] & (n < rows)[None, :]
    tl.store(out_ptrs, tl.trans(acc).to(out.dtype.element_ty), mask=keep)


@triton.jit(do_not_specialize=["tokens"])
def merged_rows_kernel(
    x,  # [M, K]
    w0, w1, w2, w3,  # [N, row_words] packed, with PACKED
    s0, s1, s2, s3,  # [N, groups] scales
    z0, z1, z2, z3,  # [N, groups] zero points, if HAS_ZEROS
    d0, d1, d2, d3,  # [D, K] dense and contiguous, with DENSE
    out,  # contiguous, written: [M, N] for each packed weight, then [M, D] for each dense one
    n0, n1, n2, n3,  # rows of each packed weight
    m0, m1, m2, m3,  # rows of each dense weight
    tokens,
    k_dim,
    row_words,
    groups,
    k_slice,  # inputs of a slice, whole groups and steps, with PARTS > 1
    stride_x,
    PACKED: tl.constexpr,
    DENSE: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    EVEN: tl.constexpr,
    PARTS: tl.constexpr,  # slices of the inputs of packed weights
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,  # packed rows of a program
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,  # dense rows of a program
    DENSE_EVEN: tl.constexpr,
    DENSE_PARTS: tl.constexpr,
    DENSE_K: tl.constexpr,
):  # fmt: skip
    wait_for_inputs()
    block = tl.program_id(0)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    # Rows past the end repeat the last for dense weights, whose loop has no mask; none is stored.
    x_row = tl.minimum(m, tokens - 1).to(tl.int64)
    dense_blocks = 0
    if DENSE:
        b0 = tl.cdiv(m0, BLOCK_D)
        b1 = b0 + tl.cdiv(m1, BLOCK_D)
        b2 = b1 + tl.cdiv(m2, BLOCK_D)
        dense_blocks = b2 + tl.cdiv(m3, BLOCK_D)
        if block < dense_blocks:
            rows = pick(block, b0, b1, b2, m0, m1, m2, m3)
            before = pick(block, b0, b1, b2, 0, m0, m0 + m1, m0 + m1 + m2) + n0 + n1 + n2 + n3
            d = (block - pick(block, b0, b1, b2, 0, b0, b1, b2)) * BLOCK_D + tl.arange(0, BLOCK_D)
            acc = dense_tile(
                x, pick(block, b0, b1, b2, d0, d1, d2, d3), x_row, tl.minimum(d, rows - 1),
                k_dim, stride_x, DENSE_EVEN, DENSE_PARTS, BLOCK_M, BLOCK_D, DENSE_K,
            )  # fmt: skip
            store_rows(acc, out + before.to(tl.int64) * tokens, m, d, tokens, rows)
    if PACKED:  # noqa: SIM102 - a constant, and a value of the program
        if block >= dense_blocks:
            block -= dense_blocks
            e0 = tl.cdiv(n0, BLOCK_N)
            e1 = e0 + tl.cdiv(n1, BLOCK_N)
            e2 = e1 + tl.cdiv(n2, BLOCK_N)
            rows = pick(block, e0, e1, e2, n0, n1, n2, n3)
            before = pick(block, e0, e1, e2, 0, n0, n0 + n1, n0 + n1 + n2)
            n = (block - pick(block, e0, e1, e2, 0, e0, e1, e2)) * BLOCK_N + tl.arange(0, BLOCK_N)
            exists = n < rows
            row = tl.minimum(n, rows - 1)
            w = pick(block, e0, e1, e2, w0, w1, w2, w3)
            scales = pick(block, e0, e1, e2, s0, s1, s2, s3)
            zeros = pick(block, e0, e1, e2, z0, z1, z2, z3)
            if PARTS == 1:
                acc = quantized_gemm_tile(
                    x, w, scales, zeros, x_row, m < tokens, row, exists, k_dim, row_words, groups,
                    stride_x,
                    BITS, GROUP, HAS_ZEROS, EVEN, BLOCK_M, BLOCK_N, BLOCK_K,
                )  # fmt: skip
            else:
                acc = quantized_slices_tile(
                    x, w, scales, zeros, x_row, m < tokens, row, exists, k_dim, k_slice, row_words,
                    groups, stride_x,
                    BITS, GROUP, HAS_ZEROS, EVEN, PARTS, BLOCK_M, BLOCK_N, BLOCK_K,
                )  # fmt: skip
            store_rows(acc, out + before.to(tl.int64) * tokens, m, n, tokens, rows)
