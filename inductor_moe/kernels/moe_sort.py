"""Pairs ordered by expert, without a host sync and without float or order-dependent atomics.

Two arrays come out. `order` [S] holds the pairs, expert by expert, and in pair order within one
expert; ids outside [0, E) take no place. `blocks` [3, capacity] cuts each expert's run into blocks
of at most BLOCK_M rows: expert (-1 where the upper-bound grid has no work), first row, row count.
"""

from __future__ import annotations

import triton
import triton.language as tl


# Loads stay in the kernels: torch's mutation analysis cannot see that a device function only reads.
@triton.jit
def id_pointers(ids, pair, stride_it, stride_ik, TOP_K: tl.constexpr):
    return ids + (pair // TOP_K).to(tl.int64) * stride_it + (pair % TOP_K) * stride_ik


@triton.jit
def known_expert(loaded, experts):
    """Expert of each pair as int32; `experts` where there is none."""
    return tl.where((loaded >= 0) & (loaded < experts), loaded, experts).to(tl.int32)


@triton.jit
def store_blocks(
    counts,  # [BINS] int32
    blocks,  # [3, capacity] int32, written
    experts,
    capacity,
    BINS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    CUT: tl.constexpr,
):
    """Cut each expert's rows into blocks; returns the first row of each expert, [BINS]."""
    bins = tl.arange(0, BINS)
    cuts = (counts + (BLOCK_M - 1)) // BLOCK_M
    cut_end = tl.cumsum(cuts, 0)
    row_end = tl.cumsum(counts, 0)
    row_start = row_end - counts
    # Row of block b of an expert, were b counted from the expert's first block.
    shifted = row_start - (cut_end - cuts) * BLOCK_M
    for start in range(0, capacity, CUT):
        b = start + tl.arange(0, CUT)
        expert = tl.sum((cut_end[None, :] <= b[:, None]).to(tl.int32), 1)
        here = bins[None, :] == expert[:, None]
        first = tl.sum(tl.where(here, shifted[None, :], 0), 1) + b * BLOCK_M
        end = tl.sum(tl.where(here, row_end[None, :], 0), 1)
        used = expert < experts
        tl.store(blocks + b, tl.where(used, expert, -1), mask=b < capacity)
        tl.store(blocks + capacity + b, first, mask=b < capacity)
        tl.store(blocks + 2 * capacity + b, tl.minimum(end - first, BLOCK_M), mask=b < capacity)
    return row_start


@triton.jit(do_not_specialize=["pairs", "capacity"])
def moe_sort_by_rank_kernel(
    ids,  # [T, K]
    order,  # [S] int32, written
    blocks,  # [3, capacity] int32, written
    pairs,
    experts,
    capacity,
    stride_it,
    stride_ik,
    TOP_K: tl.constexpr,
    BINS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    CUT: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """One launch for a few thousand pairs: a pair's place is how many pairs come before it.

    The last program makes the blocks, the others each place BLOCK pairs.
    """
    if tl.program_id(0) == tl.num_programs(0) - 1:
        counts = tl.zeros((BINS,), tl.int32)
        for start in range(0, pairs, CHUNK):
            pair = start + tl.arange(0, CHUNK)
            ptrs = id_pointers(ids, pair, stride_it, stride_ik, TOP_K)
            expert = known_expert(tl.load(ptrs, mask=pair < pairs, other=-1), experts)
            counts += tl.histogram(expert, BINS, mask=expert < experts)
        store_blocks(counts, blocks, experts, capacity, BINS, BLOCK_M, CUT)
    else:
        pair = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        ptrs = id_pointers(ids, pair, stride_it, stride_ik, TOP_K)
        expert = known_expert(tl.load(ptrs, mask=pair < pairs, other=-1), experts)
        key = expert * pairs + pair
        place = tl.zeros((BLOCK,), tl.int32)
        for start in range(0, pairs, CHUNK):
            other = start + tl.arange(0, CHUNK)
            rival_ptrs = id_pointers(ids, other, stride_it, stride_ik, TOP_K)
            rival = known_expert(tl.load(rival_ptrs, mask=other < pairs, other=-1), experts)
            before = (rival * pairs + other)[None, :] < key[:, None]
            place += tl.sum(before.to(tl.int32), 1)
        tl.store(order + place, pair, mask=expert < experts)


@triton.jit(do_not_specialize=["pairs"])
def moe_sort_count_kernel(
    ids,  # [T, K]
    counts,  # [chunks, BINS] int32, written
    pairs,
    experts,
    stride_it,
    stride_ik,
    TOP_K: tl.constexpr,
    BINS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    chunk = tl.program_id(0)
    pair = chunk * CHUNK + tl.arange(0, CHUNK)
    ptrs = id_pointers(ids, pair, stride_it, stride_ik, TOP_K)
    expert = known_expert(tl.load(ptrs, mask=pair < pairs, other=-1), experts)
    count = tl.histogram(expert, BINS, mask=expert < experts)
    tl.store(counts + chunk * BINS + tl.arange(0, BINS), count)


@triton.jit(do_not_specialize=["chunks", "capacity"])
def moe_sort_scan_kernel(
    counts,  # [chunks, BINS] int32
    base,  # [chunks + 1, BINS] int32, written: earlier chunks' pairs; last, each expert's first row
    blocks,  # [3, capacity] int32, written
    chunks,
    experts,
    capacity,
    BINS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    CUT: tl.constexpr,
    ROWS: tl.constexpr,
):
    bins = tl.arange(0, BINS)
    total = tl.zeros((BINS,), tl.int32)
    for start in range(0, chunks, ROWS):
        chunk = start + tl.arange(0, ROWS)
        ptrs = chunk[:, None] * BINS + bins[None, :]
        tile = tl.load(counts + ptrs, mask=(chunk < chunks)[:, None], other=0)
        before = tl.cumsum(tile, 0) - tile + total[None, :]
        tl.store(base + ptrs, before, mask=(chunk < chunks)[:, None])
        total += tl.sum(tile, 0)
    row_start = store_blocks(total, blocks, experts, capacity, BINS, BLOCK_M, CUT)
    tl.store(base + chunks * BINS + bins, row_start)


@triton.jit(do_not_specialize=["pairs", "chunks"])
def moe_sort_place_kernel(
    ids,  # [T, K]
    base,  # [chunks + 1, BINS] int32
    order,  # [S] int32, written
    pairs,
    chunks,
    experts,
    stride_it,
    stride_ik,
    TOP_K: tl.constexpr,
    BINS: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    first = tl.program_id(0) * BLOCK
    pair = first + tl.arange(0, BLOCK)
    ptrs = id_pointers(ids, pair, stride_it, stride_ik, TOP_K)
    expert = known_expert(tl.load(ptrs, mask=pair < pairs, other=-1), experts)
    valid = expert < experts
    chunk = first // CHUNK
    place = tl.load(base + chunk * BINS + expert, mask=valid, other=0)
    place += tl.load(base + chunks * BINS + expert, mask=valid, other=0)
    for start in range(chunk * CHUNK, first + 1, BLOCK):
        other = start + tl.arange(0, BLOCK)
        rival_ptrs = id_pointers(ids, other, stride_it, stride_ik, TOP_K)
        rival = known_expert(tl.load(rival_ptrs, mask=other < pairs, other=-1), experts)
        before = (rival[None, :] == expert[:, None]) & (other[None, :] < pair[:, None])
        place += tl.sum(before.to(tl.int32), 1)
    tl.store(order + place, pair, mask=valid)
