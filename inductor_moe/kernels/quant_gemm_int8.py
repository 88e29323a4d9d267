"""GEMMs on 4-bit weights and activations rounded to int8 per token and group (W4A8)."""

from __future__ import annotations

import triton
import triton.language as tl

from inductor_moe.kernels.dependent import wait_for_inputs
from inductor_moe.kernels.moe_activation import up_rows
from inductor_moe.kernels.quant_gemm import store_pairs, tile_of

# A byte holds two codes. With its top bit flipped and nothing below it, a nibble in the upper
# half is 16 (n - 8) as int8, exactly: an and-xor for four codes, and a shift for the lower ones.
LOW_CODES = tl.constexpr(
    "{ .reg .b32 t; shl.b32 t, $1, 4; lop3.b32 $0, t, 0xF0F0F0F0, 0x80808080, 0x6A; }"
)
HIGH_CODES = tl.constexpr("{ lop3.b32 $0, $1, 0xF0F0F0F0, 0x80808080, 0x6A; }")
NO_CODES = tl.constexpr(-120)  # 0x88: both nibbles 8, both values 0


@triton.jit
def byte_codes(pairs, CODES: tl.constexpr):
    """[ROWS, B] int8 of two codes each -> 16 (code - 8) of the lower or upper one, int8"""
    return tl.inline_asm_elementwise(CODES, "=r,r", [pairs], dtype=tl.int8, is_pure=True, pack=4)


