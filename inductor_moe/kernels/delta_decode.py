"""One decoded token of a delta-rule layer, from the convolution's input to the gated norm.

A program owns a block of the value channels ("columns") that read one key head, and convolves the
head's queries and keys itself. They are shared between programs, so the shifted convolution state
may be stored only where one program owns all columns of the key head: then one launch does
everything. Otherwise a second one shifts the state, and normalises where no block is a whole head.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from inductor_moe.kernels.delta_launch import Tile, inner_contiguous, padded, strides, traced
from inductor_moe.kernels.delta_window import (
    load_window,
    prefetch_window,
    shift_window,
    shifted_window,
    store_window,
)
from inductor_moe.kernels.dependent import place_next, prefetch_lines, wait_for_inputs


@triton.jit
def softplus(x):
    return tl.maximum(x, 0.0) + tl.log(1.0 + tl.exp(-tl.abs(x)))


@triton.jit
def activated(gate, SILU: tl.constexpr):
    gate = gate.to(tl.float32)
    return gate * tl.sigmoid(gate) if SILU else tl.sigmoid(gate)


@triton.jit
def add_two(a0, a1, b0, b1):
    return a0 + b0, a1 + b1


@triton.jit
def add_three(a0, a1, a2, b0, b1, b2):
    return a0 + b0, a1 + b1, a2 + b2


@triton.jit
def delta_decode_kernel(
    qkv,                    # [B, C]
    conv_state,             # [S, C, L], shifted in place with SHIFT
    conv_weight, conv_bias,  # [C, W], [C]
    a, b,                   # [B, HV] or [B, HV, K] (PER_CHANNEL), [B, HV]
    A_log, dt_bias,         # [HV]; [HV] or [HV, K]
    state,                  # [S, HV, K, V], updated in place
    z, norm_weight,         # [B, HV, V], [V] with NORM
    out,                    # [B, HV, V]
    slots,                  # [B] with SLOTS
    heads,
    SCALE: tl.constexpr, EPS: tl.constexpr, NORM_EPS: tl.constexpr,
    GATE_LOWER_BOUND: tl.constexpr, BETA_SCALE: tl.constexpr,
    qkv_b, conv_b, conv_c, conv_l, weight_c, weight_w,
    a_b, a_h, a_k, b_b, b_h, A_h, dt_h, dt_k,
    state_b, state_h, state_k, z_b, z_h, out_b, out_h,
    GROUP: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    L: tl.constexpr, W: tl.constexpr, BLOCK_L: tl.constexpr,
    SHIFT: tl.constexpr, PACKED: tl.constexpr, HAS_BIAS: tl.constexpr, PER_CHANNEL: tl.constexpr,
    SOFTPLUS: tl.constexpr, GIVEN: tl.constexpr, HAS_DT_BIAS: tl.constexpr,
    NORMALIZE: tl.constexpr, NORM: tl.constexpr, GATED: tl.constexpr, SILU: tl.constexpr,
    SLOTS: tl.constexpr,
):  # fmt: skip
    key_head = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    dk = tl.arange(0, BLOCK_K)
    in_k = dk < K
    # one value head a block where that can be: its gates are then scalars
    ONE_HEAD: tl.constexpr = V % BLOCK_V == 0
    block = tl.program_id(0)
    column = tl.arange(0, BLOCK_V)
    if ONE_HEAD:
        head = key_head * GROUP + block // (V // BLOCK_V)
        dv = block % (V // BLOCK_V) * BLOCK_V + column
    else:
        head = key_head * GROUP + (block * BLOCK_V + column) // V
        dv = (block * BLOCK_V + column) % V
    inside = block * BLOCK_V + column < GROUP * V
    in_head = None if ONE_HEAD else inside
    if ONE_HEAD and not SLOTS:
        rows = batch * state_b + tl.minimum(dk, K - 1) * state_k + head * state_h
        prefetch_lines(state + rows + block % (V // BLOCK_V) * BLOCK_V)
    # A tile of few rows: all its programs wait at once.
    if ONE_HEAD and not SLOTS and BLOCK_K * BLOCK_V <= 2048:
        windows = conv_state + batch * conv_b
        channel = key_head * K + tl.minimum(dk, K - 1)
        prefetch_window(conv_weight, windows, channel, weight_c, conv_c)
        prefetch_window(conv_weight, windows, channel + heads * K, weight_c, conv_c)
        channel = tl.minimum(2 * heads * K + head * V + dv, 2 * heads * K + heads * GROUP * V - 1)
        prefetch_window(conv_weight, windows, channel, weight_c, conv_c)
        if not GIVEN:
            prefetch_lines(A_log + head * A_h + column * 0)
            if HAS_DT_BIAS:
                prefetch_lines(dt_bias + head * dt_h + column * 0)
    wait_for_inputs()
    place_next()
    out += batch * out_b + head * out_h + dv
    slot = batch
    if SLOTS:
        slot = tl.load(slots + batch).to(tl.int64)
        if slot < 0:
            tl.store(out, tl.zeros([BLOCK_V], tl.float32).to(out.dtype.element_ty), mask=inside)
            return

    # every load first: a reduction's barrier would put each behind the last one's latency
    state_column = head * state_h + dv
    state += slot * state_b + dk[:, None] * state_k + state_column[None, :]
    in_state = in_k[:, None] & inside[None, :]
    current = tl.load(state, mask=in_state, other=0.0).to(tl.float32)
    strength = tl.load(b + batch * b_b + head * b_h, mask=in_head).to(tl.float32)
    a += batch * a_b
    if PER_CHANNEL and ONE_HEAD:
        gate_cell = head * a_h + dk * a_k
        bias_cell = head * dt_h + dk * dt_k
        in_gate = in_k
    elif PER_CHANNEL:
        gate_cell = dk[:, None] * a_k + (head * a_h)[None, :]
        bias_cell = dk[:, None] * dt_k + (head * dt_h)[None, :]
        in_gate = in_state
    else:
        gate_cell = head * a_h
        bias_cell = head * dt_h
        in_gate = in_head
    decay = tl.load(a + gate_cell, mask=in_gate).to(tl.float32)
    if not GIVEN:
        if HAS_DT_BIAS:
            decay += tl.load(dt_bias + bias_cell, mask=in_gate).to(tl.float32)
        rate = tl.exp(tl.load(A_log + head * A_h, mask=in_head).to(tl.float32))
        if PER_CHANNEL and not ONE_HEAD:
            rate = rate[None, :]
        if SOFTPLUS:
            decay = -rate * softplus(decay)
        else:
            decay = GATE_LOWER_BOUND * tl.sigmoid(rate * decay)
        strength = tl.sigmoid(strength) * BETA_SCALE
    decay = tl.exp(decay)
    if PER_CHANNEL and ONE_HEAD:
        decay = decay[:, None]
    if not PER_CHANNEL and not ONE_HEAD:
        decay = decay[None, :]
    if NORM:
        amplify = tl.load(norm_weight + dv, mask=inside, other=0.0).to(tl.float32)
        if GATED:
            gate = tl.load(z + batch * z_b + head * z_h + dv, mask=inside, other=0.0)
            amplify *= activated(gate, SILU)
    qkv += batch * qkv_b
    conv_state += slot * conv_b
    query_channel = key_head * K + dk
    key_channel = query_channel + heads * K
    value_channel = 2 * heads * K + head * V + dv
    query = load_window(
        qkv, conv_state, conv_weight, conv_bias, query_channel, in_k,
        conv_c, conv_l, weight_c, weight_w, L, W, HAS_BIAS,
    )  # fmt: skip
    key = load_window(
        qkv, conv_state, conv_weight, conv_bias, key_channel, in_k,
        conv_c, conv_l, weight_c, weight_w, L, W, HAS_BIAS,
    )  # fmt: skip
    value = load_window(
        qkv, conv_state, conv_weight, conv_bias, value_channel, inside,
        conv_c, conv_l, weight_c, weight_w, L, W, HAS_BIAS,
    )  # fmt: skip

    # Every sum at once, of keys and queries as they are: each round of sums takes a barrier.
    query_square, key_square, overlap = tl.reduce(
        (query * query, key * key, query * key), 0, add_three
    )
    query_scale = SCALE
    key_scale = 1.0
    if NORMALIZE:
        query_scale *= tl.rsqrt(query_square + EPS)
        key_scale = tl.rsqrt(key_square + EPS)
    current *= decay
    # both reads of the decayed state together: S^T q after the write is S^T q + (k . q) d
    read_key, read_query = tl.reduce(
        (current * key[:, None], current * query[:, None]), 0, add_two
    )
    delta = (value - read_key * key_scale) * strength
    result = (read_query + overlap * key_scale * delta) * query_scale
    current += (key * key_scale)[:, None] * delta[None, :]
    tl.store(state, current.to(state.dtype.element_ty), mask=in_state)
    if NORM:
        HEADS: tl.constexpr = BLOCK_V // V
        square = tl.sum(tl.reshape(result * result, (HEADS, V)), 1) / V + NORM_EPS
        square = tl.broadcast_to(tl.rsqrt(square)[:, None], (HEADS, V))
        result *= tl.reshape(square, (BLOCK_V,)) * amplify
    tl.store(out, result.to(out.dtype.element_ty), mask=inside)
    if SHIFT:
        shift_window(qkv, conv_state, query_channel, in_k, conv_c, conv_l, L, BLOCK_L, PACKED)
        shift_window(qkv, conv_state, key_channel, in_k, conv_c, conv_l, L, BLOCK_L, PACKED)
        shift_window(qkv, conv_state, value_channel, inside, conv_c, conv_l, L, BLOCK_L, PACKED)


@triton.jit
def delta_decode_tail_kernel(
    qkv, conv_state,        # [B, C], [S, C, L], shifted in place
    x, out,                 # [B, HV, V] with NORM; x fp32
    z, norm_weight,         # [B, HV, V], [V] with NORM
    slots,                  # [B] with SLOTS
    channels,
    NORM_EPS: tl.constexpr,
    qkv_b, conv_b, conv_c, conv_l, x_b, x_h, z_b, z_h, out_b, out_h,
    V: tl.constexpr, BLOCK_V: tl.constexpr, L: tl.constexpr, BLOCK_L: tl.constexpr,
    BLOCK_C: tl.constexpr, PACKED: tl.constexpr,
    NORM: tl.constexpr, GATED: tl.constexpr, SILU: tl.constexpr,
    SLOTS: tl.constexpr,
):  # fmt: skip
    """Norm of one value head, and the shift of BLOCK_C channels.

    All that it reads but x is read by `delta_decode_kernel` as well, which writes none of it, so
    that only x is waited for.
    """
    head = tl.program_id(0)
    batch = tl.program_id(1).to(tl.int64)
    if NORM:
        dv = tl.arange(0, BLOCK_V)
        inside = dv < V
        amplify = tl.load(norm_weight + dv, mask=inside, other=0.0).to(tl.float32)
        if GATED:
            gates = z + batch * z_b + head * z_h + dv
            gate = tl.load(gates, mask=inside, other=0.0, cache_modifier=".cg")
            amplify *= activated(gate, SILU)
    slot = batch
    if SLOTS:
        slot = tl.load(slots + batch, cache_modifier=".cg").to(tl.int64)
    channel = head * BLOCK_C + tl.arange(0, BLOCK_C)
    in_slot = (channel < channels) & (slot >= 0)
    conv_state += slot * conv_b
    shifted = shifted_window(
        qkv + batch * qkv_b, conv_state, channel, in_slot, conv_c, conv_l, L, BLOCK_L, PACKED
    )  # fmt: skip
    wait_for_inputs()
    place_next()
    if NORM:
        result = tl.load(x + batch * x_b + head * x_h + dv, mask=inside, other=0.0)
        result *= tl.rsqrt(tl.sum(result * result) / V + NORM_EPS) * amplify
        at = out + batch * out_b + head * out_h + dv
        tl.store(at, result.to(out.dtype.element_ty), mask=inside)
    store_window(shifted, conv_state, channel, in_slot, conv_c, conv_l, L, BLOCK_L, PACKED)


def decode_tile(key_width: int, columns: int, batch: int | None) -> Tile:
    """Few rows: small tiles, for latency. Many: eight loads a thread in flight, for bandwidth."""
    block_k = padded(key_width)
    elements = 8192 if batch is None or batch > 8 else 4096 if batch > 2 else 2048
    block_v = min(padded(columns), max(16, elements // block_k))
    return Tile(block_k, block_v, 2 if block_k * block_v <= 2048 else 4)


def delta_decode(
    qkv: Tensor,
    conv_state: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    A_log: Tensor | None,
    dt_bias: Tensor | None,
    recurrent_state: Tensor,
    z: Tensor | None,
    norm_weight: Tensor | None,
    slots: Tensor | None,
    scale: float,
    l2norm_eps: float | None = 1e-6,
    norm_eps: float = 1e-6,
    norm_activation: str = "silu",
    gate: str = "softplus",
    gate_lower_bound: float = 0.0,
    beta_scale: float = 1.0,
    tile: Tile | None = None,
    batch_hint: int | None = None,
) -> Tensor:
    """`inductor_moe::delta_decode`, both states written in place, by launches make_fx can trace.

    recurrent_state must be contiguous in its last dim: it is written where it lies. batch_hint
    chooses the tile where B is symbolic.
    """
    if recurrent_state.stride(-1) != 1:
        raise ValueError(
            f"delta_decode: recurrent_state has strides {recurrent_state.stride()}; the last "
            "must be 1."
        )
    qkv = inner_contiguous(qkv)
    z = None if z is None else inner_contiguous(z)
    batch, channels = qkv.shape
    _, value_heads, key_width, value_width = recurrent_state.shape
    heads = (channels - value_heads * value_width) // (2 * key_width)
    columns = value_heads // heads * value_width
    if batch_hint is None and isinstance(batch, int):
        batch_hint = batch
    tile = tile or decode_tile(key_width, columns, batch_hint)
    taps, length = conv_weight.shape[1], conv_state.shape[2]
    block_l = triton.next_power_of_2(length)
    packed = (
        length == 4
        and conv_state.dtype.itemsize == 2
        and tuple(conv_state.stride()[1:]) == (4, 1)
        and conv_state.stride(0) % 4 == 0
        and conv_state.storage_offset() % 4 == 0
    )
    alone = tile.value >= columns
    norm = norm_weight is not None
    whole_heads = tile.value % value_width == 0 and padded(value_width) == value_width
    norm_inside = norm and whole_heads
    silu = norm_activation == "silu"
    out = torch.empty((batch, value_heads, value_width), dtype=qkv.dtype, device=qkv.device)
    result = out if norm_inside or not norm else torch.empty_like(out, dtype=torch.float32)
    shift_inside = alone and (norm_inside or not norm)
    traced(delta_decode_kernel)[(triton.cdiv(columns, tile.value), heads, batch)](
        qkv, conv_state, conv_weight, conv_bias, a, b, A_log, dt_bias, recurrent_state,
        z, norm_weight, result, slots,
        heads, scale, l2norm_eps or 0.0, norm_eps, gate_lower_bound, beta_scale,
        *strides(qkv, 1), *strides(conv_state, 3), *strides(conv_weight, 2),
        *strides(a, 2), a.stride(2) if a.dim() == 3 else 0, *strides(b, 2),
        *strides(A_log, 1), *strides(dt_bias, 1),
        dt_bias.stride(1) if dt_bias is not None and dt_bias.dim() == 2 else 0,
        *strides(recurrent_state, 3), *strides(z, 2), *strides(result, 2),
        GROUP=value_heads // heads, K=key_width, V=value_width,
        BLOCK_K=tile.key, BLOCK_V=tile.value, L=length, W=taps, BLOCK_L=block_l,
        SHIFT=shift_inside, PACKED=packed, HAS_BIAS=conv_bias is not None,
        PER_CHANNEL=a.dim() == 3,
        SOFTPLUS=gate == "softplus", GIVEN=gate == "given", HAS_DT_BIAS=dt_bias is not None,
        NORMALIZE=l2norm_eps is not None, NORM=norm_inside, GATED=z is not None, SILU=silu,
        SLOTS=slots is not None, num_warps=tile.warps,
    )  # fmt: skip
    if not shift_inside:
        block_c = triton.next_power_of_2(triton.cdiv(channels, value_heads))
        traced(delta_decode_tail_kernel)[(value_heads, batch)](
            qkv, conv_state, result, out, z, norm_weight, slots, channels, norm_eps,
            *strides(qkv, 1), *strides(conv_state, 3), *strides(result, 2), *strides(z, 2),
            *strides(out, 2),
            V=value_width, BLOCK_V=padded(value_width), L=length, BLOCK_L=block_l,
            BLOCK_C=block_c, PACKED=packed,
            NORM=norm and not norm_inside, GATED=z is not None, SILU=silu,
            SLOTS=slots is not None, num_warps=4,
        )  # fmt: skip
    return out
