"""4-bit weights times one vector without tensor cores: a warp owns rows, its lanes their inputs.

Nothing goes through shared memory and no warp waits for another, so that a short kernel is little
more than its reads. A lane's inputs stay in registers for all rows of its warp, which bounds how
many inputs a row may have.
"""

from __future__ import annotations

import triton
import triton.language as tl

from inductor_moe.kernels.dependent import place_next, wait_for_inputs

WORDS = tl.constexpr(8)  # 16 bytes, a load of a lane
LANE_INPUTS = tl.constexpr(32)  # the codes in them

# A code at the top of a mantissa, under an exponent for which it counts ones: 256 + n if its last
# bit is bit 15, 16 + n if bit 19. $2 holds two words.
PLANE = (
    "{ .reg .b32 t, u; shl.b32 t, $2, LEFT; shr.u32 u, $2, RIGHT; "
    "lop3.b32 $0, t, MASK, BASE, 0xEA; lop3.b32 $1, u, MASK, BASE, 0xEA; }"
)
LOW, HIGH = ("0x00078000", "0x43800000"), ("0x00780000", "0x41800000")
PLANES = tl.constexpr(
    tuple(
        PLANE.replace("LEFT", left)
        .replace("RIGHT", right)
        .replace("MASK", mask)
        .replace("BASE", base)
        for left, right, mask, base in (
            ("15", "1", *LOW),
            ("15", "1", *HIGH),
            ("7", "9", *LOW),
            ("7", "9", *HIGH),
        )
    )
)


@triton.jit
def code_floats(words, PLANE: tl.constexpr):
    """[..., WORDS] int16 -> nibble PLANE of each word, plus 256 or (odd planes) 16, in fp32."""
    return tl.inline_asm_elementwise(
        PLANES[PLANE], "=r,=r,r", [words], dtype=tl.float32, is_pure=True, pack=2
    )


@triton.jit
def lane_inputs(x_ptrs):  # [LANES, R, WORDS]
    """What each lane multiplies: four planes [LANES, R, WORDS] fp32, then, both [LANES, R], the
    sum that the offsets of `code_floats` add, and the sum of the inputs."""
    x0 = tl.load(x_ptrs).to(tl.float32)
    x1 = tl.load(x_ptrs + 16).to(tl.float32)
    x2 = tl.load(x_ptrs + 32).to(tl.float32)
    x3 = tl.load(x_ptrs + 48).to(tl.float32)
    even = tl.sum(x0 + x2, 2)
    odd = tl.sum(x1 + x3, 2)
    return x0, x1, x2, x3, 256.0 * even + 16.0 * odd, even + odd


