"""Attention of many query positions under a mask: what it hides is skipped, block by block.

Of the blocks of keys that a block of queries sees, a run that it sees whole needs no mask. Around
it the mask decides: the diagonal of a causal mask, the edges of a window, padding.
"""

from __future__ import annotations

import triton
import triton.language as tl

from inductor_moe.kernels.dependent import wait_for_inputs

WORD = tl.constexpr(64)  # positions of a mask that a word holds, the first in its lowest bit
HIDDEN, PART, WHOLE = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@triton.jit
def attention_mask_kernel(
    mask,  # [B, T, L] bool
    words,  # [B, T, L / WORD] int64, contiguous, written: which positions a query sees
    blocks,  # [B, T / BLOCK_M, L / WORD] int8, contiguous, written: HIDDEN, PART or WHOLE
    queries,
    length,
    stride_mb,
    stride_mt,
    stride_ml,
    BLOCK_M: tl.constexpr,
    ROWS: tl.constexpr,  # read at a time
    COUNT: tl.constexpr,  # words of a program
):
    """The bits of a mask, and how much of a word any, or every, query of a block sees.

    What is past the end of a mask is hidden.
    """
    wait_for_inputs()
    batch = tl.program_id(2).to(tl.int64)
    line = tl.program_id(1)
    word = tl.program_id(0) * COUNT + tl.arange(0, COUNT)
    bit = tl.arange(0, WORD)
    column = word[:, None] * WORD + bit[None, :]
    inside = (column < length)[None]
    total = (length + WORD - 1) // WORD
    store = (word < total)[None, :]
    mask += batch * stride_mb + line.to(tl.int64) * BLOCK_M * stride_mt
    words += (batch * queries + line * BLOCK_M) * total
    seen = tl.zeros((ROWS, COUNT), tl.int64)
    hidden = tl.zeros((ROWS, COUNT), tl.int64)
    for start in tl.static_range(0, BLOCK_M, ROWS):
        row = start + tl.arange(0, ROWS)
        exists = (line * BLOCK_M + row < queries)[:, None]
        ptrs = mask + row[:, None, None] * stride_mt + column[None] * stride_ml
        keep = tl.load(ptrs, mask=exists[:, :, None] & inside, other=0) != 0
        value = tl.sum(keep.to(tl.int64) << bit[None, None, :], 2)
        tl.store(words + row[:, None] * total + word[None, :], value, mask=exists & store)
        seen |= value
        hidden |= tl.where(exists, ~value, 0)
    seen_by_any = tl.max((seen != 0).to(tl.int32), 0)
    hidden_from_any = tl.max((hidden != 0).to(tl.int32), 0)
    found = tl.where(seen_by_any == 0, HIDDEN, tl.where(hidden_from_any == 0, WHOLE, PART))
    blocks += (batch * tl.num_programs(1) + line) * total
    tl.store(blocks + word, found.to(tl.int8), mask=word < total)


