"""The products of a chunk's rows under a decay per key channel (KDA), for the chunked rule.

exp(G_i - G_j) factors into a row and a column part only around a border between i and j, or the
parts may overflow. So the pairs of a chunk are taken by the size s of the aligned blocks that
separate them: i in a right, j in a left block of size s. Then exp(sum of g from the border to i)
and exp(sum from j to the border) are at most one, and each s is one masked product. In bf16, with
fp32's range, one product around the middle is enough for channels that decay to no less than
2**-192 in a chunk, and one for each half of the rows for those that do so in half a chunk.
"""

from __future__ import annotations

import triton
import triton.language as tl

MILDEST = tl.constexpr(-192.0)  # log2 of the decay that one middle still bears


@triton.jit
def row_ranges(first, count, C: tl.constexpr):
    """[C, C] fp16: ones in `count` columns from column `first` of every row, else zeros."""
    offset = (tl.arange(0, C)[None, :] - first[:, None]).to(tl.uint32, bitcast=True)
    return tl.where(offset < count.to(tl.uint32, bitcast=True)[:, None], 1.0, 0.0).to(tl.float16)


@triton.jit
def sums_over(span, decay, EXACT: tl.constexpr):
    """Sums of decay [C, K] over each row's span [C, C].

    As a product: prefix sums would be subtracted, and cancel, for every pair of borders. fp16
    moves the exponential by less than 2**-13; EXACT adds what fp16 cut off.
    """
    short = decay.to(tl.float16)
    total = tl.dot(span, short)
    if EXACT:
        total = tl.dot(span, (decay - short.to(tl.float32)).to(tl.float16), total)
    return total


@triton.jit
def border_sums(decay, level, C: tl.constexpr, EXACT: tl.constexpr):
    """Decay [C, K] between each row and the middle of its aligned block of 2**(level + 1) rows."""
    row = tl.arange(0, C)
    middle = row >> level << level
    right = ((row >> level) & 1) == 1
    first = tl.where(right, middle, row + 1)
    count = tl.where(right, row + 1 - middle, middle + (1 << level) - 1 - row)
    return sums_over(row_ranges(first, count, C), decay, EXACT)


@triton.jit
def corners(level, C: tl.constexpr):
    """[C, C]: row in a right, column in the left block beside it, pairs of blocks of 2**level."""
    block = tl.arange(0, C) >> level
    return (block[:, None] == block[None, :] + 1) & ((block[:, None] & 1) == 1)


