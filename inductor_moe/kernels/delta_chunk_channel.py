"""The chunked delta rule with a decay per key channel (KDA).

As in `delta_chunk`, but with rows decayed channel by channel: the first kernel stores them as
operands, for the second, serial one to multiply with the state. Where their range allows, they are
decayed from and to the middle of what each channel of the chunk decays by, as the first kernel's
own products take them, and the state is decayed to the middle before a chunk and from it after.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from inductor_moe.kernels.delta_channel_pairs import MILDEST, mild_decays, strong_decays
from inductor_moe.kernels.delta_chunk import HELD, scan_tile, short_solve
from inductor_moe.kernels.delta_inverse import unit_lower_inverse
from inductor_moe.kernels.delta_launch import (
    CHUNK,
    LEVELS,
    Tile,
    binary_decay,
    inner_contiguous,
    limits,
    padded,
    strides,
    traced,
)
from inductor_moe.kernels.delta_rows import (
    chunk_bounds,
    load_factors,
    sequence_bounds,
)
from inductor_moe.kernels.delta_scan_transposed import delta_scan_transposed_kernel
from inductor_moe.kernels.dependent import wait_for_inputs

CHUNK_TIMES = {32: 1.59, 64: 2.96, 128: 4.06}  # as in `delta_chunk`


@triton.jit
def lower_blocks(C: tl.constexpr):
    """[C, C]: in a block of 16, as wide as a sector of memory, on or below the diagonal."""
    block = tl.arange(0, C) // 16
    return block[:, None] >= block[None, :]


@triton.jit
def delta_channel_intra_kernel(
    q, k,                   # [B, T, H, K]
    g, beta,                # [B, T, HV, K], log2 decays, fp16 unless EXACT; [B, T, HV]
    solve,                  # [B, HV, T, 2, C]: (I + A)^-1 beta; SCALE * causal q k^T times that
    q_read, k_read, k_write,  # [B, HV, T, K]: q, k decayed from the start, k to the end
    whole,                  # [B, HV, slots, K] fp32: decay of the whole chunk
    rows,                   # [2, B, HV, T] fp32: factors that k and q still need, q's with SCALE
    least,                  # [B, HV, slots] fp32: least log2 decay of half a chunk in a channel
    cu_seqlens,             # [N + 1] with VARLEN
    levels, sequences, tokens, slots, value_heads, rows_kind,
    SCALE: tl.constexpr, EPS: tl.constexpr,
    q_b, q_t, q_h, k_b, k_t, k_h, g_b, g_t, g_h, beta_b, beta_t, beta_h,
    GROUP: tl.constexpr, K: tl.constexpr, BLOCK_K: tl.constexpr, C: tl.constexpr,
    NORMALIZE: tl.constexpr, VARLEN: tl.constexpr, WIDE_RANGE: tl.constexpr, STRONG: tl.constexpr,
    SHORT_SOLVE: tl.constexpr, EXACT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """WIDE_RANGE, for operands with fp32's range, decays from and to the chunk's middle.

    whole then holds the root of the decay. Of solve, blocks of 16 above the diagonal are not set;
    its first matrix has k's factor of the row that is written. Without STRONG, which is only for
    WIDE_RANGE, chunks with a least decay below MILDEST come out wrong, and a launch with STRONG
    does those again: both ways in one kernel would not fit the registers. SHORT_SOLVE as in
    `delta_chunk`.
    """
    wait_for_inputs()
    head = tl.program_id(0)
    slot = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    first, end, _ = chunk_bounds(slot, cu_seqlens, sequences, tokens, C, VARLEN)
    plane = batch * value_heads + head
    least += plane * slots + slot
    skip = first >= end
    if STRONG and WIDE_RANGE:
        skip |= tl.load(least) >= MILDEST
    if skip:
        return
    DTYPE: tl.constexpr = q.dtype.element_ty
    row = tl.arange(0, C)
    inside = row < end - first
    q += batch * q_b + (head // GROUP) * q_h + first * q_t
    k += batch * k_b + (head // GROUP) * k_h + first * k_t
    g += batch * g_b + head * g_h + first * g_t
    q_read += (plane * tokens + first) * K
    k_read += (plane * tokens + first) * K
    k_write += (plane * tokens + first) * K
    whole += (plane * slots + slot) * K
    if STRONG:
        kk, qk, query_scale, key_scale = strong_decays(
            q, k, g, q_t, k_t, g_t, q_read, k_read, k_write, whole, inside, levels,
            K, BLOCK_K, C, WIDE_RANGE, EXACT, PRECISION,
        )  # fmt: skip
    else:
        kk, qk, query_scale, key_scale, strongest = mild_decays(
            q, k, g, q_t, k_t, g_t, q_read, k_read, k_write, whole, inside,
            K, BLOCK_K, C, PRECISION,
        )  # fmt: skip
        tl.store(least, strongest)
    if NORMALIZE:
        key_scale = tl.rsqrt(key_scale + EPS)
        query_scale = tl.rsqrt(query_scale + EPS) * SCALE
    else:
        key_scale = tl.full([C], 1.0, tl.float32)
        query_scale = key_scale * SCALE

    beta += batch * beta_b + head * beta_h + first * beta_t
    strength = tl.load(beta + row * beta_t, mask=inside, other=0.0).to(tl.float32)
    rows += plane * tokens + first + row
    tl.store(rows, key_scale, mask=inside)
    tl.store(rows + tl.cast(rows_kind, tl.int64), query_scale, mask=inside)
    # (I + beta L)^-1 beta = beta (I + L beta)^-1: L and q k^T share the factors of the columns
    strength *= key_scale
    a = kk * key_scale[:, None] * strength[None, :]
    a = tl.where(row[:, None] > row[None, :], -a, 0.0)
    a = a.to(tl.float16 if SHORT_SOLVE else tl.float32)
    scores = qk * query_scale[:, None] * strength[None, :]
    scores = tl.where(row[:, None] >= row[None, :], scores, 0.0).to(DTYPE)
    inverse = unit_lower_inverse(a, levels, C, PRECISION)
    solve += (plane * tokens + first) * (2 * C) + row[:, None] * (2 * C) + row[None, :]
    lower = inside[:, None] & lower_blocks(C)
    product = tl.dot(scores, inverse.to(DTYPE), input_precision=PRECISION)
    tl.store(solve, (inverse * strength[:, None]).to(DTYPE), mask=lower)
    tl.store(solve + C, product.to(DTYPE), mask=lower)


@triton.jit
def delta_channel_scan_kernel(
    q_read, k_read, k_write,  # [B, HV, T, K]
    v, o,                   # [B, T, HV, V]
    solve,                  # [B, HV, T, 2, C]
    whole,                  # [B, HV, slots, K] fp32
    rows,                   # [2, B, HV, T] fp32
    state, final,           # [N, HV, K, V]; state absent without HAS_STATE
    cu_seqlens,             # [N + 1] with VARLEN
    tokens, slots, value_heads, rows_kind,
    v_b, v_t, v_h, o_b, o_t, o_h,
    state_b, state_h, state_k, final_b, final_h, final_k,
    K: tl.constexpr, V: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, C: tl.constexpr,
    HAS_STATE: tl.constexpr, VARLEN: tl.constexpr, WIDE_RANGE: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    wait_for_inputs()
    head = tl.program_id(1)
    sequence = tl.program_id(2).to(tl.int64)
    dk = tl.arange(0, BLOCK_K)
    dv = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)
    row = tl.arange(0, C)
    in_k = dk < K
    in_v = dv < V
    batch, start, end, slot = sequence_bounds(sequence, cu_seqlens, tokens, C, VARLEN)

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
    solve_cell = row[:, None] * (2 * C) + row[None, :]
    lower = lower_blocks(C)
    DTYPE: tl.constexpr = v.dtype.element_ty
    length = end - start
    rows += plane * tokens + start
    kind = tl.cast(rows_kind, tl.int64)
    # with stages named, what no product takes whole is loaded ahead as well
    for first in tl.range(0, length, C, num_stages=STAGES):
        inside = row < tl.minimum(length - first, C).to(tl.int32)
        in_key = inside[:, None]
        if K < BLOCK_K:
            in_key &= in_k[None, :]
        in_value = inside[:, None]
        if V % BLOCK_V != 0:
            in_value &= in_v[None, :]
        key = tl.load(k_read + first * K + key_cell, mask=in_key, other=0.0)
        query = tl.load(q_read + first * K + key_cell, mask=in_key, other=0.0)
        writer = tl.load(k_write + first * K + key_cell, mask=in_key, other=0.0)
        value = tl.load(v + first * v_t + value_cell, mask=in_value, other=0.0)
        matrices = solve + first * (2 * C) + solve_cell
        inverse = tl.load(matrices, mask=inside[:, None] & lower, other=0.0)
        scores = tl.load(matrices + C, mask=inside[:, None] & lower, other=0.0)
        key_scale, query_scale = load_factors(rows, kind, first, length, C)
        decay = tl.load(whole + first // C * K + dk, mask=in_k, other=0.0)

        if WIDE_RANGE:
            current *= decay[:, None]
        narrow = current.to(DTYPE)
        if not WIDE_RANGE:
            current *= decay[:, None]
        read = tl.dot(key, narrow, input_precision=PRECISION)
        out = tl.dot(query, narrow, input_precision=PRECISION)
        rest = (value.to(tl.float32) - read * key_scale[:, None]).to(DTYPE)
        write = tl.dot(inverse, rest, input_precision=PRECISION).to(DTYPE)
        out = tl.dot(scores, rest, out * query_scale[:, None], input_precision=PRECISION)
        current = tl.dot(tl.trans(writer), write, current, input_precision=PRECISION)
        if WIDE_RANGE:
            current *= decay[:, None]
        tl.store(o + first * o_t + out_cell, out.to(DTYPE), mask=in_value)
    final += sequence * final_b + head * final_h + dk[:, None] * final_k + dv[None, :]
    tl.store(final, current.to(final.dtype.element_ty), mask=in_state)


def channel_intra_tile(
    key_width: int, dtype: torch.dtype, device: torch.device, strong: bool = True
) -> Tile:
    hopper = limits(device).capability >= 90
    block_k = 32 if dtype.itemsize == 2 and (hopper or strong) else 16
    return Tile(min(padded(key_width), block_k), 0, 8 if strong else 4)


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
    """`inductor_moe::delta_rule` for g [B, T, HV, K], in two launches, in bf16 in three.

    Call `kernels.delta_rule.delta_rule_padded`: this expects vector-loadable rows and K <= 128.
    """
    q, k, v = inner_contiguous(q), inner_contiguous(k), inner_contiguous(v)
    # the widest of what the kernels read: half of it where they would cut it off
    g = binary_decay(g, torch.float32 if q.dtype == torch.float32 else torch.float16)
    state = None if state is None else inner_contiguous(state)
    batch, tokens, heads, key_width = q.shape
    value_heads, value_width = v.shape[2:]
    varlen = cu_seqlens is not None
    sequences = cu_seqlens.shape[0] - 1 if cu_seqlens is not None else batch
    slots = tokens // CHUNK + sequences if varlen else (tokens + CHUNK - 1) // CHUNK
    solve = q.new_empty((batch, value_heads, tokens, 2, CHUNK))
    q_read, k_read, k_write = (
        q.new_empty((batch, value_heads, tokens, key_width)) for _ in range(3)
    )
    # flat: a dim that may be one would put a guard on the number of chunks
    whole = torch.empty(
        (batch * value_heads * slots * key_width,), dtype=torch.float32, device=q.device
    )
    rows = torch.empty((2, batch, value_heads, tokens), dtype=torch.float32, device=q.device)
    least = torch.empty((batch * value_heads * slots,), dtype=torch.float32, device=q.device)
    out = torch.empty(v.shape, dtype=v.dtype, device=v.device)

    precision = "tf32x3" if q.dtype == torch.float32 else "tf32"
    wide_range = q.dtype == torch.bfloat16
    final = torch.empty(
        (sequences, value_heads, key_width, value_width),
        dtype=torch.float32 if state is None else state.dtype,
        device=v.device,
    )
    for strong in (False, True) if wide_range else (True,):
        tile = channel_intra_tile(key_width, q.dtype, q.device, strong)
        if intra is not None and strong != wide_range:
            tile = intra
        traced(delta_channel_intra_kernel)[(value_heads, slots, batch)](
            q, k, g, beta, solve, q_read, k_read, k_write, whole, rows, least, cu_seqlens,
            LEVELS, sequences, tokens, slots, value_heads, rows.stride(0),
            scale, l2norm_eps or 0.0,
            *strides(q, 3), *strides(k, 3), *strides(g, 3), *strides(beta, 3),
            GROUP=value_heads // heads, K=key_width, BLOCK_K=tile.key, C=CHUNK,
            NORMALIZE=l2norm_eps is not None, VARLEN=varlen, WIDE_RANGE=wide_range,
            STRONG=strong, SHORT_SOLVE=short_solve(q.dtype, l2norm_eps),
            EXACT=q.dtype == torch.float32, PRECISION=precision,
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
    states = sequences * value_heads
    tile = scan or scan_tile(
        key_width, value_width, q.dtype, q.device, states, keys=3, times=CHUNK_TIMES
    )
    grid = (triton.cdiv(value_width, tile.value), value_heads, sequences)
    numbers = (*strides(v, 3), *strides(out, 3), *strides(state, 3), *strides(final, 3))
    constants = {
        "K": key_width, "V": value_width, "BLOCK_K": tile.key, "BLOCK_V": tile.value,
        "C": CHUNK, "HAS_STATE": state is not None, "VARLEN": varlen,
        "WIDE_RANGE": wide_range, "STAGES": tile.stages,
        "num_warps": tile.warps, "num_stages": tile.stages,
    }  # fmt: skip
    if tile.value < HELD:
        traced(delta_channel_scan_kernel)[grid](
            q_read, k_read, k_write, v, out, solve, whole, rows, state, final, cu_seqlens,
            tokens, slots, value_heads, rows.stride(0), *numbers,
            PRECISION=precision, **constants,
        )  # fmt: skip
    else:
        # heads before tokens
        across = (q_read.stride(0), q_read.stride(2), q_read.stride(1))
        traced(delta_scan_transposed_kernel)[grid](
            q_read, k_read, k_write, v, out, solve, rows, whole, state, final, cu_seqlens,
            tokens, slots, value_heads, rows.stride(0), *across, *across, *numbers,
            GROUP=1, PER_CHANNEL=True, **constants,
        )  # fmt: skip
    return out, final
