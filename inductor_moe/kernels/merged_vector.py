"""`merged_linear_kernel` for one row, its packed weights multiplied without tensor cores."""

from __future__ import annotations

import triton
import triton.language as tl

from inductor_moe.kernels.dependent import place_next, wait_for_inputs
from inductor_moe.kernels.merged_linear import dense_rows, pick
from inductor_moe.kernels.quant_vector import vector_rows


@triton.jit
def merged_vector_kernel(
    x,  # [K]
    w0, w1, w2, w3,  # [N, K / 4] packed
    s0, s1, s2, s3,  # [N, K / GROUP] scales
    z0, z1, z2, z3,  # [N, K / GROUP] zero points, if HAS_ZEROS
    d0, d1, d2, d3,  # [D, K] dense and contiguous, with DENSE
    out,  # [all N and D] contiguous, written
    n0, n1, n2, n3,  # rows of each packed weight
    m0, m1, m2, m3,  # rows of each dense weight
    k_dim,
    DENSE: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    GROUP: tl.constexpr,
    LANES: tl.constexpr,  # see `vector_rows`
    PARTS: tl.constexpr,
    SPANS: tl.constexpr,
    R: tl.constexpr,
    STEPS: tl.constexpr,
    AHEAD: tl.constexpr,
    BLOCK_D: tl.constexpr,  # dense rows of a program
    DENSE_K: tl.constexpr,
):  # fmt: skip
    """Programs of dense rows, which read more, come first."""
    wait_for_inputs()
    place_next()
    block = tl.program_id(0)
    width = n0 + n1 + n2 + n3
    dense_blocks = 0
    if DENSE:
        dense_blocks = (
            tl.cdiv(m0, BLOCK_D) + tl.cdiv(m1, BLOCK_D)
            + tl.cdiv(m2, BLOCK_D) + tl.cdiv(m3, BLOCK_D)
        )  # fmt: skip
    if block < dense_blocks:
        dense_rows(block, x, d0, d1, d2, d3, out + width, m0, m1, m2, m3, k_dim, BLOCK_D, DENSE_K)
    else:
        block -= dense_blocks
        BLOCK_N: tl.constexpr = STEPS * R // PARTS
        e0 = tl.cdiv(n0, BLOCK_N)
        e1 = e0 + tl.cdiv(n1, BLOCK_N)
        e2 = e1 + tl.cdiv(n2, BLOCK_N)
        w = pick(block, e0, e1, e2, w0, w1, w2, w3)
        vector_rows(
            (block - pick(block, e0, e1, e2, 0, e0, e1, e2)) * BLOCK_N, x, w,
            pick(block, e0, e1, e2, s0, s1, s2, s3), pick(block, e0, e1, e2, z0, z1, z2, z3), w,
            out + pick(block, e0, e1, e2, 0, n0, n0 + n1, n0 + n1 + n2),
            pick(block, e0, e1, e2, n0, n1, n2, n3), 0,
            False, HAS_ZEROS, GROUP, LANES, PARTS, SPANS, R, STEPS, AHEAD, False,
        )  # fmt: skip