@triton.jit
def add_pairs(
    kk, qk, key, query, decay, level,
    C: tl.constexpr, EXACT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add the products of the pairs that aligned blocks of 2**level rows separate."""
    near = tl.exp2(border_sums(decay, level, C, EXACT))
    near_key = (key.to(tl.float32) * near).to(key.dtype)
    near_query = (query.to(tl.float32) * near).to(key.dtype)
    turned = tl.trans(near_key)
    pairs = corners(level, C)
    kk += tl.where(pairs, tl.dot(near_key, turned, input_precision=PRECISION), 0.0)
    qk += tl.where(pairs, tl.dot(near_query, turned, input_precision=PRECISION), 0.0)
    return kk, qk


@triton.jit
def strong_decays(
    q, k, g, q_t, k_t, g_t, q_read, k_read, k_write, whole, inside, levels,
    K: tl.constexpr, BLOCK_K: tl.constexpr, C: tl.constexpr,
    WIDE_RANGE: tl.constexpr, EXACT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Stores the decayed rows and the chunk's decay, as `delta_channel_intra_kernel` says.

    Returns k k^T and q k^T with decay [C, C], and the sums of q * q and k * k [C].
    """
    DTYPE: tl.constexpr = q_read.dtype.element_ty
    row = tl.arange(0, C)
    kk = tl.zeros([C, C], tl.float32)
    qk = tl.zeros([C, C], tl.float32)
    queries = tl.zeros([C], tl.float32)
    keys = tl.zeros([C], tl.float32)
    diagonal = tl.zeros([C], tl.float32)
    for block in range(0, K, BLOCK_K):
        dk = block + tl.arange(0, BLOCK_K)
        mask = inside[:, None] & (dk < K)[None, :]
        key = tl.load(k + (row[:, None] * k_t + dk[None, :]), mask=mask, other=0.0)
        query = tl.load(q + (row[:, None] * q_t + dk[None, :]), mask=mask, other=0.0)
        decay = tl.load(g + (row[:, None] * g_t + dk[None, :]), mask=mask, other=0.0)
        decay = decay.to(tl.float32)
        for level in range(levels):
            kk, qk = add_pairs(kk, qk, key, query, decay, level, C, EXACT, PRECISION)

    # a second pass: the rows' own factors beside the pairs' products would not fit the registers
    for block in range(0, K, BLOCK_K):
        dk = block + tl.arange(0, BLOCK_K)
        mask = inside[:, None] & (dk < K)[None, :]
        cell = row[:, None] * K + dk[None, :]
        key = tl.load(k + (row[:, None] * k_t + dk[None, :]), mask=mask, other=0.0)
        query = tl.load(q + (row[:, None] * q_t + dk[None, :]), mask=mask, other=0.0)
        decay = tl.load(g + (row[:, None] * g_t + dk[None, :]), mask=mask, other=0.0)
        key = key.to(tl.float32)
        query = query.to(tl.float32)
        decay = decay.to(tl.float32)
        queries += tl.sum(query * query, 1)
        keys += tl.sum(key * key, 1)
        diagonal += tl.sum(query * key, 1)
        total = tl.sum(decay, 0)
        middle = 0.0
        if WIDE_RANGE:
            total = tl.maximum(total, MILDEST) * 0.5
            middle = total[None, :]
        tl.store(whole + dk, tl.exp2(total), mask=dk < K)
        near = tl.exp2(sums_over(row_ranges(row + 1, C - 1 - row, C), decay, EXACT) - middle)
        tl.store(k_write + cell, (key * near).to(DTYPE), mask=mask)
        near = tl.exp2(sums_over(row_ranges(row * 0, row + 1, C), decay, EXACT) - middle)
        tl.store(k_read + cell, (key * near).to(DTYPE), mask=mask)
        tl.store(q_read + cell, (query * near).to(DTYPE), mask=mask)
    qk = tl.where(row[:, None] == row[None, :], diagonal[:, None], qk)
    return kk, qk, queries, keys


@triton.jit
def add_halves(
    kk, qk, key, query, sums, before, after,
    C: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add the products of all pairs, around the middle of the half that the row is in.

    sums [C, K] are decays from the chunk's middle, before and after [K] half of its halves'.
    """
    row = tl.arange(0, C)
    right = (row >= C // 2)[:, None]
    sums += tl.where(right, -before[None, :], after[None, :])
    near = tl.exp2(sums)
    far_key = key * tl.exp2(-sums)
    rows = tl.where(right, 0.0, near)
    turned = tl.trans(far_key.to(DTYPE))
    kk = tl.dot((key * rows).to(DTYPE), turned, kk, input_precision=PRECISION)
    qk = tl.dot((query * rows).to(DTYPE), turned, qk, input_precision=PRECISION)
    rows = tl.where(right, near, 0.0)
    # by two factors: that of both halves can underflow, beside columns that are as large
    across = far_key * tl.exp2(before)[None, :] * tl.exp2(after)[None, :]
    turned = tl.trans(tl.where(right, far_key, across).to(DTYPE))
    kk = tl.dot((key * rows).to(DTYPE), turned, kk, input_precision=PRECISION)
    qk = tl.dot((query * rows).to(DTYPE), turned, qk, input_precision=PRECISION)
    return kk, qk


@triton.jit
def mild_decays(
    q, k, g, q_t, k_t, g_t, q_read, k_read, k_write, whole, inside,
    K: tl.constexpr, BLOCK_K: tl.constexpr, C: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """As strong_decays with WIDE_RANGE, and the least decay of half a chunk, which comes last.

    BLOCK_K channels of which one decays to less than MILDEST in the chunk take a product for each
    half's rows. Where one does so in half a chunk, the rest means nothing, as do the products
    above the diagonal anywhere.
    """
    DTYPE: tl.constexpr = q_read.dtype.element_ty
    row = tl.arange(0, C)
    kk = tl.zeros([C, C], tl.float32)
    qk = tl.zeros([C, C], tl.float32)
    queries = tl.zeros([C], tl.float32)
    keys = tl.zeros([C], tl.float32)
    least = 0.0
    # the decay up to a row, less half of the chunk's
    from_middle = tl.where(row[:, None] >= row[None, :], 0.5, -0.5).to(tl.float16)
    for block in tl.range(0, K, BLOCK_K, num_stages=3):
        dk = block + tl.arange(0, BLOCK_K)
        mask = inside[:, None]
        if K % BLOCK_K != 0:
            mask &= (dk < K)[None, :]
        cell = row[:, None] * K + dk[None, :]
        key = tl.load(k + (row[:, None] * k_t + dk[None, :]), mask=mask, other=0.0)
        query = tl.load(q + (row[:, None] * q_t + dk[None, :]), mask=mask, other=0.0)
        decay = tl.load(g + (row[:, None] * g_t + dk[None, :]), mask=mask, other=0.0)
        key = key.to(tl.float32)
        query = query.to(tl.float32)
        queries += tl.sum(query * query, 1)
        keys += tl.sum(key * key, 1)
        # of the rounded decays, as the rows' are, or the last rows' factors would not be one
        total = tl.sum(decay.to(tl.float32), 0) * 0.5
        middle = tl.maximum(total, MILDEST * 0.5)
        tl.store(whole + dk, tl.exp2(middle), mask=dk < K)
        sums = tl.dot(from_middle, decay)
        mild = tl.min(total) >= MILDEST * 0.5
        if not mild:
            right = (row >= C // 2)[:, None]
            after = tl.sum(tl.where(right, decay.to(tl.float32), 0.0), 0) * 0.5
            before = total - after
            least = tl.minimum(least, tl.min(tl.minimum(before, after)) * 2)
            kk, qk = add_halves(kk, qk, key, query, sums, before, after, C, DTYPE, PRECISION)
        beyond = (total - middle)[None, :]
        far_key = (key * tl.exp2(beyond - sums)).to(DTYPE)
        near = tl.exp2(beyond + sums)
        near_key = (key * near).to(DTYPE)
        near_query = (query * near).to(DTYPE)
        if mild:
            turned = tl.trans(far_key)
            kk = tl.dot(near_key, turned, kk, input_precision=PRECISION)
            qk = tl.dot(near_query, turned, qk, input_precision=PRECISION)
        tl.store(k_write + cell, far_key, mask=mask)
        tl.store(k_read + cell, near_key, mask=mask)
        tl.store(q_read + cell, near_query, mask=mask)
    return kk, qk, queries, keys, least
