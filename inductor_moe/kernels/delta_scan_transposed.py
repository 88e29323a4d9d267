"""The serial kernel of the chunked delta rule where a state's rows fit into a warp's registers.

The state is held transposed, value channels as rows: the result of each product is the left
operand of the next one as it lies in registers, and the right ones are what was loaded. The other
form, `delta_chunk.delta_chunk_scan_kernel`, passes each result through shared memory.
"""

from __future__ import annotations

import triton
import triton.language as tl

from inductor_moe.kernels.delta_rows import load_factors, sequence_bounds
from inductor_moe.kernels.dependent import wait_for_inputs


@triton.jit
def delta_scan_transposed_kernel(
    q, k,                   # [B, T, H, K]; with PER_CHANNEL [B, T, HV, K], decayed from the start
    k_write,                # [B, T, HV, K], decayed to the end; absent without PER_CHANNEL
    v, o,                   # [B, T, HV, V]
    solve,                  # [B, HV, T, 2, C]; with PER_CHANNEL no blocks of 16 above the diagonal
    rows,                   # [3, B, HV, T] fp32: factors of k's read and of q's; without
                            # PER_CHANNEL the decay so far
    whole,                  # [B, HV, slots, K] fp32: decay of a chunk; absent without PER_CHANNEL
    state, final,           # [N, HV, K, V]; state absent without HAS_STATE
    cu_seqlens,             # [N + 1] with VARLEN
    tokens, slots, value_heads, rows_kind,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, o_b, o_t, o_h,
    state_b, state_h, state_k, final_b, final_h, final_k,
    GROUP: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, C: tl.constexpr,
    HAS_STATE: tl.constexpr, VARLEN: tl.constexpr,
    PER_CHANNEL: tl.constexpr, WIDE_RANGE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """With WIDE_RANGE, for PER_CHANNEL, whole is the root of the decay, and k_write and the others
    are decayed to and from the middle of the chunk: so is the state, before and after it.
    """
    wait_for_inputs()
    head = tl.program_id(1)
    sequence = tl.program_id(2).to(tl.int64)
    dk = tl.arange(0, BLOCK_K)
    dv = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)
    row = tl.arange(0, C)
    in_k = dk < K
    in_v = dv < V
    batch, start, end, slot = sequence_bounds(sequence, cu_seqlens, tokens, C, VARLEN)

    current = tl.zeros([BLOCK_V, BLOCK_K], tl.float32)
    in_state = in_v[:, None] & in_k[None, :]
    if HAS_STATE:
        at = sequence * state_b + head * state_h + dk[None, :] * state_k + dv[:, None]
        current = tl.load(state + at, mask=in_state, other=0.0).to(tl.float32)
    q += batch * q_b + (head // GROUP) * q_h + start * q_t
    k += batch * k_b + (head // GROUP) * k_h + start * k_t
    v += batch * v_b + head * v_h + start * v_t
    o += batch * o_b + head * o_h + start * o_t
    plane = batch * value_heads + head
    solve += (plane * tokens + start) * (2 * C)
    rows += plane * tokens + start
    if PER_CHANNEL:
        k_write += batch * k_b + (head // GROUP) * k_h + start * k_t
        whole += (plane * slots + slot) * K + dk
        lower = row[:, None] // 16 >= row[None, :] // 16
    kind = tl.cast(rows_kind, tl.int64)
    query_cell = row[:, None] * q_t + dk[None, :]
    key_cell = row[:, None] * k_t + dk[None, :]
    value_cell = row[:, None] * v_t + dv[None, :]
    out_cell = row[:, None] * o_t + dv[None, :]
    solve_cell = row[:, None] * (2 * C) + row[None, :]
    length = end - start
    DTYPE: tl.constexpr = q.dtype.element_ty
    same = tl.where(row[:, None] == row[None, :], 1.0, 0.0).to(DTYPE)
    # with stages named, what no product takes whole is loaded ahead as well
    for first in tl.range(0, length, C, num_stages=STAGES):
        inside = row < length - first
        in_key = inside[:, None] & in_k[None, :]
        in_value = inside[:, None] & in_v[None, :]
        key = tl.load(k + first * k_t + key_cell, mask=in_key, other=0.0)
        query = tl.load(q + first * q_t + query_cell, mask=in_key, other=0.0)
        value = tl.load(v + first * v_t + value_cell, mask=in_value, other=0.0)
        matrices = solve + first * (2 * C) + solve_cell
        in_solve = inside[:, None]
        if PER_CHANNEL:
            in_solve &= lower
        inverse = tl.load(matrices, mask=in_solve, other=0.0)
        scores = tl.load(matrices + C, mask=in_solve, other=0.0)
        key_read, query_read = load_factors(rows, kind, first, length, C)
        if PER_CHANNEL:
            writer = tl.load(k_write + first * k_t + key_cell, mask=in_key, other=0.0)
            decay = tl.load(whole + first // C * K, mask=in_k, other=0.0)[None, :]
        else:
            writer = key
            decay = tl.load(rows + 2 * kind + tl.minimum(length, first + C) - 1)

        if WIDE_RANGE:
            # from the middle of the chunk before
            earlier = in_k & (first > 0)
            decay *= tl.load(whole + (first // C - 1) * K, mask=earlier, other=1.0)[None, :]
            current *= decay
        narrow = current.to(DTYPE)
        read = tl.dot(narrow, tl.trans(key)) * -key_read[None, :]
        # A product with the identity turns the values: loads that no product takes whole wait in
        # registers.
        rest = tl.dot(tl.trans(value), same, read).to(DTYPE)
        write = tl.dot(rest, tl.trans(inverse)).to(DTYPE)
        if not WIDE_RANGE:
            current *= decay
        current = tl.dot(write, writer, current)
        out = tl.dot(narrow, tl.trans(query)) * query_read[None, :]
        out = tl.dot(rest, tl.trans(scores), out)
        tl.store(o + first * o_t + out_cell, tl.trans(out.to(DTYPE)), mask=in_value)
    if WIDE_RANGE:
        last = tl.maximum(length - 1, 0) // C
        current *= tl.load(whole + last * K, mask=in_k & (length > 0), other=1.0)[None, :]
    at = sequence * final_b + head * final_h + dk[None, :] * final_k + dv[:, None]
    tl.store(final + at, current.to(final.dtype.element_ty), mask=in_state)
