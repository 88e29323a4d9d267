"""Packed weights for a few rows: every column of the tensor cores' narrow side does other work.

A product with one vector would use one column of eight. Here the columns are parts of the sum:
slices of K, or a token's experts. Row r of a tile belongs to part r // BLOCK_N and only the column
of the same part counts; the parts are summed at the end. So a program has all its weights in
flight at once, and the down projection sums over the experts without atomics. A shared expert is
more rows of the up projection and one more sum, over slices of K, of the down projection.
"""

from __future__ import annotations

import triton
import triton.language as tl

from inductor_moe.kernels.dependent import wait_for_inputs
from inductor_moe.kernels.moe_activation import gated_activation_tile, shared_rows, up_rows
from inductor_moe.kernels.quant_dot import code_columns, packed_dot, whole_rows

COLUMNS = tl.constexpr(8)


@triton.jit
def parts_dot(
    w_rows,  # [ROWS] pointers: each row's first packed element, k_first included
    scale_rows,  # [ROWS] pointers: the scale of its first group
    zero_rows,
    x_columns,  # [COLUMNS] pointers: each column's first input, its slice included
    k_first,  # [ROWS] first input of the row's slice
    x_first,  # [COLUMNS] first input of the column's slice
    load_row,  # [ROWS]
    load_column,  # [COLUMNS]
    k_dim,
    k_slice,  # inputs of a slice, a multiple of BLOCK_K
    row_words,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    EVEN: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """[PARTS, BLOCK_N] fp32: the product of each row with the column of its part."""
    ROWS: tl.constexpr = PARTS * BLOCK_N
    WIDTH: tl.constexpr = 4 if BITS == 4 else 1
    STEP_WORDS: tl.constexpr = BLOCK_K // WIDTH
    word, first = code_columns(BITS, BLOCK_K)
    w_ptrs = w_rows[:, None] + word[None, :]
    x_ptrs = x_columns[None, :] + first[:, None]
    words_left = row_words - k_first // WIDTH
    acc = tl.zeros((ROWS, COLUMNS), tl.float32)
    no_sum = tl.zeros((COLUMNS,), tl.float32)
    total = no_sum
    for start in range(0, k_slice, BLOCK_K):
        step = start // BLOCK_K
        group = start // GROUP if GROUP != 0 else 0
        load_w = load_row[:, None] & (word[None, :] < words_left[:, None] - step * STEP_WORDS)
        # The scales of a slice past the end belong to no group.
        row_left = tl.where(load_row, k_dim - k_first - start, 0)
        left = tl.where(load_column, k_dim - x_first - start, 0)[None, :] - first[:, None]
        acc, x_sum = packed_dot(
            acc, no_sum, w_ptrs, x_ptrs, load_w, left, None,
            scale_rows + group, zero_rows + group, row_left, BITS, GROUP, HAS_ZEROS, EVEN,
        )  # fmt: skip
        if GROUP == 0 and HAS_ZEROS:
            total += x_sum
        w_ptrs += STEP_WORDS
        x_ptrs += BLOCK_K
    if GROUP == 0:
        acc = whole_rows(acc, total, scale_rows, zero_rows, load_row, BITS, HAS_ZEROS)
    part = tl.arange(0, ROWS) // BLOCK_N
    own = part[:, None] == tl.arange(0, COLUMNS)[None, :]
    return tl.reshape(tl.sum(tl.where(own, acc, 0.0), 1), (PARTS, BLOCK_N))


@triton.jit
def quantized_up_decode_kernel(
    x,  # [T, H], or [T * K, H] with x_repeat 1
    w,  # [E, N, row_words] packed
    scales,  # [E, N, groups]
    zeros,  # [E, N, groups], if HAS_ZEROS
    bias,  # [E, N], if HAS_BIAS
    ids,  # [T, K], if HAS_IDS, else every row takes expert 0
    gate_w,  # [shared_inner, row_words] packed, the shared expert's gate, if SHARED and gated
    gate_scales,
    gate_zeros,
    up_w,  # [shared_inner, row_words] packed, if SHARED
    up_scales,
    up_zeros,
    h,  # [T, K * I + shared_inner] contiguous, written; of skipped pairs the activation of zeros
    x_repeat,
    experts,
    k_dim,
    inner,
    shared_inner,
    rows_w,  # N
    row_words,
    groups,
    k_slice,
    stride_x,
    stride_be,
    stride_bn,
    stride_it,
    stride_ik,
    TOP_K: tl.constexpr,
    SHARED: tl.constexpr,  # slots of the shared expert, each of `inner` rows
    HAS_IDS: tl.constexpr,
    GATE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ALPHA: tl.constexpr,
    UP_OFFSET: tl.constexpr,
    LIMIT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    ALIGNED: tl.constexpr,  # rows of weights start at multiples of 16 bytes
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    EVEN: tl.constexpr,
    PARTS: tl.constexpr,  # slices of K
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    wait_for_inputs()
    pair = tl.program_id(0)
    block = tl.program_id(1)
    token = pair // (TOP_K + SHARED)
    slot = pair % (TOP_K + SHARED)
    routed = slot < TOP_K
    valid = True
    expert = tl.zeros((), tl.int64)
    if HAS_IDS:
        loaded = tl.load(ids + token * stride_it + slot * stride_ik, mask=routed, other=0)
        valid = (loaded >= 0) & (loaded < experts)
        expert = tl.where(valid, loaded, 0).to(tl.int64)

    WIDTH: tl.constexpr = 4 if BITS == 4 else 1
    r = tl.arange(0, PARTS * BLOCK_N)
    n, exists = up_rows_of(r % BLOCK_N, block, inner, GATE, BLOCK_N)
    # Whole steps, said so that loads have 16 bytes: an argument is known to divide by 16 alone.
    k_first = (r // BLOCK_N) * (k_slice // BLOCK_K) * BLOCK_K
    column = tl.arange(0, COLUMNS)
    x_first = tl.minimum(column, PARTS - 1) * k_slice
    row = expert * rows_w + n
    group = k_first // GROUP if GROUP != 0 else 0
    if SHARED:
        tl.static_assert(not HAS_BIAS)
        half, own = shared_rows(n, inner, (slot - TOP_K) * inner, GATE)
        exists = exists & (routed | (own < shared_inner))
        w = tl.where(routed, w, tl.where(half == 0, gate_w, up_w))
        scales = tl.where(routed, scales, tl.where(half == 0, gate_scales, up_scales))
        zeros = tl.where(routed, zeros, tl.where(half == 0, gate_zeros, up_zeros))
        row = tl.where(routed, row, own.to(tl.int64))
    w_rows = w + row * row_words + k_first // WIDTH
    if SHARED and ALIGNED:
        # Triton 3.8 and later forget it in a choice of pointers.
        w_rows = tl.multiple_of(w_rows, 16)
    product = parts_dot(
        w_rows, scales + row * groups + group,
        zeros + row * groups + group, x + (pair // x_repeat).to(tl.int64) * stride_x + x_first,
        k_first, x_first, exists & valid, column < PARTS, k_dim, k_slice, row_words,
        BITS, GROUP, HAS_ZEROS, EVEN, PARTS, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    # What was multiplied for a skipped pair may be anything.
    up = tl.where(valid, tl.sum(product, 0), 0.0)
    if HAS_BIAS:
        n_own, own_exists = up_rows(block, inner, GATE, "k", BLOCK_N)
        value = tl.load(
            bias + expert * stride_be + n_own * stride_bn, mask=own_exists & valid, other=0.0
        )
        up += value.to(tl.float32)
    out = gated_activation_tile(
        up[None, :], 1, BLOCK_N, GATE, "k", ACTIVATION, ALPHA, UP_OFFSET, LIMIT
    )
    OUT: tl.constexpr = BLOCK_N if GATE == "none" else BLOCK_N // 2
    i = block * OUT + tl.arange(0, OUT)
    row_h = TOP_K * inner + shared_inner
    place = slot * inner + i
    h_ptrs = h + token.to(tl.int64) * row_h + place
    stored = (i < inner) & (place < row_h)
    tl.store(h_ptrs[None, :], out.to(h.dtype.element_ty), mask=stored[None, :])


@triton.jit
def up_rows_of(r, block, inner, GATE: tl.constexpr, BLOCK_N: tl.constexpr):
    """`up_rows` of weights contiguous in H, for any positions r in [0, BLOCK_N)."""
    if GATE == "chunked":
        i = block * (BLOCK_N // 2) + r // 2
        n = i + (r % 2) * inner
        exists = i < inner
    elif GATE == "interleaved":
        n = block * BLOCK_N + r
        exists = n < 2 * inner
    else:
        n = block * BLOCK_N + r
        exists = n < inner
    return n, exists


@triton.jit
def quantized_down_decode_kernel(
    h,  # [T, K, I], then [T, shared_inner] from column K * I on, if SHARED
    w,  # [E, H, row_words] packed
    scales,  # [E, H, groups]
    zeros,  # [E, H, groups], if HAS_ZEROS
    bias,  # [E, H], if HAS_BIAS
    ids,  # [T, K]
    weights,  # [T, K], if HAS_WEIGHTS
    down_w,  # [H, shared_words] packed, the shared expert's, if SHARED
    down_scales,  # [H, shared_groups]
    down_zeros,
    logits,  # [T, 1], if HAS_LOGITS: the shared expert is scaled by their sigmoid
    y,  # [T, H] contiguous, written
    experts,
    k_dim,
    hidden,
    row_words,
    groups,
    k_slice,
    shared_inner,
    shared_words,
    shared_groups,
    shared_slice,
    stride_ht,
    stride_hk,
    stride_be,
    stride_bh,
    stride_it,
    stride_ik,
    stride_st,
    stride_sk,
    stride_lt,
    TOP_K: tl.constexpr,
    SHARED: tl.constexpr,
    SHARED_EVEN: tl.constexpr,
    HAS_LOGITS: tl.constexpr,
    SLOTS: tl.constexpr,  # of a turn, a power of two
    HAS_WEIGHTS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    EVEN: tl.constexpr,
    PARTS: tl.constexpr,  # SLOTS times slices of K
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SHARED_K: tl.constexpr,  # BLOCK_K of the shared expert
):
    wait_for_inputs()
    token = tl.program_id(0)
    n_first = tl.program_id(1) * BLOCK_N
    SPLIT: tl.constexpr = PARTS // SLOTS
    WIDTH: tl.constexpr = 4 if BITS == 4 else 1
    r = tl.arange(0, PARTS * BLOCK_N)
    part = tl.arange(0, PARTS)
    column = tl.minimum(tl.arange(0, COLUMNS), PARTS - 1)
    n = n_first + r % BLOCK_N
    n_own = n_first + tl.arange(0, BLOCK_N)
    k_first = ((r // BLOCK_N) % SPLIT) * (k_slice // BLOCK_K) * BLOCK_K
    x_first = (column % SPLIT) * k_slice
    group = k_first // GROUP if GROUP != 0 else 0
    id_row = ids + token * stride_it
    out = tl.zeros((BLOCK_N,), tl.float32)
    if SHARED:
        # One expert: every part is a slice of its inputs.
        own_first = (r // BLOCK_N) * (shared_slice // SHARED_K) * SHARED_K
        own_x = column * shared_slice
        own_group = own_first // GROUP if GROUP != 0 else 0
        row = n.to(tl.int64)
        product = parts_dot(
            down_w + row * shared_words + own_first // WIDTH,
            down_scales + row * shared_groups + own_group,
            down_zeros + row * shared_groups + own_group,
            h + token.to(tl.int64) * stride_ht + TOP_K * stride_hk + own_x,
            own_first, own_x, n < hidden, tl.arange(0, COLUMNS) < PARTS, shared_inner,
            shared_slice, shared_words,
            BITS, GROUP, HAS_ZEROS, SHARED_EVEN, PARTS, BLOCK_N, SHARED_K,
        )  # fmt: skip
        shared = tl.sum(product, 0)
        if HAS_LOGITS:
            shared *= tl.sigmoid(tl.load(logits + token * stride_lt).to(tl.float32))
        out += shared
    for turn in tl.static_range(0, TOP_K, SLOTS):
        slot = turn + (r // BLOCK_N) // SPLIT
        expert = tl.load(id_row + slot * stride_ik, mask=slot < TOP_K, other=-1)
        valid = (expert >= 0) & (expert < experts)
        row = tl.where(valid, expert, 0).to(tl.int64) * hidden + n
        x_slot = turn + column // SPLIT
        has_x = (tl.arange(0, COLUMNS) < PARTS) & (x_slot < TOP_K)
        x_offset = token.to(tl.int64) * stride_ht + tl.minimum(x_slot, TOP_K - 1) * stride_hk
        product = parts_dot(
            w + row * row_words + k_first // WIDTH, scales + row * groups + group,
            zeros + row * groups + group, h + x_offset + x_first,
            k_first, x_first, (n < hidden) & valid, has_x, k_dim, k_slice, row_words,
            BITS, GROUP, HAS_ZEROS, EVEN, PARTS, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        part_slot = turn + part // SPLIT
        in_range = part_slot < TOP_K
        part_expert = tl.load(id_row + part_slot * stride_ik, mask=in_range, other=-1)
        known = (part_expert >= 0) & (part_expert < experts)
        if HAS_BIAS:
            place = part_expert.to(tl.int64)[:, None] * stride_be + n_own[None, :] * stride_bh
            first = (part % SPLIT == 0) & known
            has_bias = first[:, None] & (n_own < hidden)[None, :]
            product += tl.load(bias + place, mask=has_bias, other=0.0).to(tl.float32)
        if HAS_WEIGHTS:
            scale_ptrs = weights + token * stride_st + part_slot * stride_sk
            scale = tl.load(scale_ptrs, mask=known, other=0.0).to(tl.float32)
            product *= scale[:, None]
        out += tl.sum(tl.where(known[:, None], product, 0.0), 0)
    y_ptrs = y + token.to(tl.int64) * hidden + n_own
    tl.store(y_ptrs, out.to(y.dtype.element_ty), mask=n_own < hidden)
