"""A sum over the ranks of one host as one launch, through memory that the ranks' GPUs share.

Each rank stores its words straight into every peer's slots and waits for theirs in its own. A slot
holds 32 bits of data and the number of the call, its epoch, in one 64-bit word, which is stored
and loaded as a whole: data needs no barrier, for it comes with the flag that says whose it is.

Two sets of slots, by the epoch's parity, are enough. A rank that sends epoch e has received all
words of e - 1; their senders had read all of e - 2 before they sent any, as a rank's calls follow
one another in its stream. So what e overwrites, the words of e - 2, has been read. Programs
number their calls each for itself and have slots of their own, so this holds for each of them
whatever their number is from call to call. The words of e - 2k that a shorter call left in place
are told apart by the number, until it has gone round once.
"""

from __future__ import annotations

import triton
import triton.language as tl

from inductor_moe.kernels.dependent import wait_for_inputs

# One line each: Inductor puts a kernel's constants into a string of its own.
# $1 address, $2 data, $3 epoch, $4 whether there is such a word
SEND: tl.constexpr = tl.constexpr(
    "{ .reg .pred active; .reg .b64 word; "
    "setp.ne.b32 active, $4, 0; "
    "mov.b64 word, {$2, $3}; "
    "@active st.relaxed.sys.global.b64 [$1], word; "
    "mov.b32 $0, 0; }"
)
# $1 address, $2 epoch, $3 whether there is such a word, $4 nanoseconds; $0 its data
RECEIVE: tl.constexpr = tl.constexpr(
    "{ .reg .pred done, late; .reg .b64 word; .reg .b32 data, flag; .reg .u64 start, now; "
    "mov.b32 data, 0; "
    "setp.eq.b32 done, $3, 0; "
    "@done bra FOUND; "
    "ld.relaxed.sys.global.b64 word, [$1]; "
    "mov.b64 {data, flag}, word; "
    "setp.eq.b32 done, flag, $2; "
    "@done bra FOUND; "
    "mov.u64 start, %globaltimer; "
    "WAIT: ld.relaxed.sys.global.b64 word, [$1]; "
    "mov.b64 {data, flag}, word; "
    "setp.eq.b32 done, flag, $2; "
    "@done bra FOUND; "
    "mov.u64 now, %globaltimer; "
    "sub.u64 now, now, start; "
    "setp.gt.u64 late, now, $4; "
    "@!late bra WAIT; "
    "trap; "
    "FOUND: mov.b32 $0, data; }"
)


@triton.jit
def all_reduce_kernel(
    x,  # [N] contiguous, N * itemsize is 4 * words
    out,  # [N] x.dtype, contiguous, written
    slots,  # [RANKS] int64, the address of each rank's [PROGRAMS, 2, RANKS, ROOM] 64-bit slots
    epochs,  # [PROGRAMS] int32, the calls so far, counted up
    words,
    timeout,  # ns to wait for a word before the kernel ends in an error
    RANK: tl.constexpr,
    RANKS: tl.constexpr,
    ROOM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    wait_for_inputs()
    DTYPE: tl.constexpr = x.dtype.element_ty
    program = tl.program_id(0)
    lane = tl.arange(0, BLOCK)
    at = program * BLOCK + lane
    inside = at < words
    active = inside.to(tl.int32)
    epoch = tl.load(epochs + program) + 1
    mine = tl.load(x.to(tl.pointer_type(tl.int32), bitcast=True) + at, mask=inside, other=0)
    place = (((program * 2 + (epoch & 1)) * RANKS) * ROOM + lane).to(tl.int64) * 8
    for step in tl.static_range(1, RANKS):
        address = tl.load(slots + (RANK + step) % RANKS) + place + RANK * ROOM * 8
        tl.inline_asm_elementwise(
            SEND, "=r,l,r,r,r", [address, mine, epoch, active], dtype=tl.int32, is_pure=False,
            pack=1,
        )  # fmt: skip
    own = tl.load(slots + RANK) + place
    limit = tl.zeros((BLOCK,), tl.int64) + timeout
    low = tl.zeros((BLOCK,), tl.float32)
    high = tl.zeros((BLOCK,), tl.float32)
    # In the order of the ranks on each of them, so that all have the same sum to the bit.
    for sender in tl.static_range(RANKS):
        if sender == RANK:
            word = mine
        else:
            word = tl.inline_asm_elementwise(
                RECEIVE, "=r,l,r,r,l", [own + sender * ROOM * 8, epoch, active, limit],
                dtype=tl.int32, is_pure=False, pack=1,
            )  # fmt: skip
        if tl.float32 == DTYPE:
            low += word.to(tl.float32, bitcast=True)
        else:
            low += word.to(tl.int16).to(DTYPE, bitcast=True).to(tl.float32)
            high += (word >> 16).to(tl.int16).to(DTYPE, bitcast=True).to(tl.float32)
    if tl.float32 == DTYPE:
        total = low.to(tl.int32, bitcast=True)
    else:
        first = low.to(DTYPE).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
        total = first | (high.to(DTYPE).to(tl.int16, bitcast=True).to(tl.int32) << 16)
    tl.store(out.to(tl.pointer_type(tl.int32), bitcast=True) + at, total, mask=inside)
    # No warp may still have to read the count that another has put up.
    tl.debug_barrier()
    tl.store(epochs + program, epoch)
