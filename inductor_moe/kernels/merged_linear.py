"""Linear layers of one input as one launch, for a few rows: packed weights and dense ones.

A decode step's projections are too small to fill a GPU alone, and each launch costs as much as its
weights take to read. Programs of dense rows come first: there are few of them.
"""

from __future__ import annotations

import triton
import triton.language as tl

from inductor_moe.kernels.dependent import wait_for_inputs
from inductor_moe.kernels.quant_decode import COLUMNS, parts_dot


@triton.jit
def pick(block, end0, end1, end2, v0, v1, v2, v3):
    """The value of the weight that a block belongs to, given where the blocks of each end."""
    return tl.where(block < end0, v0, tl.where(block < end1, v1, tl.where(block < end2, v2, v3)))


@triton.jit
def dense_rows(
    block, x, d0, d1, d2, d3, out, m0, m1, m2, m3, k_dim,
    BLOCK_D: tl.constexpr, DENSE_K: tl.constexpr,
):  # fmt: skip
    """A block of BLOCK_D rows of the dense weights."""
    b0 = tl.cdiv(m0, BLOCK_D)
    b1 = b0 + tl.cdiv(m1, BLOCK_D)
    b2 = b1 + tl.cdiv(m2, BLOCK_D)
    rows = pick(block, b0, b1, b2, m0, m1, m2, m3)
    w = pick(block, b0, b1, b2, d0, d1, d2, d3)
    row = (block - pick(block, b0, b1, b2, 0, b0, b1, b2)) * BLOCK_D + tl.arange(0, BLOCK_D)
    k = tl.arange(0, DENSE_K)
    w_ptrs = w + row.to(tl.int64)[:, None] * k_dim + k[None, :]
    total = tl.zeros((BLOCK_D,), tl.float32)
    for start in range(0, k_dim, DENSE_K):
        inside = k < k_dim - start
        weight = tl.load(w_ptrs + start, mask=(row < rows)[:, None] & inside[None, :], other=0.0)
        value = tl.load(x + start + k, mask=inside, other=0.0)
        total += tl.sum(weight.to(tl.float32) * value.to(tl.float32)[None, :], 1)
    out += pick(block, b0, b1, b2, 0, m0, m0 + m1, m0 + m1 + m2)
    tl.store(out + row, total.to(out.dtype.element_ty), mask=row < rows)


@triton.jit
def packed_rows(
    block, x, w0, w1, w2, w3, s0, s1, s2, s3, z0, z1, z2, z3, out, n0, n1, n2, n3,
    k_dim, row_words, groups, k_slice,
    HAS_ZEROS: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, EVEN: tl.constexpr,
    PARTS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A block of BLOCK_N rows of the packed weights."""
    e0 = tl.cdiv(n0, BLOCK_N)
    e1 = e0 + tl.cdiv(n1, BLOCK_N)
    e2 = e1 + tl.cdiv(n2, BLOCK_N)
    first = (block - pick(block, e0, e1, e2, 0, e0, e1, e2)) * BLOCK_N
    rows = pick(block, e0, e1, e2, n0, n1, n2, n3)
    w = pick(block, e0, e1, e2, w0, w1, w2, w3)
    scales = pick(block, e0, e1, e2, s0, s1, s2, s3)
    zeros = pick(block, e0, e1, e2, z0, z1, z2, z3)
    out += pick(block, e0, e1, e2, 0, n0, n0 + n1, n0 + n1 + n2)
    WIDTH: tl.constexpr = 4 if BITS == 4 else 1
    r = tl.arange(0, PARTS * BLOCK_N)
    row = (first + r % BLOCK_N).to(tl.int64)
    k_first = (r // BLOCK_N) * k_slice
    part = tl.arange(0, COLUMNS)
    x_first = tl.minimum(part, PARTS - 1) * k_slice
    group = k_first // GROUP if GROUP != 0 else 0
    product = parts_dot(
        w + row * row_words + k_first // WIDTH, scales + row * groups + group,
        zeros + row * groups + group, x + x_first,
        k_first, x_first, row < rows, part < PARTS, k_dim, k_slice, row_words,
        BITS, GROUP, HAS_ZEROS, EVEN, PARTS, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    own = first + tl.arange(0, BLOCK_N)
    tl.store(out + own, tl.sum(product, 0).to(out.dtype.element_ty), mask=own < rows)


@triton.jit
def merged_linear_kernel(
    x,  # [M, K]
    w0, w1, w2, w3,  # [N, row_words] packed, with PACKED
    s0, s1, s2, s3,  # [N, groups] scales
    z0, z1, z2, z3,  # [N, groups] zero points, if HAS_ZEROS
    d0, d1, d2, d3,  # [D, K] dense and contiguous, with DENSE
    out,  # [M, all N and D] contiguous, written
    n0, n1, n2, n3,  # rows of each packed weight
    m0, m1, m2, m3,  # rows of each dense weight
    k_dim,
    row_words,
    groups,
    k_slice,
    stride_x,
    stride_out,
    PACKED: tl.constexpr,
    DENSE: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    EVEN: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_N: tl.constexpr,  # packed rows of a program
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,  # dense rows of a program
    DENSE_K: tl.constexpr,
):  # fmt: skip
    wait_for_inputs()
    block = tl.program_id(0)
    token = tl.program_id(1).to(tl.int64)
    x += token * stride_x
    out += token * stride_out
    width = n0 + n1 + n2 + n3
    dense_blocks = 0
    if DENSE:
        dense_blocks = (
            tl.cdiv(m0, BLOCK_D) + tl.cdiv(m1, BLOCK_D)
            + tl.cdiv(m2, BLOCK_D) + tl.cdiv(m3, BLOCK_D)
        )  # fmt: skip
        if block < dense_blocks:
            dense_rows(
                block, x, d0, d1, d2, d3, out + width, m0, m1, m2, m3, k_dim, BLOCK_D, DENSE_K
            )
    if PACKED:  # noqa: SIM102 - a constant, and a value of the program
        if block >= dense_blocks:
            packed_rows(
                block - dense_blocks, x, w0, w1, w2, w3, s0, s1, s2, s3, z0, z1, z2, z3, out,
                n0, n1, n2, n3, k_dim, row_words, groups, k_slice,
                HAS_ZEROS, BITS, GROUP, EVEN, PARTS, BLOCK_N, BLOCK_K,
            )  # fmt: skip