@triton.jit
def _runs(blocks, total, BLOCK_N: tl.constexpr, SCANNED: tl.constexpr):
    """(first, last) block of positions that is seen, and (first, last) of a run seen whole."""
    first = total
    last = 0
    whole = total
    end = total
    for start in range(0, total, SCANNED):
        i = start + tl.arange(0, SCANNED)
        found = tl.load(blocks + i, mask=i < total, other=0)
        first = tl.minimum(first, tl.min(tl.where(found != HIDDEN, i, total), 0))
        last = tl.maximum(last, tl.max(tl.where(found != HIDDEN, i + 1, 0), 0))
        whole = tl.minimum(whole, tl.min(tl.where(found == WHOLE, i, total), 0))
        end = tl.minimum(end, tl.min(tl.where((i >= whole) & (found != WHOLE), i, total), 0))
    # From words to blocks of BLOCK_N: outwards what is seen, inwards what is seen whole.
    first = first * WORD // BLOCK_N
    last = (last * WORD + BLOCK_N - 1) // BLOCK_N
    whole = tl.minimum((whole * WORD + BLOCK_N - 1) // BLOCK_N, last)
    end = tl.maximum(tl.minimum(end * WORD // BLOCK_N, last), whole)
    return tl.minimum(first, last), last, whole, end


@triton.jit
def _kept(words, start, total, exists, BLOCK_N: tl.constexpr):
    """Which of the positions from `start` on each query sees, of the words of its row."""
    local = tl.arange(0, BLOCK_N)
    word = start // WORD
    value = tl.load(words + word, mask=exists, other=0)[:, None]
    if BLOCK_N > WORD:
        following = tl.load(words + word + 1, mask=exists & (word + 1 < total), other=0)[:, None]
        value = tl.where((local < WORD)[None, :], value, following)
    return ((value >> (start + local)[None, :] % WORD) & 1) != 0


@triton.jit
def _step(scores, v_tile, maximum, total, acc, SCALE: tl.constexpr, MASKED: tl.constexpr):
    """One block of the softmax and its product with values; scores are of base 2 once scaled."""
    risen = tl.maximum(maximum, tl.max(scores, 1) * SCALE)
    base = risen
    if MASKED:
        base = tl.where(risen == float("-inf"), 0.0, risen)
    weights = tl.exp2(scores * SCALE - base[:, None])
    fade = tl.exp2(maximum - base)
    total = total * fade + tl.sum(weights, 1)
    acc = acc * fade[:, None]
    acc = tl.dot(weights.to(v_tile.dtype), v_tile, acc)
    return risen, total, acc


@triton.jit
def attention_prompt_kernel(
    q,  # [B, Hkv * G, T, D]
    k,  # [B, Hkv, L, D]
    v,  # [B, Hkv, L, DV]
    words,  # [B or 1, T, L / WORD] int64, contiguous, of attention_mask_kernel
    blocks,  # [B or 1, T / BLOCK_M, L / WORD] int8, contiguous, likewise
    out,  # [B, T, Hkv * G, DV] contiguous, written
    queries,
    length,
    stride_qb,
    stride_qh,
    stride_qt,
    stride_qd,
    stride_kb,
    stride_kh,
    stride_kl,
    stride_kd,
    stride_vb,
    stride_vh,
    stride_vl,
    stride_vd,
    G: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    SCALE: tl.constexpr,  # of the scores, positive
    SHARED: tl.constexpr,  # one mask for every row of the batch
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    STAGES: tl.constexpr,
):
    wait_for_inputs()
    BASE2: tl.constexpr = SCALE * 1.4426950408889634
    head = tl.program_id(0).to(tl.int64)
    # A causal mask gives the last queries the most to do: they go first.
    line = tl.num_programs(1) - 1 - tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    start_row = line.to(tl.int64) * BLOCK_M
    row = tl.arange(0, BLOCK_M)
    exists = line * BLOCK_M + row < queries
    load_q = exists[:, None]
    d = tl.arange(0, BLOCK_D)
    e = tl.arange(0, BLOCK_DV)
    local = tl.arange(0, BLOCK_N)
    total_words = (length + WORD - 1) // WORD
    mask_row = 0 if SHARED else batch
    blocks += (mask_row * tl.num_programs(1) + line) * total_words
    first, last, whole, end = _runs(blocks, total_words, BLOCK_N, 1024)

    q += batch * stride_qb + head * stride_qh + start_row * stride_qt
    q_ptrs = q + row[:, None] * stride_qt + d[None, :] * stride_qd
    q_tile = tl.load(q_ptrs, mask=load_q & (d < D)[None, :], other=0.0)
    k += batch * stride_kb + head // G * stride_kh
    v += batch * stride_vb + head // G * stride_vh
    k_offsets = local[:, None] * stride_kl + d[None, :] * stride_kd
    v_offsets = local[:, None] * stride_vl + e[None, :] * stride_vd
    load_k = (d < D)[None, :]
    load_v = (e < DV)[None, :]

    maximum = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_DV), tl.float32)
    # This loop is first and alone pipelined: ptxas would otherwise wait for every product.
    for i in tl.range(whole, end, num_stages=STAGES):
        start = tl.cast(i * BLOCK_N, tl.int64)
        if D == BLOCK_D:
            k_tile = tl.load(k + start * stride_kl + k_offsets)
        else:
            k_tile = tl.load(k + start * stride_kl + k_offsets, mask=load_k, other=0.0)
        scores = tl.dot(q_tile, tl.trans(k_tile))
        if DV == BLOCK_DV:
            v_tile = tl.load(v + start * stride_vl + v_offsets)
        else:
            v_tile = tl.load(v + start * stride_vl + v_offsets, mask=load_v, other=0.0)
        maximum, total, acc = _step(scores, v_tile, maximum, total, acc, BASE2, False)

    words += (mask_row * queries + start_row + row) * total_words
    for j in tl.range(first, last - (end - whole), num_stages=1):
        i = tl.where(j < whole, j, j + end - whole)
        start = i * BLOCK_N
        # Past the end of the cache its last position stands for what is hidden anyway.
        near = tl.minimum(local, length - 1 - start)[:, None]
        row_k = k + tl.cast(start, tl.int64) * stride_kl
        row_v = v + tl.cast(start, tl.int64) * stride_vl
        k_tile = tl.load(row_k + near * stride_kl + d[None, :] * stride_kd, mask=load_k, other=0.0)
        keep = _kept(words, start, total_words, exists, BLOCK_N)
        scores = tl.where(keep, tl.dot(q_tile, tl.trans(k_tile)), float("-inf"))
        v_tile = tl.load(row_v + near * stride_vl + e[None, :] * stride_vd, mask=load_v, other=0.0)
        maximum, total, acc = _step(scores, v_tile, maximum, total, acc, BASE2, True)

    acc = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    heads = tl.num_programs(0)
    out += ((batch * queries + start_row) * heads + head) * DV
    out_ptrs = out + row[:, None] * (heads * DV) + e[None, :]
    tl.store(out_ptrs, acc.to(out.dtype.element_ty), mask=load_q & (e < DV)[None, :])
