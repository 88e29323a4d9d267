"""Device functions of the expert kernels: which rows a tile holds, where, and the activation."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def up_rows(block, inner, GATE: tl.constexpr, W_INNER: tl.constexpr, BLOCK_N: tl.constexpr):
    """Rows of w_up in one tile, [BLOCK_N], and which exist.

    A gated tile holds BLOCK_N / 2 gate rows and their up rows. Weights contiguous in H may visit
    rows in any order, so chunked halves are paired like interleaved ones and splitting the
    accumulator stays in registers; weights contiguous in N keep each half a run.
    """
    r = tl.arange(0, BLOCK_N)
    if GATE == "none":
        n = block * BLOCK_N + r
        exists = n < inner
    elif GATE == "interleaved":
        n = block * BLOCK_N + r
        exists = n < 2 * inner
    else:
        HALF: tl.constexpr = BLOCK_N // 2
        if W_INNER != "n":
            i = block * HALF + r // 2
            n = i + (r % 2) * inner
        else:
            i = block * HALF + r % HALF
            n = i + (r // HALF) * inner
        exists = i < inner
    return n, exists


@triton.jit
def shared_rows(n, inner, first, GATE: tl.constexpr):
    """(half, row): where rows n of w_up would lie in a gate (0) and an up (1) weight apart.

    first  the row of both that stands for the first of `inner`
    """
    if GATE == "none":
        half = tl.zeros_like(n) + 1
        i = n
    elif GATE == "interleaved":
        half = n % 2
        i = n // 2
    else:
        half = n // inner
        i = n % inner
    return half, first + i


@triton.jit
def weight_offsets(n, k, stride_n, stride_k, W_INNER: tl.constexpr):
    """Offsets of rows n and columns k in one expert; W_INNER says which stride is 1, if any."""
    n_offset = n.to(tl.int64)
    k_offset = k.to(tl.int64)
    if W_INNER != "n":
        n_offset *= stride_n
    if W_INNER != "k":
        k_offset *= stride_k
    return n_offset, k_offset


@triton.jit
def activate_tile(value, ACTIVATION: tl.constexpr, ALPHA: tl.constexpr):
    if ACTIVATION == "silu":
        value = value * tl.sigmoid(value * ALPHA)
    elif ACTIVATION == "gelu":
        value = 0.5 * value * (1.0 + tl.erf(value * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        # 0.5 * (1 + tanh(z)) is sigmoid(2 * z)
        z = 1.5957691216057308 * (value + 0.044715 * value * value * value)
        value = value * tl.sigmoid(z)
    elif ACTIVATION == "relu":
        value = tl.maximum(value, 0.0)
    elif ACTIVATION == "relu2":
        value = tl.maximum(value, 0.0)
        value = value * value
    else:
        tl.static_assert(ACTIVATION == "identity")
    return value


@triton.jit
def activate_ungated(up, ACTIVATION: tl.constexpr, ALPHA: tl.constexpr, LIMIT: tl.constexpr):
    if LIMIT > 0:
        up = tl.minimum(up, LIMIT)
    return activate_tile(up, ACTIVATION, ALPHA)


@triton.jit
def activate_halves(
    gate_half, up_half, ACTIVATION: tl.constexpr, ALPHA: tl.constexpr, UP_OFFSET: tl.constexpr,
    LIMIT: tl.constexpr,
):  # fmt: skip
    if LIMIT > 0:
        gate_half = tl.minimum(gate_half, LIMIT)
        up_half = tl.minimum(tl.maximum(up_half, -LIMIT), LIMIT)
    return activate_tile(gate_half, ACTIVATION, ALPHA) * (up_half + UP_OFFSET)


@triton.jit
def gated_activation_tile(
    up,  # [ROWS, BLOCK_N] fp32, columns in the order of up_rows
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    GATE: tl.constexpr,
    W_INNER: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ALPHA: tl.constexpr,
    UP_OFFSET: tl.constexpr,
    LIMIT: tl.constexpr,  # 0 for none
):
    """[ROWS, BLOCK_N] -> [ROWS, BLOCK_N], or [ROWS, BLOCK_N / 2] when gated."""
    if GATE == "none":
        out = activate_ungated(up, ACTIVATION, ALPHA, LIMIT)
    else:
        if GATE == "chunked" and W_INNER == "n":
            halves = tl.permute(tl.reshape(up, (ROWS, 2, BLOCK_N // 2)), (0, 2, 1))
        else:
            halves = tl.reshape(up, (ROWS, BLOCK_N // 2, 2))
        gate_half, up_half = tl.split(halves)
        out = activate_halves(gate_half, up_half, ACTIVATION, ALPHA, UP_OFFSET, LIMIT)
    return out
