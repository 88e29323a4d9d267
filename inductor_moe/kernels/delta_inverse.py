"""The inverse of a chunk's unit lower triangular matrix, by tensor cores."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def pack_pairs(x, C: tl.constexpr):
    """[C, C // 2] words of two neighbouring columns of 16 bits, which share a register."""
    low, high = tl.split(tl.reshape(x.to(tl.int16, bitcast=True), (C, C // 2, 2)))
    return (high.to(tl.int32) << 16) | (low.to(tl.int32) & 0xFFFF)


@triton.jit
def unpack_pairs(words, DTYPE: tl.constexpr, C: tl.constexpr):
    pairs = tl.join((words & 0xFFFF).to(tl.int16), (words >> 16).to(tl.int16))
    return tl.reshape(pairs, (C, C)).to(DTYPE, bitcast=True)


@triton.jit
def unit_lower_inverse(a, levels, C: tl.constexpr, PRECISION: tl.constexpr):
    """(I - a)^-1 in fp32 of a strictly lower triangular [C, C], C = 2**levels.

    Inverses of the diagonal blocks of 2**level rows give those of twice as many, by products in
    a's dtype. levels comes at run time: unrolled, every level's mask would live in registers.
    """
    DTYPE: tl.constexpr = a.dtype
    row = tl.arange(0, C)
    apart = row[:, None] ^ row[None, :]
    inverse = tl.where(apart == 1, a.to(tl.float32), 0.0)
    inverse = tl.where(apart == 0, 1.0, inverse)
    # For two columns at a time: the level at which a block first holds row and column, from the
    # exponent of a float.
    apart = (row // 2)[:, None] ^ tl.arange(0, C // 2)[None, :]
    joined = (apart.to(tl.float32).to(tl.int32, bitcast=True) >> 23) - 126
    NARROW: tl.constexpr = DTYPE.primitive_bitwidth == 16
    pairs = pack_pairs(a, C) if NARROW else tl.reshape(a, (C, C // 2, 2))
    for level in range(1, levels):
        mask = joined == level
        if NARROW:
            lower = unpack_pairs(tl.where(mask, pairs, 0), DTYPE, C)
        else:
            lower = tl.reshape(tl.where(mask[:, :, None], pairs, 0.0), (C, C))
        blocks = inverse.to(DTYPE)
        lower = tl.dot(lower, blocks, input_precision=PRECISION).to(DTYPE)
        inverse = tl.dot(blocks, lower, inverse, input_precision=PRECISION)
    return inverse
