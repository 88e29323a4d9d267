"""Pairs ordered by expert, without a host sync and without float or order-dependent atomics.

Two arrays come out. `order` [S] holds the pairs, expert by expert, and in pair order within one
expert; ids outside [0, E) take no place. `blocks` [3, capacity] cuts each expert's run into blocks
of at most BLOCK_M rows: expert (-1 where the upper-bound grid has no work), first row, row count.
"""

from __future__ import annotations

import triton
import triton.language as tl

from inductor_moe.kernels.dependent import wait_for_inputs


# Loads stay in the kernels: torch's mutation analysis takes a device function's pointers for
# written ones.
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
    capacity,
    BINS: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Cut each expert's rows into blocks; returns the first row of each expert, [BINS]."""
    expert = tl.arange(0, BINS)
    cuts = (counts + (BLOCK_M - 1)) // BLOCK_M
    first_cut = tl.cumsum(cuts, 0) - cuts
    row_start = tl.cumsum(counts, 0) - counts
    for cut in range(0, tl.max(cuts, 0)):
        b = first_cut + cut
        rows = counts - cut * BLOCK_M
        has = rows > 0
        tl.store(blocks + b, expert, mask=has)
        tl.store(blocks + capacity + b, row_start + cut * BLOCK_M, mask=has)
        tl.store(blocks + 2 * capacity + b, tl.minimum(rows, BLOCK_M), mask=has)
    used = tl.sum(cuts, 0)
    for start in range(0, capacity, BINS):
        b = start + expert
        tl.store(blocks + b, -1, mask=(b >= used) & (b < capacity))
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
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """One launch for a few thousand pairs: a pair's place is how many pairs come before it.

    The last program makes the blocks, the others each place BLOCK pairs.
    """
    wait_for_inputs()
    if tl.program_id(0) == tl.num_programs(0) - 1:
        counts = tl.zeros((BINS,), tl.int32)
        for start in range(0, pairs, 1024):
            pair = start + tl.arange(0, 1024)
            ptrs = id_pointers(ids, pair, stride_it, stride_ik, TOP_K)
            expert = known_expert(tl.load(ptrs, mask=pair < pairs, other=-1), experts)
            counts += tl.histogram(expert, BINS, mask=expert < experts)
        store_blocks(counts, blocks, capacity, BINS, BLOCK_M)
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
    wait_for_inputs()
    chunk = tl.program_id(0)
    pair = chunk * CHUNK + tl.arange(0, CHUNK)
    ptrs = id_pointers(ids, pair, stride_it, stride_ik, TOP_K)
    expert = known_expert(tl.load(ptrs, mask=pair < pairs, other=-1), experts)
    count = tl.histogram(expert, BINS, mask=expert < experts)
    tl.store(counts + chunk * BINS + tl.arange(0, BINS), count)


@triton.jit(do_not_specialize=["chunks"])
def moe_sort_scan_kernel(
    counts,  # [chunks, BINS] int32
    base,  # [chunks, BINS] int32, written: the sum of earlier chunks' counts
    totals,  # [2, BINS] int32, the first row written
    chunks,
    BINS: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
):
    wait_for_inputs()
    expert = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((COLUMNS,), tl.int32)
    for start in range(0, chunks, ROWS):
        chunk = start + tl.arange(0, ROWS)
        at = chunk[:, None] * BINS + expert[None, :]
        exists = (chunk < chunks)[:, None]
        tile = tl.load(counts + at, mask=exists, other=0)
        tl.store(base + at, tl.cumsum(tile, 0) - tile + total[None, :], mask=exists)
        total += tl.sum(tile, 0)
    tl.store(totals + expert, total)


@triton.jit(do_not_specialize=["capacity"])
def moe_sort_blocks_kernel(
    totals,  # [2, BINS] int32: pairs of each expert; second row written: each expert's first row
    blocks,  # [3, capacity] int32, written
    capacity,
    BINS: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    wait_for_inputs()
    expert = tl.arange(0, BINS)
    row_start = store_blocks(tl.load(totals + expert), blocks, capacity, BINS, BLOCK_M)
    tl.store(totals + BINS + expert, row_start)


@triton.jit(do_not_specialize=["pairs"])
def moe_sort_place_kernel(
    ids,  # [T, K]
    base,  # [chunks, BINS] int32, pairs of the same expert in earlier chunks
    totals,  # [2, BINS] int32, second row: each expert's first row
    order,  # [S] int32, written
    pairs,
    experts,
    stride_it,
    stride_ik,
    TOP_K: tl.constexpr,
    BINS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    wait_for_inputs()
    chunk = tl.program_id(0)
    pair = chunk * CHUNK + tl.arange(0, CHUNK)
    ptrs = id_pointers(ids, pair, stride_it, stride_ik, TOP_K)
    expert = known_expert(tl.load(ptrs, mask=pair < pairs, other=-1), experts)
    valid = expert < experts
    place = tl.load(base + chunk * BINS + expert, mask=valid, other=0)
    place += tl.load(totals + BINS + expert, mask=valid, other=0)
    # The same ids again, along the other axis: cheaper than moving them between threads.
    rival_pair = chunk * CHUNK + tl.arange(0, CHUNK)
    rival_ptrs = id_pointers(ids, rival_pair, stride_it, stride_ik, TOP_K)
    rival = known_expert(tl.load(rival_ptrs, mask=rival_pair < pairs, other=-1), experts)
    before = (rival[None, :] == expert[:, None]) & (rival_pair[None, :] < pair[:, None])
    place += tl.sum(before.to(tl.int32), 1)
    tl.store(order + place, pair, mask=valid)
