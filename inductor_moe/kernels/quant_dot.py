"""Device functions on packed weights: codes to floats in registers, and products by groups.

Weights are the left operand, so that they go from memory to the tensor cores in registers and a
handful of tokens fills the narrow side. See `inductor_moe.reference.quant` for the layout.
"""

from __future__ import annotations

import triton
import triton.language as tl

# A nibble under a fixed exponent is an exact float: 128 + n in bf16, 1024 + n in fp16. Two codes
# a register: shift, and-or, subtract.
# One line each: Inductor copies them into a string of Python, which ends a line at an escape.
BF16_PLANE = tl.constexpr(
    "{ .reg .b32 t, one, off; shr.u32 t, $1, SHIFT; "
    "lop3.b32 t, t, 0x000F000F, 0x43004300, 0xEA; "
    "mov.b32 one, 0x3F803F80; mov.b32 off, 0xC308C308; fma.rn.bf16x2 $0, t, one, off; }"
)
FP16_PLANE = tl.constexpr(
    "{ .reg .b32 t, off; shr.u32 t, $1, SHIFT; "
    "lop3.b32 t, t, 0x000F000F, 0x64006400, 0xEA; "
    "mov.b32 off, 0x64086408; sub.f16x2 $0, t, off; }"
)
BF16_PLANES = tl.constexpr(tuple(BF16_PLANE.value.replace("SHIFT", str(4 * j)) for j in range(4)))
FP16_PLANES = tl.constexpr(tuple(FP16_PLANE.value.replace("SHIFT", str(4 * j)) for j in range(4)))


@triton.jit
def unpack_plane(words, PLANE: tl.constexpr, DTYPE: tl.constexpr):
    """[ROWS, W] int16 -> nibble PLANE of each word, minus 8, in DTYPE; W is even."""
    if tl.bfloat16 == DTYPE:
        codes = tl.inline_asm_elementwise(
            BF16_PLANES[PLANE], "=r,r", [words], dtype=tl.bfloat16, is_pure=True, pack=2
        )
    else:
        codes = tl.inline_asm_elementwise(
            FP16_PLANES[PLANE], "=r,r", [words], dtype=tl.float16, is_pure=True, pack=2
        )
    return codes


@triton.jit
def code_columns(BITS: tl.constexpr, BLOCK_K: tl.constexpr):
    """(element of a packed row, input of its first code) for BLOCK_K inputs."""
    if BITS == 4:
        word = tl.arange(0, BLOCK_K // 4)
        first = (word // 16) * 64 + word % 16
    else:
        word = tl.arange(0, BLOCK_K)
        first = word
    return word, first


@triton.jit
def group_product(
    acc,  # [..., ROWS, COLS] fp32, the sum so far
    part,  # [..., ROWS, COLS] fp32, codes (less 8 or 0) times inputs of one group
    x_sum,  # [..., COLS] fp32, the inputs of the group summed, if HAS_ZEROS
    scale_ptrs,  # [..., ROWS]
    zero_ptrs,  # [..., ROWS]
    load_row,  # [..., ROWS]
    CENTER: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
):
    """acc + scale * (part - (zero - center) * x_sum)"""
    scale = tl.load(scale_ptrs, mask=load_row, other=0.0).to(tl.float32)
    if HAS_ZEROS:
        zero = tl.load(zero_ptrs, mask=load_row, other=0.0).to(tl.float32) - CENTER
        part -= tl.expand_dims(zero, -1) * tl.expand_dims(x_sum, -2)
    return acc + tl.expand_dims(scale, -1) * part


@triton.jit
def whole_rows(
    acc,  # [ROWS, COLS] fp32, codes (less 8 or 0) times inputs
    total,  # [COLS] fp32, the inputs summed, if HAS_ZEROS
    scale_ptrs,  # [ROWS]
    zero_ptrs,  # [ROWS]
    load_row,  # [ROWS]
    BITS: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
):
    """The product with weights of one group a row, whose scales `packed_dot` leaves to the end."""
    scale = tl.load(scale_ptrs, mask=load_row, other=0.0).to(tl.float32)
    if HAS_ZEROS:
        CENTER: tl.constexpr = 8 if BITS == 4 else 0
        zero = tl.load(zero_ptrs, mask=load_row, other=0.0).to(tl.float32) - CENTER
        acc -= zero[:, None] * total[None, :]
    return acc * scale[:, None]


@triton.jit
def packed_dot(
    acc,  # [ROWS, COLS] fp32, or a batch [PARTS, ROWS, COLS] of them, as all that follows
    no_sum,  # [COLS] fp32 zeros
    w_ptrs,  # [ROWS, W] packed elements of these BLOCK_K inputs
    x_ptrs,  # [W, COLS] the inputs of the first plane
    load_w,  # [ROWS, W]
    left,  # [W, COLS] how many inputs are left from those of x_ptrs on
    load_x,  # [1, COLS] those to read, zeros in the place of others; None: all
    scale_ptrs,  # [ROWS] of the first group
    zero_ptrs,
    row_left,  # [ROWS] how many inputs of the row are left; none, where there is no row
    BITS: tl.constexpr,
    GROUP: tl.constexpr,  # inputs of a group, 0 for one group
    HAS_ZEROS: tl.constexpr,
    EVEN: tl.constexpr,  # all inputs exist, and all rows may be read
):
    """acc + W[rows, BLOCK_K inputs] @ x, a group of inputs at a time.

    BLOCK_K is 64 for groups of 16 or 32, and divides larger ones. With one group, scales wait for
    the end of the loop; then scale_ptrs is not read.
    """
    DTYPE: tl.constexpr = x_ptrs.dtype.element_ty
    CENTER: tl.constexpr = 8 if BITS == 4 else 0
    PLANES: tl.constexpr = 4 if BITS == 4 else 1
    APART: tl.constexpr = BITS == 4 and (GROUP == 16 or GROUP == 32)
    PLANES_A_GROUP: tl.constexpr = GROUP // 16 if APART else PLANES
    INPUTS: tl.constexpr = len(acc.shape) - 2
    words = tl.load(w_ptrs) if EVEN else tl.load(w_ptrs, mask=load_w, other=0)
    part = acc if GROUP == 0 else tl.zeros_like(acc)
    x_sum = no_sum
    for plane in tl.static_range(PLANES):
        if load_x is None and EVEN:
            x = tl.load(x_ptrs + 16 * plane)
        elif load_x is None:
            x = tl.load(x_ptrs + 16 * plane, mask=left > 16 * plane, other=0.0)
        else:
            exists = load_x if EVEN else load_x & (left > 16 * plane)
            x = tl.load(x_ptrs + 16 * plane, mask=exists, other=0.0)
        w = unpack_plane(words, plane, DTYPE) if BITS == 4 else words.to(DTYPE)
        part = tl.dot(w, x, part)
        if HAS_ZEROS:
            x_sum += tl.sum(x.to(tl.float32), INPUTS)
        if GROUP != 0 and plane % PLANES_A_GROUP == PLANES_A_GROUP - 1:
            acc = group_product(
                acc, part, x_sum,
                scale_ptrs + plane // PLANES_A_GROUP, zero_ptrs + plane // PLANES_A_GROUP,
                row_left > 16 * (plane + 1 - PLANES_A_GROUP), CENTER, HAS_ZEROS,
            )  # fmt: skip
            part = tl.zeros_like(acc)
            x_sum = no_sum
    return part if GROUP == 0 else acc, x_sum
