"""The rows of a chunk: which they are, and the factors that the serial kernels take them by."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def chunk_bounds(slot, cu_seqlens, sequences, tokens, C: tl.constexpr, VARLEN: tl.constexpr):
    """First row, end of the sequence and its number for a chunk slot.

    With VARLEN sequence n owns the slots from cu_seqlens[n] // C + n: ascending, never shared, and
    at most tokens // C + sequences in all, so no count has to be read back.
    """
    sequence = tl.full([], 0, tl.int64)
    first = slot.to(tl.int64) * C
    end = sequence + tokens
    if VARLEN:
        found = 0
        for block in range(0, sequences, 64):
            n = block + tl.arange(0, 64)
            starts = tl.load(cu_seqlens + n, mask=n < sequences, other=0)
            found += tl.sum(((starts // C + n <= slot) & (n < sequences)).to(tl.int32))
        sequence += found - 1
        start = tl.load(cu_seqlens + sequence).to(tl.int64)
        end = tl.load(cu_seqlens + sequence + 1).to(tl.int64)
        first = start + (slot - (start // C + sequence)) * C
    return first, end, sequence


@triton.jit
def sequence_bounds(sequence, cu_seqlens, tokens, C: tl.constexpr, VARLEN: tl.constexpr):
    """Batch, first row, end and first chunk slot of a sequence (int64), slots as above."""
    batch = sequence
    start = tl.full([], 0, tl.int64)
    end = start + tokens
    slot = start
    if VARLEN:
        batch = start
        start = tl.load(cu_seqlens + sequence).to(tl.int64)
        end = tl.load(cu_seqlens + sequence + 1).to(tl.int64)
        slot = start // C + sequence
    return batch, start, end, slot


@triton.jit
def load_factors(rows, kind, first, length, C: tl.constexpr):
    """The chunk's factors [C] of k's read and of q's; rows is at the sequence's first row.

    In one load: one of fewer values than threads would be repeated by every warp.
    """
    pair = tl.arange(0, 2 * C)
    at = rows + first + (pair // C * kind + pair % C)
    factors = tl.load(at, mask=pair % C < length - first, other=0.0)
    return tl.split(tl.trans(tl.reshape(factors, (2, C))))
