"""The chunked delta rule, decay per head or absent: a kernel over all chunks, then a serial one.

With G the running log decay of a chunk and A = beta * (k k^T * exp(G_i - G_j)) below the diagonal:
writes D = (I + A)^-1 beta (v - exp(G) k S), outputs scale * (exp(G) q S + (q k^T * decay) D), next
state exp(G_C) S + (k exp(G_C - G))^T D. The first kernel makes (I + A)^-1 beta, the causal q k^T
times it, and the factor of every row; the second carries S.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import triton
import triton.language as tl
from torch import SymInt, Tensor

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
from inductor_moe.kernels.delta_rows import chunk_bounds, load_factors, sequence_bounds
from inductor_moe.kernels.delta_scan_transposed import delta_scan_transposed_kernel
from inductor_moe.kernels.dependent import wait_for_inputs

# Microseconds of a chunk on an H100, by the value channels of a program. From HELD on, the rows of
# a warp group's products, the state stays in registers.
CHUNK_TIMES = {32: 1.28, 64: 1.62, 128: 2.9}
HELD = 64


@triton.jit
def delta_chunk_intra_kernel(
    q, k,                   # [B, T, H, K]
    g, beta,                # [B, T, HV]; g fp32 log2 decays, absent without HAS_GATE
    solve,                  # [B, HV, T, 2, C]: (I + A)^-1 beta, with the factor of the row that is
                            # written; SCALE * causal q k^T (I + A)^-1 beta
    rows,                   # [3, B, HV, T] fp32: factors of k's read and of q's; decay so far
    cu_seqlens,             # [N + 1] with VARLEN
    levels, sequences, tokens, value_heads, rows_kind,
    SCALE: tl.constexpr, EPS: tl.constexpr,
    q_b, q_t, q_h, k_b, k_t, k_h, g_b, g_t, g_h, beta_b, beta_t, beta_h,
    GROUP: tl.constexpr, K: tl.constexpr, BLOCK_K: tl.constexpr, C: tl.constexpr,
    HAS_GATE: tl.constexpr, NORMALIZE: tl.constexpr, VARLEN: tl.constexpr,
    SHORT_SOLVE: tl.constexpr, PRECISION: tl.constexpr, REGISTERS: tl.constexpr,
):  # fmt: skip
    """SHORT_SOLVE inverts in fp16, whose 11 bits suffice where unit keys bound the entries.

    REGISTERS as `Tile` says.
    """
    wait_for_inputs()
    head = tl.program_id(0)
    batch = tl.program_id(2).to(tl.int64)
    first, end, _ = chunk_bounds(tl.program_id(1), cu_seqlens, sequences, tokens, C, VARLEN)
    if first >= end:
        return
    row = tl.arange(0, C)
    inside = row < end - first
    q += batch * q_b + (head // GROUP) * q_h + first * q_t + row[:, None] * q_t
    k += batch * k_b + (head // GROUP) * k_h + first * k_t + row[:, None] * k_t
    beta += batch * beta_b + head * beta_h + first * beta_t
    strength = tl.load(beta + row * beta_t, mask=inside, other=0.0).to(tl.float32)
    from_start = tl.full([C], 1.0, tl.float32)
    to_end = from_start
    if HAS_GATE:
        g += batch * g_b + head * g_h + first * g_t
        decay = tl.load(g + row * g_t, mask=inside, other=0.0)
        total = tl.cumsum(decay)
        from_start = tl.exp2(total)
        to_end = tl.exp2(tl.cumsum(decay, reverse=True) - decay)

    kk = tl.zeros([C, C], tl.float32)
    qk = tl.zeros([C, C], tl.float32)
    query_norm = tl.zeros([C], tl.float32)
    key_norm = tl.zeros([C], tl.float32)
    for block in tl.static_range(0, K, BLOCK_K):
        dk = block + tl.arange(0, BLOCK_K)
        mask = inside[:, None] & (dk < K)[None, :]
        key = tl.load(k + dk[None, :], mask=mask, other=0.0)
        query = tl.load(q + dk[None, :], mask=mask, other=0.0)
        turned = tl.trans(key)
        kk = tl.dot(key, turned, kk, input_precision=PRECISION)
        qk = tl.dot(query, turned, qk, input_precision=PRECISION)
        if NORMALIZE:
            wide = query.to(tl.float32)
            query_norm += tl.sum(wide * wide, 1)
            wide = key.to(tl.float32)
            key_norm += tl.sum(wide * wide, 1)
    key_scale = tl.full([C], 1.0, tl.float32)
    query_scale = key_scale * SCALE
    if NORMALIZE:
        key_scale = tl.rsqrt(key_norm + EPS)
        query_scale = tl.rsqrt(query_norm + EPS) * SCALE
    start = (batch * value_heads + head) * tokens + first
    rows += start + row
    kind = tl.cast(rows_kind, tl.int64)
    tl.store(rows, from_start * key_scale, mask=inside)
    tl.store(rows + kind, from_start * query_scale, mask=inside)
    tl.store(rows + 2 * kind, from_start, mask=inside)

    causal = row[:, None] >= row[None, :]
    # (I + beta L)^-1 beta = beta (I + L beta)^-1: L and q k^T share the factors of the columns
    between = tl.where(causal, (key_scale * strength)[None, :], 0.0)
    if HAS_GATE:
        between *= tl.exp2(tl.where(causal, total[:, None] - total[None, :], 0.0))
    scores = (qk * query_scale[:, None] * between).to(q.dtype.element_ty)
    a = kk * key_scale[:, None] * between
    a = tl.where(row[:, None] > row[None, :], -a, 0.0)
    a = a.to(tl.float16 if SHORT_SOLVE else tl.float32)
    inverse = unit_lower_inverse(a, levels, C, PRECISION)
    product = tl.dot(scores, inverse.to(scores.dtype), input_precision=PRECISION)
    inverse *= (to_end * key_scale * strength)[:, None]
    solve += start * (2 * C) + row[:, None] * (2 * C) + row[None, :]
    tl.store(solve, inverse.to(scores.dtype), mask=inside[:, None])
    tl.store(solve + C, product.to(scores.dtype), mask=inside[:, None])


@triton.jit
def delta_chunk_scan_kernel(
    q, k,                   # [B, T, H, K]
    v, o,                   # [B, T, HV, V]
    solve,                  # [B, HV, T, 2, C]
    rows,                   # [3, B, HV, T] fp32
    state, final,           # [N, HV, K, V]; state absent without HAS_STATE
    cu_seqlens,             # [N + 1] with VARLEN
    tokens, value_heads, rows_kind,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, o_b, o_t, o_h,
    state_b, state_h, state_k, final_b, final_h, final_k,
    GROUP: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, C: tl.constexpr,
    HAS_STATE: tl.constexpr, VARLEN: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    wait_for_inputs()
    head = tl.program_id(1)
    sequence = tl.program_id(2).to(tl.int64)
    dk = tl.arange(0, BLOCK_K)
    dv = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)
    row = tl.arange(0, C)
    in_k = dk < K
    in_v = dv < V
    batch, start, end, _ = sequence_bounds(sequence, cu_seqlens, tokens, C, VARLEN)

    current = tl.zeros([BLOCK_K, BLOCK_V], tl.float32)
    in_state = in_k[:, None] & in_v[None, :]
    if HAS_STATE:
        at = sequence * state_b + head * state_h + dk[:, None] * state_k + dv[None, :]
        current = tl.load(state + at, mask=in_state, other=0.0).to(tl.float32)
    q += batch * q_b + (head // GROUP) * q_h + start * q_t
    k += batch * k_b + (head // GROUP) * k_h + start * k_t
    v += batch * v_b + head * v_h + start * v_t
    o += batch * o_b + head * o_h + start * o_t
    plane = (batch * value_heads + head) * tokens + start
    solve += plane * (2 * C)
    rows += plane
    kind = tl.cast(rows_kind, tl.int64)
    query_cell = row[:, None] * q_t + dk[None, :]
    key_cell = row[:, None] * k_t + dk[None, :]
    value_cell = row[:, None] * v_t + dv[None, :]
    out_cell = row[:, None] * o_t + dv[None, :]
    # both matrices of a chunk, one below the other, are one operand
    twice = tl.arange(0, 2 * C)
    solve_cell = (twice % C * 2 + twice // C)[:, None] * C + row[None, :]
    length = end - start
    DTYPE: tl.constexpr = q.dtype.element_ty
    # with stages named, what no product takes whole is loaded ahead as well
    for first in tl.range(0, length, C, num_stages=STAGES):
        inside = row < tl.minimum(length - first, C).to(tl.int32)
        in_key = inside[:, None]
        if K < BLOCK_K:
            in_key &= in_k[None, :]
        in_value = inside[:, None]
        if V % BLOCK_V != 0:
            in_value &= in_v[None, :]
        in_solve = (twice % C < length - first)[:, None]
        key = tl.load(k + first * k_t + key_cell, mask=in_key, other=0.0)
        query = tl.load(q + first * q_t + query_cell, mask=in_key, other=0.0)
        value = tl.load(v + first * v_t + value_cell, mask=in_value, other=0.0)
        both = tl.load(solve + first * (2 * C) + solve_cell, mask=in_solve, other=0.0)
        key_read, query_read = load_factors(rows, kind, first, length, C)
        whole = tl.load(rows + 2 * kind + tl.minimum(length, first + C) - 1)

        narrow = current.to(DTYPE)
        read = tl.dot(key, narrow, input_precision=PRECISION)
        out = tl.dot(query, narrow, input_precision=PRECISION)
        rest = (value.to(tl.float32) - read * key_read[:, None]).to(DTYPE)
        both = tl.dot(both, rest, input_precision=PRECISION)
        both = tl.permute(tl.reshape(both, (2, C, BLOCK_V)), (1, 2, 0))
        write, added = tl.split(both)
        current = tl.dot(
            tl.trans(key), write.to(DTYPE), current * whole, input_precision=PRECISION
        )
        out = out * query_read[:, None] + added
        tl.store(o + first * o_t + out_cell, out.to(DTYPE), mask=in_value)
    at = sequence * final_b + head * final_h + dk[:, None] * final_k + dv[None, :]
    tl.store(final + at, current.to(final.dtype.element_ty), mask=in_state)


def intra_tile(key_width: int, dtype: torch.dtype, device: torch.device) -> Tile:
    """On Hopper three programs a multiprocessor, in 16 bits: it is latency that bounds them."""
    if limits(device).capability < 90:
        return Tile(min(padded(key_width), 32 if dtype.itemsize > 2 else 64), 0, 8)
    if dtype.itemsize > 2:
        return Tile(min(padded(key_width), 32), 0, 4)
    return Tile(min(padded(key_width), 64), 0, 4, registers=168)


def value_block(
    value_width: int, states: int | SymInt, processors: int, times: Mapping[int, float]
) -> int:
    """The value channels of a program with which this many states take the least time.

    A multiprocessor has room for one program: every multiple of their number is another turn.
    """
    if not isinstance(states, int):
        return HELD

    def duration(value: int) -> float:
        return triton.cdiv(states * value_width // value, processors) * times[value]

    return min((value for value in times if value_width % value == 0), key=duration)


def scan_tile(
    key_width: int,
    value_width: int,
    dtype: torch.dtype,
    device: torch.device,
    states: int | SymInt,
    keys: int = 2,
    times: Mapping[int, float] = CHUNK_TIMES,
) -> Tile:
    """That of the serial kernel, which is `delta_scan_transposed_kernel` from HELD values on.

    keys counts the [C, K] operands of a chunk.
    """
    capability, shared, processors = limits(device)
    block_k = padded(key_width)
    block_v = min(padded(value_width), 32 if dtype.itemsize == 2 else 16)
    holds = capability == 90 and dtype.itemsize == 2 and block_k <= 128
    if holds and value_width % HELD == 0:
        block_v = value_block(value_width, states, processors, times)
    if block_v >= HELD:
        return Tile(block_k, block_v, block_v // 16, 3 if keys == 2 else 2)
    # three stages of one chunk's inputs where they fit
    chunk_bytes = CHUNK * (keys * block_k + 2 * CHUNK + block_v) * dtype.itemsize
    # what the compiler stages of the state and the row blocks between products
    fixed = (block_k + 3 * CHUNK) * block_v * dtype.itemsize + 2048
    stages = max(1, min(3, (shared - fixed) // chunk_bytes))
    return Tile(block_k, block_v, 4 if capability >= 90 else 8, stages)


def short_solve(dtype: torch.dtype, l2norm_eps: float | None) -> bool:
    return dtype.itemsize == 2 and l2norm_eps is not None


def delta_rule_chunk(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor,
    state: Tensor | None,
    scale: float,
    l2norm_eps: float | None,
    cu_seqlens: Tensor | None = None,
    intra: Tile | None = None,
    scan: Tile | None = None,
) -> tuple[Tensor, Tensor]:
    """`inductor_moe::delta_rule` for g [B, T, HV] or None, in two launches.

    Call `kernels.delta_rule.delta_rule_padded`: this expects vector-loadable rows.
    """
    q, k, v = inner_contiguous(q), inner_contiguous(k), inner_contiguous(v)
    g = None if g is None else binary_decay(g)
    state = None if state is None else inner_contiguous(state)
    batch, tokens, heads, key_width = q.shape
    value_heads, value_width = v.shape[2:]
    varlen = cu_seqlens is not None
    sequences = cu_seqlens.shape[0] - 1 if cu_seqlens is not None else batch
    slots = tokens // CHUNK + sequences if varlen else (tokens + CHUNK - 1) // CHUNK
    solve = q.new_empty((batch, value_heads, tokens, 2, CHUNK))
    rows = torch.empty((3, batch, value_heads, tokens), dtype=torch.float32, device=q.device)
    out = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    final = torch.empty(
        (sequences, value_heads, key_width, value_width),
        dtype=torch.float32 if state is None else state.dtype,
        device=v.device,
    )
    precision = "tf32x3" if q.dtype == torch.float32 else "tf32"
    tile = intra or intra_tile(key_width, q.dtype, q.device)
    traced(delta_chunk_intra_kernel)[(value_heads, slots, batch)](
        q, k, g, beta, solve, rows, cu_seqlens,
        LEVELS, sequences, tokens, value_heads, rows.stride(0), scale, l2norm_eps or 0.0,
        *strides(q, 3), *strides(k, 3), *strides(g, 3), *strides(beta, 3),
        GROUP=value_heads // heads, K=key_width, BLOCK_K=tile.key, C=CHUNK,
        HAS_GATE=g is not None, NORMALIZE=l2norm_eps is not None, VARLEN=varlen,
        SHORT_SOLVE=short_solve(q.dtype, l2norm_eps), PRECISION=precision,
        REGISTERS=tile.registers, num_warps=tile.warps,
    )  # fmt: skip
    states = sequences * value_heads
    tile = scan or scan_tile(key_width, value_width, q.dtype, q.device, states)
    grid = (triton.cdiv(value_width, tile.value), value_heads, sequences)
    numbers = (
        value_heads, rows.stride(0),
        *strides(q, 3), *strides(k, 3), *strides(v, 3), *strides(out, 3),
        *strides(state, 3), *strides(final, 3),
    )  # fmt: skip
    constants = {
        "GROUP": value_heads // heads, "K": key_width, "V": value_width,
        "BLOCK_K": tile.key, "BLOCK_V": tile.value, "C": CHUNK,
        "HAS_STATE": state is not None, "VARLEN": varlen,
        "STAGES": tile.stages, "num_warps": tile.warps, "num_stages": tile.stages,
    }  # fmt: skip
    if tile.value < HELD:
        traced(delta_chunk_scan_kernel)[grid](
            q, k, v, out, solve, rows, state, final, cu_seqlens, tokens, *numbers,
            PRECISION=precision, **constants,
        )  # fmt: skip
    else:
        traced(delta_scan_transposed_kernel)[grid](
            q, k, None, v, out, solve, rows, None, state, final, cu_seqlens, tokens, slots,
            *numbers, PER_CHANNEL=False, WIDE_RANGE=False, **constants,
        )  # fmt: skip
    return out, final
