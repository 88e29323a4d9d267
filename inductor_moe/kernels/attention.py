"""One query position against a cache of keys and values, split over programs (flash-decoding).

A split takes every SPLITS-th block of positions, so that a cache that is filled from one end
keeps all of them busy.
"""

from __future__ import annotations

import triton
import triton.language as tl

from inductor_moe.kernels.dependent import place_next, wait_for_inputs


@triton.jit
def _kept(mask, position, length, stride, MASK: tl.constexpr):
    """Which positions count, and what a float mask adds to their scores."""
    keep = position < length
    bias = tl.zeros(position.shape, tl.float32)
    if MASK == "bool":
        keep = keep & (tl.load(mask + position * stride, mask=keep, other=0) != 0)
    elif MASK == "float":
        bias = tl.load(mask + position * stride, mask=keep, other=float("-inf")).to(tl.float32)
        keep = keep & (bias != float("-inf"))
    return keep, bias


@triton.jit
def attention_decode_kernel(
    q,  # [B, Hkv * G, D]
    k,  # [B, Hkv, L, D]
    v,  # [B, Hkv, L, DV]
    mask,  # [B, L] bool or float, unless MASK is "none"
    gate,  # [B, Hq, DV] with GATED and SPLITS 1
    out,  # [B, Hq, DV], or with SPLITS > 1 sums [B, Hq, SPLITS, DV] fp32; contiguous, written
    maxima,  # [B, Hq, SPLITS] fp32 contiguous, written if SPLITS > 1
    sums,  # [B, Hq, SPLITS] fp32 contiguous, written if SPLITS > 1; 0 where a split has nothing
    length,
    stride_qb,
    stride_qh,
    stride_qd,
    stride_kb,
    stride_kh,
    stride_kl,
    stride_kd,
    stride_vb,
    stride_vh,
    stride_vl,
    stride_vd,
    stride_mb,
    stride_ml,
    stride_gb,
    stride_gh,
    stride_gd,
    G: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    SCALE: tl.constexpr,
    MASK: tl.constexpr,  # "none", "bool" or "float"
    GATED: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_G: tl.constexpr,  # 1: products in fp32 without tensor cores
    BLOCK_L: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    STAGES: tl.constexpr,
):
    wait_for_inputs()
    place_next()
    GROUP_BLOCKS: tl.constexpr = (G + BLOCK_G - 1) // BLOCK_G
    SCANNED: tl.constexpr = 1024 // BLOCK_L
    LOG2E: tl.constexpr = 1.4426950408889634
    split = tl.program_id(0)
    kv_head = (tl.program_id(1) // GROUP_BLOCKS).to(tl.int64)
    g = tl.program_id(1) % GROUP_BLOCKS * BLOCK_G + tl.arange(0, BLOCK_G)
    batch = tl.program_id(2).to(tl.int64)
    heads = tl.num_programs(1) // GROUP_BLOCKS * G
    head = kv_head * G + g
    exists = (g < G)[:, None]
    d = tl.arange(0, BLOCK_D)
    e = tl.arange(0, BLOCK_DV)
    local = tl.arange(0, BLOCK_L)
    q_ptrs = q + batch * stride_qb + head[:, None] * stride_qh + d[None, :] * stride_qd
    q_tile = tl.load(q_ptrs, mask=exists & (d < D)[None, :], other=0.0)
    k += batch * stride_kb + kv_head * stride_kh
    v += batch * stride_vb + kv_head * stride_vh
    k_offsets = local[:, None] * stride_kl + d[None, :] * stride_kd
    v_offsets = local[:, None] * stride_vl + e[None, :] * stride_vd
    mask += batch * stride_mb

    # Of the blocks of this split, those from the first to the last with a position that counts.
    blocks = (length + BLOCK_L - 1) // BLOCK_L
    first = 0
    last = (blocks - split + SPLITS - 1) // SPLITS
    if MASK != "none":
        own = last
        first = own
        last = 0
        for start in range(0, own, SCANNED):
            i = start + tl.arange(0, SCANNED)
            position = (split + i * SPLITS)[:, None] * BLOCK_L + local[None, :]
            keep, _ = _kept(mask, position, length, stride_ml, MASK)
            counts = tl.max(keep.to(tl.int32), 1) > 0
            first = tl.minimum(first, tl.min(tl.where(counts, i, own), 0))
            last = tl.maximum(last, tl.max(tl.where(counts, i + 1, 0), 0))

    maximum = tl.full((BLOCK_G,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_G,), tl.float32)
    acc = tl.zeros((BLOCK_G, BLOCK_DV), tl.float32)
    for i in tl.range(first, last, num_stages=STAGES):
        start = (split + i * SPLITS) * BLOCK_L
        keep, bias = _kept(mask, start + local, length, stride_ml, MASK)
        row = start.to(tl.int64)
        load_k = keep[:, None] & (d < D)[None, :]
        load_v = keep[:, None] & (e < DV)[None, :]
        k_tile = tl.load(k + row * stride_kl + k_offsets, mask=load_k, other=0.0)
        v_tile = tl.load(v + row * stride_vl + v_offsets, mask=load_v, other=0.0)
        if BLOCK_G == 1:
            scores = tl.sum(k_tile.to(tl.float32) * q_tile.to(tl.float32), 1)[None, :]
        else:
            scores = tl.dot(q_tile, tl.trans(k_tile))
        scores = tl.where(keep[None, :], scores * SCALE + bias[None, :], float("-inf"))
        risen = tl.maximum(maximum, tl.max(scores, 1))
        base = tl.where(risen == float("-inf"), 0.0, risen)
        # Subtract first: the lowest finite number, which masks are made of, times LOG2E is -inf.
        weights = tl.exp2((scores - base[:, None]) * LOG2E)
        fade = tl.exp2((maximum - base) * LOG2E)
        total = total * fade + tl.sum(weights, 1)
        acc = acc * fade[:, None]
        if BLOCK_G == 1:
            acc += tl.sum(tl.trans(weights) * v_tile.to(tl.float32), 0)[None, :]
        else:
            acc = tl.dot(weights.to(v_tile.dtype), v_tile, acc)
        maximum = risen

    row = batch * heads + head
    store = exists & (e < DV)[None, :]
    if SPLITS == 1:
        acc = acc / tl.where(total == 0.0, 1.0, total)[:, None]
        if GATED:
            gates = gate + batch * stride_gb + head[:, None] * stride_gh + e[None, :] * stride_gd
            acc *= tl.sigmoid(tl.load(gates, mask=store, other=0.0).to(tl.float32))
        tl.store(out + row[:, None] * DV + e[None, :], acc.to(out.dtype.element_ty), mask=store)
    else:
        row = row * SPLITS + split
        tl.store(maxima + row, maximum, mask=g < G)
        tl.store(sums + row, total, mask=g < G)
        if first < last:
            tl.store(out + row[:, None] * DV + e[None, :], acc, mask=store)


@triton.jit
def attention_combine_kernel(
    partial,  # [R, SPLITS, DV] fp32 contiguous; not written where a sum is 0
    maxima,  # [R, SPLITS] fp32 contiguous
    sums,  # [R, SPLITS] fp32 contiguous
    gate,  # [R / heads, heads, DV] with GATED
    out,  # [R, DV] contiguous, written
    heads,
    stride_gb,
    stride_gh,
    stride_gd,
    DV: tl.constexpr,
    GATED: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    wait_for_inputs()
    place_next()
    LOG2E: tl.constexpr = 1.4426950408889634
    row = tl.program_id(0).to(tl.int64)
    e = tl.program_id(1) * BLOCK_DV + tl.arange(0, BLOCK_DV)
    s = tl.arange(0, BLOCK_S)
    if GATED:
        gate += row // heads * stride_gb + row % heads * stride_gh
        factor = tl.load(gate + e * stride_gd, mask=e < DV, other=0.0)
    maximum = tl.load(maxima + row * SPLITS + s, mask=s < SPLITS, other=float("-inf"))
    total = tl.load(sums + row * SPLITS + s, mask=s < SPLITS, other=0.0)
    best = tl.max(maximum, 0)
    base = tl.where(best == float("-inf"), 0.0, best)
    weight = tl.exp2((maximum - base) * LOG2E)
    ptrs = partial + (row * SPLITS + s)[:, None] * DV + e[None, :]
    acc = tl.load(ptrs, mask=(total != 0.0)[:, None] & (e < DV)[None, :], other=0.0)
    whole = tl.sum(weight * total, 0)
    value = tl.sum(weight[:, None] * acc, 0) / tl.where(whole == 0.0, 1.0, whole)
    if GATED:
        value *= tl.sigmoid(factor.to(tl.float32))
    tl.store(out + row * DV + e, value.to(out.dtype.element_ty), mask=e < DV)
