"""The chunked delta rule with a decay per key channel (KDA).

exp(G_i - G_j) factors into a row and a column part only around a border between i and j, or the
parts may overflow. So the pairs of a chunk are taken by the size s of the aligned blocks that
separate them: i in a right, j in a left block of size s. Then exp(sum of g from the border to i)
and exp(sum from j to the border) are at most one, and each s is one masked product. In bf16, with
fp32's range, one product is enough for a chunk that decays to no less than 2**-224 in any channel,
as those of trained models mostly do.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from inductor_moe.kernels.delta_chunk import (
    binary_decay,
    chunk_bounds,
    corners,
    scan_tile,
    short_solve,
    unit_lower_inverse,
)
from inductor_moe.kernels.delta_launch import (
    CHUNK,
    LEVELS,
    Tile,
    inner_contiguous,
    limits,
    padded,
    strides,
    traced,
)
from inductor_moe.kernels.dependent import wait_for_inputs


@triton.jit
def row_sums(q, k, g, inside, K: tl.constexpr, BLOCK_K: tl.constexpr, C: tl.constexpr):
    """Sums over K of q * q, k * k and q * k, and the smallest whole decay of any channel.

    q, k and g [C, 1] point to rows.
    """
    queries = tl.zeros([C], tl.float32)
    keys = tl.zeros([C], tl.float32)
    both = tl.zeros([C], tl.float32)
    least = 0.0
    for block in range(0, K, BLOCK_K):
        dk = block + tl.arange(0, BLOCK_K)
        mask = inside[:, None] & (dk < K)[None, :]
        key = tl.load(k + dk[None, :], mask=mask, other=0.0).to(tl.float32)
        query = tl.load(q + dk[None, :], mask=mask, other=0.0).to(tl.float32)
        decay = binary_decay(tl.load(g + dk[None, :], mask=mask, other=0.0))
        queries += tl.sum(query * query, 1)
        keys += tl.sum(key * key, 1)
        both += tl.sum(query * key, 1)
        least = tl.minimum(least, tl.min(tl.sum(decay, 0)))
    return queries, keys, both, least


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
    q, k, g, q_read, k_read, k_write, whole, inside, query_scale, key_scale, levels,
    K: tl.constexpr, BLOCK_K: tl.constexpr, C: tl.constexpr,
    EXACT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Any decays: stores the decayed rows; returns k k^T and q k^T with decay, [C, C]."""
    row = tl.arange(0, C)
    kk = tl.zeros([C, C], tl.float32)
    qk = tl.zeros([C, C], tl.float32)
    for block in range(0, K, BLOCK_K):
        dk = block + tl.arange(0, BLOCK_K)
        mask = inside[:, None] & (dk < K)[None, :]
        key = tl.load(k + dk[None, :], mask=mask, other=0.0)
        query = tl.load(q + dk[None, :], mask=mask, other=0.0)
        decay = binary_decay(tl.load(g + dk[None, :], mask=mask, other=0.0))
        for level in range(levels):
            kk, qk = add_pairs(kk, qk, key, query, decay, level, C, EXACT, PRECISION)

    # a second pass: the rows' own factors beside the pairs' products would not fit the registers
    for block in range(0, K, BLOCK_K):
        dk = block + tl.arange(0, BLOCK_K)
        mask = inside[:, None] & (dk < K)[None, :]
        cell = row[:, None] * K + dk[None, :]
        decay = binary_decay(tl.load(g + dk[None, :], mask=mask, other=0.0))
        key = tl.load(k + dk[None, :], mask=mask, other=0.0).to(tl.float32) * key_scale[:, None]
        near = tl.exp2(sums_over(row_ranges(row + 1, C - 1 - row, C), decay, EXACT))
        tl.store(k_write + cell, (key * near).to(k_write.dtype.element_ty), mask=mask)
        near = tl.exp2(sums_over(row_ranges(row * 0, row + 1, C), decay, EXACT))
        tl.store(k_read + cell, (key * near).to(k_write.dtype.element_ty), mask=mask)
        query = tl.load(q + dk[None, :], mask=mask, other=0.0).to(tl.float32)
        query *= query_scale[:, None]
        tl.store(q_read + cell, (query * near).to(k_write.dtype.element_ty), mask=mask)
        tl.store(whole + dk, tl.exp2(tl.sum(decay, 0)), mask=dk < K)
    return (
        kk * key_scale[:, None] * key_scale[None, :],
        qk * query_scale[:, None] * key_scale[None, :],
    )


