"""The delta rule token by token with the state in registers: short inputs, and any length."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from inductor_moe.kernels.delta_launch import Tile, inner_contiguous, padded, strides, traced
from inductor_moe.kernels.dependent import wait_for_inputs


@triton.jit
def delta_recurrent_kernel(
    q, k,                   # [B, T, H, K]
    v, o,                   # [B, T, HV, V]
    g,                      # [B, T, HV] (GATE 1), [B, T, HV, K] (GATE 2), absent (GATE 0)
    beta,                   # [B, T, HV]
    state, final,           # [N, HV, K, V]; state absent without HAS_STATE
    cu_seqlens,             # [N + 1] with VARLEN
    tokens,
    SCALE: tl.constexpr, EPS: tl.constexpr,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, o_b, o_t, o_h,
    g_b, g_t, g_h, beta_b, beta_t, beta_h,
    state_b, state_h, state_k, final_b, final_h, final_k,
    GROUP: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    GATE: tl.constexpr, NORMALIZE: tl.constexpr, HAS_STATE: tl.constexpr, VARLEN: tl.constexpr,
):  # fmt: skip
    wait_for_inputs()
    head = tl.program_id(1)
    sequence = tl.program_id(2).to(tl.int64)
    key_head = head // GROUP
    dk = tl.arange(0, BLOCK_K)
    dv = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)
    in_k = dk < K
    in_v = dv < V
    in_state = in_k[:, None] & in_v[None, :]
    batch = sequence
    start = tl.full([], 0, tl.int64)
    end = start + tokens
    if VARLEN:
        batch = start
        start = tl.load(cu_seqlens + sequence).to(tl.int64)
        end = tl.load(cu_seqlens + sequence + 1).to(tl.int64)

    current = tl.zeros([BLOCK_K, BLOCK_V], tl.float32)
    if HAS_STATE:
        at = sequence * state_b + head * state_h + dk[:, None] * state_k + dv[None, :]
        current = tl.load(state + at, mask=in_state, other=0.0).to(tl.float32)
    q += batch * q_b + key_head * q_h + start * q_t
    k += batch * k_b + key_head * k_h + start * k_t
    v += batch * v_b + head * v_h + start * v_t
    o += batch * o_b + head * o_h + start * o_t
    beta += batch * beta_b + head * beta_h + start * beta_t
    if GATE != 0:
        g += batch * g_b + head * g_h + start * g_t
    for _ in range(start, end):
        query = tl.load(q + dk, mask=in_k, other=0.0).to(tl.float32)
        key = tl.load(k + dk, mask=in_k, other=0.0).to(tl.float32)
        value = tl.load(v + dv, mask=in_v, other=0.0).to(tl.float32)
        strength = tl.load(beta).to(tl.float32)
        if NORMALIZE:
            query *= tl.rsqrt(tl.sum(query * query) + EPS)
            key *= tl.rsqrt(tl.sum(key * key) + EPS)
        if GATE == 1:
            current *= tl.exp(tl.load(g).to(tl.float32))
        if GATE == 2:
            current *= tl.exp(tl.load(g + dk, mask=in_k, other=0.0).to(tl.float32))[:, None]
        delta = (value - tl.sum(current * key[:, None], 0)) * strength
        current += key[:, None] * delta[None, :]
        out = tl.sum(current * query[:, None], 0) * SCALE
        tl.store(o + dv, out.to(o.dtype.element_ty), mask=in_v)
        q += q_t
        k += k_t
        v += v_t
        o += o_t
        beta += beta_t
        if GATE != 0:
            g += g_t
    at = sequence * final_b + head * final_h + dk[:, None] * final_k + dv[None, :]
    tl.store(final + at, current.to(final.dtype.element_ty), mask=in_state)


def recurrent_tile(key_width: int, value_width: int) -> Tile:
    """About 8192 state elements a program: enough loads in flight, 64 registers a thread."""
    block_k = padded(key_width)
    block_v = min(padded(value_width), max(16, 4096 // block_k))
    return Tile(block_k, block_v, 4 if block_k * block_v >= 4096 else 2)


def delta_rule_recurrent(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor,
    state: Tensor | None,
    scale: float,
    l2norm_eps: float | None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`inductor_moe::delta_rule` in one launch, serial over the tokens."""
    q, k, v = inner_contiguous(q), inner_contiguous(k), inner_contiguous(v)
    state = None if state is None else inner_contiguous(state)
    if g is not None and g.dim() == 4:
        g = inner_contiguous(g)
    batch, tokens, heads, key_width = q.shape
    value_heads, value_width = v.shape[2:]
    sequences = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    out = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    final = torch.empty(
        (sequences, value_heads, key_width, value_width),
        dtype=torch.float32 if state is None else state.dtype,
        device=v.device,
    )
    tile = recurrent_tile(key_width, value_width)
    traced(delta_recurrent_kernel)[(triton.cdiv(value_width, tile.value), value_heads, sequences)](
        q, k, v, out, g, beta, state, final, cu_seqlens,
        tokens, scale, l2norm_eps or 0.0,
        *strides(q, 3), *strides(k, 3), *strides(v, 3), *strides(out, 3),
        *strides(g, 3), *strides(beta, 3), *strides(state, 3), *strides(final, 3),
        GROUP=value_heads // heads, K=key_width, V=value_width,
        BLOCK_K=tile.key, BLOCK_V=tile.value,
        GATE=0 if g is None else g.dim() - 2, NORMALIZE=l2norm_eps is not None,
        HAS_STATE=state is not None, VARLEN=cu_seqlens is not None,
        num_warps=tile.warps,
    )  # fmt: skip
    return out, final
