"""The short convolution of one decoded token, and its state: the inputs that it still needs."""

from __future__ import annotations

import triton
import triton.language as tl

from inductor_moe.kernels.dependent import prefetch_lines


@triton.jit
def load_window(
    x, conv_state,          # [C], [C, L]
    weight, bias,           # [C, W], [C]
    channel, inside,        # [BLOCK]
    state_c, state_l, weight_c, weight_w,
    L: tl.constexpr, W: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """silu of the convolution at channel [BLOCK]: W - 1 taps meet the state, the last one x.

    Tap by tap: a [BLOCK, W] tile would impose its layout on the recurrent state.
    """
    weight += channel * weight_c
    conv_state += channel * state_c + (L + 1 - W) * state_l
    out = tl.load(x + channel, mask=inside, other=0.0).to(tl.float32)
    out *= tl.load(weight + (W - 1) * weight_w, mask=inside, other=0.0).to(tl.float32)
    if HAS_BIAS:
        out += tl.load(bias + channel, mask=inside, other=0.0).to(tl.float32)
    for tap in tl.static_range(W - 1):
        held = tl.load(conv_state + tap * state_l, mask=inside, other=0.0).to(tl.float32)
        out += held * tl.load(weight + tap * weight_w, mask=inside, other=0.0).to(tl.float32)
    return out * tl.sigmoid(out)


@triton.jit
def prefetch_window(conv_weight, conv_state, channel, weight_c, state_c):
    """Before `wait_for_inputs`: the lines of channel [BLOCK] that `load_window` reads."""
    prefetch_lines(conv_weight + channel * weight_c)
    prefetch_lines(conv_state + channel * state_c)


@triton.jit
def shifted_window(
    x, conv_state, channel, inside, state_c, state_l,
    L: tl.constexpr, BLOCK_L: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """The state of channel [BLOCK] without its oldest input and with x, for `store_window`.

    From L2, where all writes are seen: this may be read before `wait_for_inputs`.
    """
    new = tl.load(x + channel, mask=inside, other=0.0, cache_modifier=".cg")
    new = new.to(conv_state.dtype.element_ty)
    if PACKED:
        # four 16-bit inputs, contiguous, are one word
        words = conv_state.to(tl.pointer_type(tl.int64)) + channel
        word = tl.load(words, mask=inside, other=0, cache_modifier=".cg")
        shifted = (word >> 16) & 0xFFFFFFFFFFFF
        shifted |= new.to(tl.int16, bitcast=True).to(tl.int64) << 48
    else:
        tap = tl.arange(0, BLOCK_L)
        at = conv_state + channel[:, None] * state_c + (tap + 1)[None, :] * state_l
        mask = inside[:, None] & (tap < L - 1)[None, :]
        moved = tl.load(at, mask=mask, other=0.0, cache_modifier=".cg")
        shifted = tl.where((tap == L - 1)[None, :], new[:, None], moved)
    return shifted


@triton.jit
def store_window(
    shifted, conv_state, channel, inside, state_c, state_l,
    L: tl.constexpr, BLOCK_L: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    if PACKED:
        tl.store(conv_state.to(tl.pointer_type(tl.int64)) + channel, shifted, mask=inside)
    else:
        tap = tl.arange(0, BLOCK_L)
        at = conv_state + channel[:, None] * state_c + tap[None, :] * state_l
        # another thread of this program may still have to load what this one stores
        tl.debug_barrier()
        tl.store(at, shifted, mask=inside[:, None] & (tap < L)[None, :])


@triton.jit
def shift_window(
    x, conv_state, channel, inside, state_c, state_l,
    L: tl.constexpr, BLOCK_L: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """Drop the oldest input of channel [BLOCK] and append x, in place."""
    shifted = shifted_window(
        x, conv_state, channel, inside, state_c, state_l, L, BLOCK_L, PACKED
    )  # fmt: skip
    store_window(shifted, conv_state, channel, inside, state_c, state_l, L, BLOCK_L, PACKED)