@triton.jit(do_not_specialize=["rows"])
def quantize_activations_kernel(
    x,  # [M, K_DIM]
    out,  # [M, width] int8, written; the inputs in the order in which the GEMM meets their codes
    scales,  # [M, groups] fp32, written: the largest of a group over 127
    sums,  # [M, groups] fp32, written: the int8 values of a group summed
    rows,
    k_dim,
    width,
    groups,
    stride_x,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,  # GROUP, 64 at least
):
    wait_for_inputs()
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    exists = m < rows
    row = m.to(tl.int64)
    place = tl.arange(0, BLOCK_K)
    byte = place % 32
    # Bytes of a chunk of 64 codes alternate between codes 0..31 and 32..63; lower nibbles first.
    k = (place // 64) * 64 + ((place % 64) // 32) * 16 + (byte % 2) * 32 + byte // 2
    start = tl.program_id(1) * BLOCK_K
    load = exists[:, None] & (start + k < k_dim)[None, :]
    value = tl.load(x + row[:, None] * stride_x + (start + k)[None, :], mask=load, other=0.0)
    value = value.to(tl.float32)
    size = tl.abs(value)
    over = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    for part in tl.static_range(BLOCK_K // GROUP):
        own = (k // GROUP == part)[None, :]
        largest = tl.max(tl.where(own, size, 0.0), 1)
        # The maximum passes over a NaN, which must reach the output.
        bad = tl.max(tl.where(own & (value != value), 1, 0), 1)
        divisor = tl.where(largest > 0, largest, float("inf"))
        over = tl.where(own, divisor[:, None], over)
        scale = tl.where(bad > 0, float("nan"), largest / 127.0)
        group = tl.program_id(1) * (BLOCK_K // GROUP) + part
        tl.store(scales + row * groups + group, scale, mask=exists)
    # The product is exact and the quotient rounded, so that a tie is one. Adding 1.5 * 2^23 leaves
    # no bits below one: it rounds to nearest, ties to even.
    code = (tl.div_rn(value * 127.0, over) + 12582912.0) - 12582912.0
    tl.store(
        out + row[:, None] * width + (start + place)[None, :],
        code.to(tl.int8),
        mask=exists[:, None],
    )
    for part in tl.static_range(BLOCK_K // GROUP):
        total = tl.sum(tl.where((k // GROUP == part)[None, :], code, 0.0), 1)
        group = tl.program_id(1) * (BLOCK_K // GROUP) + part
        tl.store(sums + row * groups + group, total, mask=exists)


@triton.jit
def int8_gemm_tile(
    a,  # [., width] int8
    a_scales,  # [., a_groups] fp32
    a_sums,
    w,  # [N, row_words] packed, of one expert
    scales,  # [N, groups]
    zeros,
    a_row,  # [BLOCK_M] int64, rows of a
    load_a,  # [BLOCK_M] those that exist, zeros in the place of others
    n,  # [BLOCK_N] rows of w
    exists,  # [BLOCK_N]
    k_dim,
    row_words,
    groups,
    width,
    a_groups,
    GROUP: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,  # GROUP, 64 at least
):
    """[BLOCK_N, BLOCK_M] fp32: W[n] @ (a_scales * a)[a_row].T, exact sums within a group"""
    byte = tl.arange(0, BLOCK_K // 2)
    first = (byte // 32) * 64 + byte % 32
    n_offset = n.to(tl.int64)
    w_bytes = w.to(tl.pointer_type(tl.int8), bitcast=True)
    w_ptrs = w_bytes + n_offset[:, None] * (2 * row_words) + byte[None, :]
    x_ptrs = a + a_row[None, :] * width + first[:, None]
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for start in range(0, k_dim, BLOCK_K):
        if EVEN:
            pairs = tl.load(w_ptrs)
        else:
            in_row = byte < 2 * row_words - start // 2
            pairs = tl.load(w_ptrs, mask=exists[:, None] & in_row[None, :], other=0)
        low = tl.load(x_ptrs, mask=load_a[None, :], other=0)
        high = tl.load(x_ptrs + 32, mask=load_a[None, :], other=0)
        for part in tl.static_range(BLOCK_K // GROUP):
            own = pairs
            if GROUP == 32:
                # The tensor cores take 32 inputs at once, of one group only.
                own = tl.where((byte % 2 == part)[None, :], pairs, NO_CODES)
            product = tl.dot(byte_codes(own, LOW_CODES), low, out_dtype=tl.int32)
            product = tl.dot(byte_codes(own, HIGH_CODES), high, product, out_dtype=tl.int32)
            group = start // GROUP + part
            load = exists if EVEN else exists & (start + part * GROUP < k_dim)
            scale = tl.load(scales + n_offset * groups + group, mask=load, other=0.0)
            x_scale = tl.load(a_scales + a_row * a_groups + group, mask=load_a, other=0.0)
            value = product.to(tl.float32)
            if HAS_ZEROS:
                zero = tl.load(zeros + n_offset * groups + group, mask=load, other=8.0)
                x_sum = tl.load(a_sums + a_row * a_groups + group, mask=load_a, other=0.0)
                value -= (16.0 * (zero.to(tl.float32) - 8.0))[:, None] * x_sum[None, :]
            acc += scale.to(tl.float32)[:, None] * (x_scale[None, :] * value)
        w_ptrs += BLOCK_K // 2
        x_ptrs += BLOCK_K
    return acc * 0.0625


@triton.jit(do_not_specialize=["capacity", "group_m"])
def moe_int8_gemm_kernel(
    a,  # [T, width] gathered by pair // a_repeat, or [S, width] in sorted order if A_SORTED
    a_scales,  # [T or S, a_groups] fp32
    a_sums,  # [T or S, a_groups] fp32
    w,  # [E, N, row_words] packed, 4 bits
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
    width,
    a_groups,
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
        acc = int8_gemm_tile(
            a, a_scales, a_sums, w + e * rows_w * row_words, scales + e * rows_w * groups,
            zeros + e * rows_w * groups, a_row.to(tl.int64), in_block, n, exists,
            k_dim, row_words, groups, width, a_groups,
            GROUP, HAS_ZEROS, EVEN, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        store_pairs(
            acc, bias + e * stride_be, routing, row if OUT_SORTED else pair, out,
            n, exists, n_block, rows, inner, stride_bn,
            GATE, ACTIVATION, ALPHA, UP_OFFSET, LIMIT, HAS_BIAS, HAS_WEIGHTS, BLOCK_M, BLOCK_N,
        )  # fmt: skip


@triton.jit(do_not_specialize=["tokens"])
def int8_linear_kernel(
    x,  # [M, width] int8
    x_scales,  # [M, x_groups] fp32
    x_sums,  # [M, x_groups] fp32
    w,  # [N, row_words] packed, 4 bits
    scales,  # [N, groups]
    zeros,  # [N, groups], if HAS_ZEROS
    bias,  # [N], if HAS_BIAS
    out,  # [M, N] contiguous, written
    tokens,
    n_dim,
    k_dim,
    row_words,
    groups,
    width,
    x_groups,
    stride_b,
    HAS_BIAS: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
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
    acc = int8_gemm_tile(
        x, x_scales, x_sums, w, scales, zeros, m.to(tl.int64), m < tokens, row, exists,
        k_dim, row_words, groups, width, x_groups,
        GROUP, HAS_ZEROS, EVEN, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    if HAS_BIAS:
        acc += tl.load(bias + n * stride_b, mask=exists, other=0.0).to(tl.float32)[:, None]
    out_ptrs = out + m.to(tl.int64)[:, None] * n_dim + n[None, :]
    keep = (m < tokens)[:, None] & exists[None, :]
    tl.store(out_ptrs, tl.trans(acc).to(out.dtype.element_ty), mask=keep)