@triton.jit
def load_rows(
    w, scales, zeros, v, LANES: tl.constexpr, SPANS: tl.constexpr, GROUP: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
):  # fmt: skip
    """Of the parts v [R] of rows, for each span: words [LANES, R, WORDS], scales [LANES, R] and
    zero points [LANES, R]."""
    lane = tl.arange(0, LANES)
    part = v.to(tl.int64)
    word = lane[:, None, None] * WORDS + tl.arange(0, WORDS)[None, None, :]
    w_ptrs = w + part[None, :, None] * (SPANS * LANES * WORDS) + word
    group = (part * (SPANS * LANES * LANE_INPUTS))[None, :] + (lane // 2 * 64)[:, None]
    spans = ()
    for span in tl.static_range(SPANS):
        words = tl.load(w_ptrs + span * LANES * WORDS, eviction_policy="evict_first")
        place = (group + span * LANES * LANE_INPUTS) // GROUP
        scale = tl.load(scales + place)
        zero = tl.load(zeros + place) if HAS_ZEROS else scale
        spans = spans + ((words, scale, zero),)  # noqa: RUF005 - what Triton can read
    return spans


@triton.jit
def lane_sums(span, inputs, HAS_ZEROS: tl.constexpr):
    """[LANES, R] fp32: each lane's part of its row's product."""
    words, scale, zero = span
    x0, x1, x2, x3, offset, total = inputs
    part = code_floats(words, 0) * x0
    part += code_floats(words, 1) * x1
    part += code_floats(words, 2) * x2
    part += code_floats(words, 3) * x3
    center = zero.to(tl.float32) if HAS_ZEROS else 8.0
    return (tl.sum(part, 2) - (offset + center * total)) * scale.to(tl.float32)


@triton.jit
def part_inputs(x, r, LANES: tl.constexpr, PARTS: tl.constexpr, SPANS: tl.constexpr):
    """`lane_inputs` of the parts r [R] of rows, for each span."""
    lane = tl.arange(0, LANES)
    # A place for each part, so that loads are laid out like those of the weights.
    lane_x = lane // 2 * 64 + lane % 2 * WORDS
    part_x = r % PARTS * (SPANS * LANES * LANE_INPUTS)
    x_ptrs = x + lane_x[:, None, None] + part_x[None, :, None] + tl.arange(0, WORDS)[None, None, :]
    inputs = ()
    for span in tl.static_range(SPANS):
        loaded = lane_inputs(x_ptrs + span * LANES * LANE_INPUTS)
        inputs = inputs + (loaded,)  # noqa: RUF005
    return inputs


@triton.jit
def row_sums(
    row, inputs, HAS_ZEROS: tl.constexpr, PARTS: tl.constexpr, SPANS: tl.constexpr,
    R: tl.constexpr,
):  # fmt: skip
    """[R / PARTS] fp32: products of rows that `load_rows` has brought."""
    part = lane_sums(row[0], inputs[0], HAS_ZEROS)
    for span in tl.static_range(1, SPANS):
        part += lane_sums(row[span], inputs[span], HAS_ZEROS)
    y = tl.sum(part, 0)
    if PARTS > 1:
        y = tl.sum(tl.reshape(y, (R // PARTS, PARTS)), 1)
    return y


@triton.jit
def vector_rows(
    first,  # row of the program's first
    x,  # [K]
    w,  # [rows_w, K / 4] packed
    scales,  # [rows_w, K / GROUP]
    zeros,  # [rows_w, K / GROUP], if HAS_ZEROS
    bias,  # [rows_w], if HAS_BIAS
    out,  # [rows_w] contiguous, written
    rows_w,
    stride_b,
    HAS_BIAS: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    GROUP: tl.constexpr,  # a power of two from 64 on, no larger than a lane's row of loads
    LANES: tl.constexpr,  # of a row
    PARTS: tl.constexpr,  # warps of a row
    SPANS: tl.constexpr,  # loads of a lane for a row
    R: tl.constexpr,  # parts of rows at once: 32 / LANES for each warp
    STEPS: tl.constexpr,
    AHEAD: tl.constexpr,  # steps asked for before the first is multiplied
    EARLY: tl.constexpr,  # the caller has not waited, as these weights need no waiting
):
    """STEPS * R / PARTS rows of W @ x, where K is PARTS * SPANS * LANES * 32."""
    r = tl.arange(0, R)
    # Rows past the end repeat the last, and are not stored.
    v = first * PARTS + r
    last = (rows_w - 1) * PARTS + r % PARTS
    rows = ()
    for i in tl.static_range(AHEAD):
        own = tl.minimum(v + i * R, last)
        loaded = load_rows(w, scales, zeros, own, LANES, SPANS, GROUP, HAS_ZEROS)
        rows = rows + (loaded,)  # noqa: RUF005
    if EARLY:
        wait_for_inputs()
        place_next()
    inputs = part_inputs(x, r, LANES, PARTS, SPANS)
    n = first + tl.arange(0, R // PARTS)
    for i in tl.static_range(STEPS):
        if i + AHEAD < STEPS:
            own = tl.minimum(v + (i + AHEAD) * R, last)
            loaded = load_rows(w, scales, zeros, own, LANES, SPANS, GROUP, HAS_ZEROS)
            rows = rows + (loaded,)  # noqa: RUF005
        y = row_sums(rows[i], inputs, HAS_ZEROS, PARTS, SPANS, R)
        if HAS_BIAS:
            value = tl.load(bias + n.to(tl.int64) * stride_b, mask=n < rows_w, other=0.0)
            y += value.to(tl.float32)
        tl.store(out + n, y.to(out.dtype.element_ty), mask=n < rows_w)
        n += R // PARTS


@triton.jit
def quantized_vector_kernel(
    x,  # [K]
    w,  # [N, K / 4] packed
    scales,  # [N, K / GROUP]
    zeros,  # [N, K / GROUP], if HAS_ZEROS
    bias,  # [N], if HAS_BIAS
    out,  # [N] contiguous, written
    n_dim,
    stride_b,
    HAS_BIAS: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    GROUP: tl.constexpr,
    LANES: tl.constexpr,
    PARTS: tl.constexpr,
    SPANS: tl.constexpr,
    R: tl.constexpr,
    STEPS: tl.constexpr,
    AHEAD: tl.constexpr,
    EARLY: tl.constexpr,
):
    """A linear layer of one row: `vector_rows` has what the constants are."""
    if not EARLY:
        wait_for_inputs()
    vector_rows(
        tl.program_id(0) * (STEPS * R // PARTS), x, w, scales, zeros, bias, out, n_dim, stride_b,
        HAS_BIAS, HAS_ZEROS, GROUP, LANES, PARTS, SPANS, R, STEPS, AHEAD, EARLY,
    )  # fmt: skip
