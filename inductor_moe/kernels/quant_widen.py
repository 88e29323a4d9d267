"""A packed weight as one of 16 bits, for products of so many rows that they are worth it."""

from __future__ import annotations

import triton
import triton.language as tl

from inductor_moe.kernels.dependent import wait_for_inputs
from inductor_moe.kernels.quant_dot import code_columns, unpack_plane


@triton.jit
def widen_kernel(
    w,                      # [N, row_words] packed
    scales, zeros,          # [N, groups]; zeros if HAS_ZEROS
    out,                    # [N, K] contiguous, written
    rows_w, k_dim, row_words, groups,
    BITS: tl.constexpr, GROUP: tl.constexpr, HAS_ZEROS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """(code - zero) * scale in fp32, rounded. GROUP 0 is one group a row."""
    wait_for_inputs()
    DTYPE: tl.constexpr = out.dtype.element_ty
    CENTER: tl.constexpr = 8 if BITS == 4 else 0
    STEP_WORDS: tl.constexpr = BLOCK_K // 4 if BITS == 4 else BLOCK_K
    n = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)[:, None]
    word, first = code_columns(BITS, BLOCK_K)
    word += tl.program_id(1) * STEP_WORDS
    first += tl.program_id(1) * BLOCK_K
    exists = n < rows_w
    words = tl.load(w + n * row_words + word, mask=exists & (word < row_words)[None, :], other=0)
    for plane in tl.static_range(4 if BITS == 4 else 1):
        at = first + 16 * plane
        mask = exists & (at < k_dim)[None, :]
        group = at // GROUP if GROUP != 0 else at * 0
        codes = unpack_plane(words, plane, DTYPE) if BITS == 4 else words
        value = codes.to(tl.float32)
        if HAS_ZEROS:
            zero = tl.load(zeros + n * groups + group[None, :], mask=mask, other=0.0)
            value -= zero.to(tl.float32) - CENTER
        scale = tl.load(scales + n * groups + group[None, :], mask=mask, other=0.0)
        tl.store(
            out + n * k_dim + at[None, :], (value * scale.to(tl.float32)).to(DTYPE), mask=mask
        )