@triton.jit
def mild_decays(
    q, k, g, q_read, k_read, k_write, whole, inside, query_scale, key_scale,
    K: tl.constexpr, BLOCK_K: tl.constexpr, C: tl.constexpr,
    EXACT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """As strong_decays, if no channel decays below 2**-224; means nothing above the diagonal."""
    DTYPE: tl.constexpr = q_read.dtype.element_ty
    row = tl.arange(0, C)
    kk = tl.zeros([C, C], tl.float32)
    qk = tl.zeros([C, C], tl.float32)
    for block in range(0, K, BLOCK_K):
        dk = block + tl.arange(0, BLOCK_K)
        mask = inside[:, None] & (dk < K)[None, :]
        cell = row[:, None] * K + dk[None, :]
        key = tl.load(k + dk[None, :], mask=mask, other=0.0)
        query = tl.load(q + dk[None, :], mask=mask, other=0.0)
        decay = binary_decay(tl.load(g + dk[None, :], mask=mask, other=0.0))
        tl.store(whole + dk, tl.exp2(tl.sum(decay, 0)), mask=dk < K)
        # Around half of each channel's decay, all factors stay in 2**-112 to 2**112. It is half of
        # what the sums add up, rounded too, or k_write would have the rounding of all decays.
        half = (tl.sum(decay.to(tl.float16).to(tl.float32), 0) * 0.5)[None, :]
        middle = tl.exp2(half)
        sums = sums_over(row_ranges(row * 0, row + 1, C), decay, EXACT) - half
        near = tl.exp2(sums)
        far_key = key.to(tl.float32) * (tl.exp2(-sums) * key_scale[:, None])
        near_key = key.to(tl.float32) * (near * key_scale[:, None])
        near_query = query.to(tl.float32) * (near * query_scale[:, None])
        turned = tl.trans(far_key.to(DTYPE))
        kk = tl.dot(near_key.to(DTYPE), turned, kk, input_precision=PRECISION)
        qk = tl.dot(near_query.to(DTYPE), turned, qk, input_precision=PRECISION)
        tl.store(k_write + cell, (far_key * middle).to(DTYPE), mask=mask)
        tl.store(k_read + cell, (near_key * middle).to(DTYPE), mask=mask)
        tl.store(q_read + cell, (near_query * middle).to(DTYPE), mask=mask)
    return kk, qk


@triton.jit
def delta_channel_intra_kernel(
    q, k,                   # [B, T, H, K]
    g, beta,                # [B, T, HV, K], [B, T, HV]
    solve,                  # [B, HV, T, 2, C]: (I + A)^-1 beta; SCALE * causal q k^T times that
    q_read, k_read, k_write,  # [B, HV, T, K]: q, k decayed from the start, k to the end
    whole,                  # [B, HV, slots, K] fp32: decay of the whole chunk
    cu_seqlens,             # [N + 1] with VARLEN
    levels, sequences, tokens, slots, value_heads,
    SCALE: tl.constexpr, EPS: tl.constexpr,
    q_b, q_t, q_h, k_b, k_t, k_h, g_b, g_t, g_h, beta_b, beta_t, beta_h,
    GROUP: tl.constexpr, K: tl.constexpr, BLOCK_K: tl.constexpr, C: tl.constexpr,
    NORMALIZE: tl.constexpr, VARLEN: tl.constexpr, WIDE_RANGE: tl.constexpr,
    SHORT_SOLVE: tl.constexpr, EXACT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """WIDE_RANGE needs operands with fp32's range. SHORT_SOLVE as in `delta_chunk`."""
    wait_for_inputs()
    head = tl.program_id(0)
    slot = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    first, end, _ = chunk_bounds(slot, cu_seqlens, sequences, tokens, C, VARLEN)
    if first >= end:
        return
    DTYPE: tl.constexpr = q.dtype.element_ty
    row = tl.arange(0, C)
    inside = row < end - first
    q += batch * q_b + (head // GROUP) * q_h + first * q_t + row[:, None] * q_t
    k += batch * k_b + (head // GROUP) * k_h + first * k_t + row[:, None] * k_t
    g += batch * g_b + head * g_h + first * g_t + row[:, None] * g_t
    plane = batch * value_heads + head
    q_read += (plane * tokens + first) * K
    k_read += (plane * tokens + first) * K
    k_write += (plane * tokens + first) * K
    whole += (plane * slots + slot) * K
    query_scale, key_scale, diagonal, least = row_sums(q, k, g, inside, K, BLOCK_K, C)
    if NORMALIZE:
        key_scale = tl.rsqrt(key_scale + EPS)
        query_scale = tl.rsqrt(query_scale + EPS) * SCALE
    else:
        key_scale = tl.full([C], 1.0, tl.float32)
        query_scale = key_scale * SCALE
    # beside the one product, the levels' would not fit the registers
    NARROW: tl.constexpr = BLOCK_K // 2 if WIDE_RANGE and BLOCK_K > 16 else BLOCK_K
    if WIDE_RANGE and least >= -224.0:
        kk, qk = mild_decays(
            q, k, g, q_read, k_read, k_write, whole, inside, query_scale, key_scale,
            K, BLOCK_K, C, EXACT, PRECISION,
        )  # fmt: skip
    else:
        kk, qk = strong_decays(
            q, k, g, q_read, k_read, k_write, whole, inside, query_scale, key_scale, levels,
            K, NARROW, C, EXACT, PRECISION,
        )  # fmt: skip

    beta += batch * beta_b + head * beta_h + first * beta_t
    strength = tl.load(beta + row * beta_t, mask=inside, other=0.0).to(tl.float32)
    below = row[:, None] > row[None, :]
    a = tl.where(below, kk * strength[:, None], 0.0).to(tl.float16 if SHORT_SOLVE else tl.float32)
    diagonal *= key_scale * query_scale
    scores = tl.where(row[:, None] == row[None, :], diagonal[:, None], tl.where(below, qk, 0.0))
    inverse = (unit_lower_inverse(a, levels, C, PRECISION) * strength[None, :]).to(DTYPE)
    solve += (plane * tokens + first) * (2 * C) + row[:, None] * (2 * C) + row[None, :]
    tl.store(solve, inverse, mask=inside[:, None])
    product = tl.dot(scores.to(DTYPE), inverse, input_precision=PRECISION)
    tl.store(solve + C, product.to(DTYPE), mask=inside[:, None])


@triton.jit
def delta_channel_scan_kernel(
    q_read, k_read, k_write,  # [B, HV, T, K]
    v, o,                   # [B, T, HV, V]
    solve,                  # [B, HV, T, 2, C]
    whole,                  # [B, HV, slots, K] fp32
    state, final,           # [N, HV, K, V]; state absent without HAS_STATE
    cu_seqlens,             # [N + 1] with VARLEN
    tokens, slots, value_heads,
    v_b, v_t, v_h, o_b, o_t, o_h,
    state_b, state_h, state_k, final_b, final_h, final_k,
    K: tl.constexpr, V: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, C: tl.constexpr,
    HAS_STATE: tl.constexpr, VARLEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    wait_for_inputs()
    head = tl.program_id(1)
    sequence = tl.program_id(2).to(tl.int64)
    dk = tl.arange(0, BLOCK_K)
    dv = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)
    row = tl.arange(0, C)
    in_k = dk < K
    in_v = dv < V
    batch = sequence
    start = tl.full([], 0, tl.int64)
    end = start + tokens
    slot = start
    if VARLEN:
        batch = start
        start = tl.load(cu_seqlens + sequence).to(tl.int64)
        end = tl.load(cu_seqlens + sequence + 1).to(tl.int64)
        slot = start // C + sequence

    current = tl.zeros([BLOCK_K, BLOCK_V], tl.float32)
    in_state = in_k[:, None] & in_v[None, :]
    if HAS_STATE:
        at = sequence * state_b + head * state_h + dk[:, None] * state_k + dv[None, :]
        current = tl.load(state + at, mask=in_state, other=0.0).to(tl.float32)
    v += batch * v_b + head * v_h + start * v_t
    o += batch * o_b + head * o_h + start * o_t
    plane = batch * value_heads + head
    q_read += (plane * tokens + start) * K
    k_read += (plane * tokens + start) * K
    k_write += (plane * tokens + start) * K
    solve += (plane * tokens + start) * (2 * C)
    whole += (plane * slots + slot) * K
    key_cell = row[:, None] * K + dk[None, :]
    value_cell = row[:, None] * v_t + dv[None, :]
    out_cell = row[:, None] * o_t + dv[None, :]
    # both matrices of a chunk, one below the other, are one operand
    twice = tl.arange(0, 2 * C)
    solve_cell = (twice % C * 2 + twice // C)[:, None] * C + row[None, :]
    DTYPE: tl.constexpr = v.dtype.element_ty
    length = end - start
    # A load that no product takes whole is not pipelined: a chunk ahead, it hides its latency.
    decay = tl.load(whole + dk, mask=in_k & (length > 0), other=0.0)
    for first in range(0, length, C):
        inside = row < length - first
        in_key = inside[:, None] & in_k[None, :]
        in_value = inside[:, None] & in_v[None, :]
        in_solve = (twice % C < length - first)[:, None]
        key = tl.load(k_read + first * K + key_cell, mask=in_key, other=0.0)
        query = tl.load(q_read + first * K + key_cell, mask=in_key, other=0.0)
        writer = tl.load(k_write + first * K + key_cell, mask=in_key, other=0.0)
        value = tl.load(v + first * v_t + value_cell, mask=in_value, other=0.0)
        both = tl.load(solve + first * (2 * C) + solve_cell, mask=in_solve, other=0.0)
        after = first + C
        next_decay = tl.load(whole + after // C * K + dk, mask=in_k & (after < length), other=0.0)

        narrow = current.to(DTYPE)
        read = tl.dot(key, narrow, input_precision=PRECISION)
        out = tl.dot(query, narrow, input_precision=PRECISION)
        rest = (value.to(tl.float32) - read).to(DTYPE)
        both = tl.dot(both, rest, input_precision=PRECISION)
        both = tl.permute(tl.reshape(both, (2, C, BLOCK_V)), (1, 2, 0))
        delta, added = tl.split(both)
        current = tl.dot(
            tl.trans(writer), delta.to(DTYPE), current * decay[:, None], input_precision=PRECISION
        )
        tl.store(o + first * o_t + out_cell, (out + added).to(DTYPE), mask=in_value)
        decay = next_decay
    at = sequence * final_b + head * final_h + dk[:, None] * final_k + dv[None, :]
    tl.store(final + at, current.to(final.dtype.element_ty), mask=in_state)


def channel_intra_tile(key_width: int, dtype: torch.dtype, device: torch.device) -> Tile:
    block_k = 16 if dtype.itemsize > 2 else 64 if limits(device).capability >= 90 else 32
    return Tile(min(padded(key_width), block_k), 0, 8)


def delta_rule_chunk_channel(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    state: Tensor | None,
    scale: float,
    l2norm_eps: float | None,
    cu_seqlens: Tensor | None = None,
    intra: Tile | None = None,
    scan: Tile | None = None,
) -> tuple[Tensor, Tensor]:
    """`inductor_moe::delta_rule` for g [B, T, HV, K], in two launches.

    Call `kernels.delta_rule.delta_rule_padded`: this expects vector-loadable rows and K <= 128.
    """
    q, k, v, g = inner_contiguous(q), inner_contiguous(k), inner_contiguous(v), inner_contiguous(g)
    state = None if state is None else inner_contiguous(state)
    batch, tokens, heads, key_width = q.shape
    value_heads, value_width = v.shape[2:]
    varlen = cu_seqlens is not None
    sequences = cu_seqlens.shape[0] - 1 if cu_seqlens is not None else batch
    slots = tokens // CHUNK + sequences if varlen else (tokens + CHUNK - 1) // CHUNK
    solve = q.new_empty((batch, value_heads, tokens, 2, CHUNK))
    q_read = q.new_empty((batch, value_heads, tokens, key_width))
    k_read = q.new_empty((batch, value_heads, tokens, key_width))
    k_write = q.new_empty((batch, value_heads, tokens, key_width))
    # flat: a dim that may be one would put a guard on the number of chunks
    whole = torch.empty(
        (batch * value_heads * slots * key_width,), dtype=torch.float32, device=q.device
    )
    out = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    final = torch.empty(
        (sequences, value_heads, key_width, value_width),
        dtype=torch.float32 if state is None else state.dtype,
        device=v.device,
    )
    precision = "tf32x3" if q.dtype == torch.float32 else "tf32"
    tile = intra or channel_intra_tile(key_width, q.dtype, q.device)
    traced(delta_channel_intra_kernel)[(value_heads, slots, batch)](
        q, k, g, beta, solve, q_read, k_read, k_write, whole, cu_seqlens,
        LEVELS, sequences, tokens, slots, value_heads, scale, l2norm_eps or 0.0,
        *strides(q, 3), *strides(k, 3), *strides(g, 3), *strides(beta, 3),
        GROUP=value_heads // heads, K=key_width, BLOCK_K=tile.key, C=CHUNK,
        NORMALIZE=l2norm_eps is not None, VARLEN=varlen, WIDE_RANGE=q.dtype == torch.bfloat16,
        SHORT_SOLVE=short_solve(q.dtype, l2norm_eps), EXACT=q.dtype == torch.float32,
        PRECISION=precision,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    tile = scan or scan_tile(key_width, value_width, q.dtype, q.device, keys=3)
    grid = (triton.cdiv(value_width, tile.value), value_heads, sequences)
    traced(delta_channel_scan_kernel)[grid](
        q_read, k_read, k_write, v, out, solve, whole, state, final, cu_seqlens,
        tokens, slots, value_heads,
        *strides(v, 3), *strides(out, 3), *strides(state, 3), *strides(final, 3),
        K=key_width, V=value_width, BLOCK_K=tile.key, BLOCK_V=tile.value, C=CHUNK,
        HAS_STATE=state is not None, VARLEN=varlen, PRECISION=precision,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return out, final
