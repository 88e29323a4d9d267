"""The delta rule in plain torch: the oracle of the tests and the CPU implementation of the ops.

Everything computes in float32, or in float64 when an input is float64. Every function is
functional unless it says otherwise, and can be traced: token and chunk counts that are plain
integers unroll.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 64
UNROLLED_TOKENS = 8


def compute_dtype(*tensors: Tensor | None) -> torch.dtype:
    wide = any(t is not None and t.dtype == torch.float64 for t in tensors)
    return torch.float64 if wide else torch.float32


def l2norm(x: Tensor, eps: float | None) -> Tensor:
    """x / sqrt(sum(x * x) + eps) over the last dim, or x where eps is None."""
    return x if eps is None else x * torch.rsqrt((x * x).sum(-1, keepdim=True) + eps)


def share_heads(x: Tensor, value_heads: int) -> Tensor:
    """[B, T, H, K] -> [B, T, HV, K]; value head j reads key head j // (HV // H)."""
    batch, tokens, heads, width = x.shape
    repeats = value_heads // heads
    if repeats == 1:
        return x
    return x.unsqueeze(3).expand(batch, tokens, heads, repeats, width).flatten(2, 3)


def initial_state(q: Tensor, v: Tensor, state: Tensor | None, dtype: torch.dtype) -> Tensor:
    if state is not None:
        return state.to(dtype)
    shape = (q.shape[0], v.shape[2], q.shape[3], v.shape[3])
    return torch.zeros(shape, dtype=dtype, device=v.device)


def state_dtype(v: Tensor, state: Tensor | None) -> torch.dtype:
    return state.dtype if state is not None else compute_dtype(v)


def delta_rule_recurrent(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor,
    state: Tensor | None,
    scale: float,
    l2norm_eps: float | None = None,
) -> tuple[Tensor, Tensor]:
    """One step a token, in order.

    S *= exp(g); d = (v - S^T k) * beta; S += k (x) d; o = scale * S^T q.
    Shapes and results as `inductor_moe::delta_rule`.
    Source: Yang et al., Gated Delta Networks, arXiv:2412.06464, eq. 10; per-channel decay:
    Kimi Linear, arXiv:2510.26692.
    """
    dtype = compute_dtype(q, v, state)
    value_heads = v.shape[2]
    queries = share_heads(l2norm(q.to(dtype), l2norm_eps), value_heads) * scale
    keys = share_heads(l2norm(k.to(dtype), l2norm_eps), value_heads)
    current = initial_state(q, v, state, dtype)
    outputs = []
    for t in range(q.shape[1]):
        key = keys[:, t, :, :, None]
        if g is not None:
            decay = g[:, t].to(dtype).exp()
            current = current * (decay[..., None] if g.dim() == 4 else decay[..., None, None])
        read = (current * key).sum(-2)
        delta = (v[:, t].to(dtype) - read) * beta[:, t, :, None].to(dtype)
        current = current + key * delta.unsqueeze(-2)
        outputs.append((current * queries[:, t, :, :, None]).sum(-2))
    if not outputs:
        out, current = torch.zeros_like(v), current.clone()
    elif len(outputs) == 1:
        out = outputs[0].unsqueeze(1)
    else:
        out = torch.stack(outputs, 1)
    return out.to(v.dtype), current.to(state_dtype(v, state))


def unit_lower_inverse(a: Tensor) -> Tensor:
    """(I + a)^-1 for a strictly lower triangular [..., C, C], C a power of two.

    Inverses of the diagonal blocks of size s give those of size 2s; only products, so it is exact
    where a Neumann series of the whole would cancel.
    """
    size = a.shape[-1]
    index = torch.arange(size, device=a.device)
    inverse = torch.eye(size, dtype=a.dtype, device=a.device)
    half = 1
    while half < size:
        block = index // half
        corner = (block[:, None] == block[None, :] + 1) & (block[:, None] % 2 == 1)
        lower = a * corner
        inverse = inverse - (lower if half == 1 else inverse @ lower @ inverse)
        half *= 2
    return inverse


def decayed_products(q: Tensor, k: Tensor, g: Tensor | None) -> tuple[Tensor, Tensor]:
    """k k^T strictly below and q k^T on and below the diagonal, each times the decay between.

    q, k  [..., C, K]
    g     [..., C] or [..., C, K], finite log decay, or None
    returns two [..., C, C]
    """
    size = q.shape[-2]
    index = torch.arange(size, device=q.device)
    lower = index[:, None] > index[None, :]
    causal = index[:, None] >= index[None, :]
    if g is None or g.dim() < q.dim():
        kk, qk = k @ k.transpose(-1, -2), q @ k.transpose(-1, -2)
        if g is not None:
            total = g.cumsum(-1)
            between = (total.unsqueeze(-1) - total.unsqueeze(-2)).masked_fill(~causal, -math.inf)
            kk, qk = kk * between.exp(), qk * between.exp()
        return kk * lower, qk * causal
    # Per channel exp(G_i - G_j) does not factor without overflow, except around a row between i
    # and j: take the pairs by the size of the aligned block whose middle separates them.
    kk = torch.zeros_like(k @ k.transpose(-1, -2))
    qk = torch.diag_embed((q * k).sum(-1))
    half = 1
    while half < size:
        blocks = g.unflatten(-2, (size // half, half))
        after = blocks.cumsum(-2)
        before = after[..., -1:, :] - after
        right = ((index // half) % 2 == 1)[:, None]
        decay = torch.where(right, after.flatten(-3, -2), before.flatten(-3, -2)).exp()
        block = index // half
        corner = (block[:, None] == block[None, :] + 1) & (block[:, None] % 2 == 1)
        left_keys = (k * decay).transpose(-1, -2)
        kk = kk + (k * decay) @ left_keys * corner
        qk = qk + (q * decay) @ left_keys * corner
        half *= 2
    return kk, qk


class ChunkFactors(NamedTuple):
    """What a chunk does to the state S before it, for all N chunks of size C at once.

    D = solve (values - key_start S); outputs query_start S + qk D; next state whole S + key_end D.
    """

    values: Tensor  # [B, HV, N, C, V]
    solve: Tensor  # [B, HV, N, C, C]
    qk: Tensor  # [B, HV, N, C, C]
    key_start: Tensor  # [B, HV, N, C, K]
    query_start: Tensor  # [B, HV, N, C, K]
    key_end: Tensor  # [B, HV, N, K, C]
    whole: Tensor  # [B, HV, N, K or 1, 1]


def chunk_factors(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor,
    scale: float,
    l2norm_eps: float | None,
    chunk: int,
    padding: int,
    dtype: torch.dtype,
) -> ChunkFactors:
    """The parts of `delta_rule_chunk` that do not depend on the state.

    padding  tokens to append, which change nothing; T + padding is a multiple of chunk
    """
    value_heads = v.shape[2]

    def chunked(x: Tensor) -> Tensor:  # [B, T, HV, ...] -> [B, HV, N, C, ...]
        x = F.pad(x.to(dtype), (0, 0) * (x.dim() - 2) + (0, padding))
        chunks: Tensor = x.unflatten(1, (-1, chunk))
        return chunks.movedim(3, 1)

    queries = chunked(share_heads(l2norm(q.to(dtype), l2norm_eps), value_heads)) * scale
    keys = chunked(share_heads(l2norm(k.to(dtype), l2norm_eps), value_heads))
    values, strength = chunked(v), chunked(beta).unsqueeze(-1)
    if g is None:
        decay = None
        kk, qk = decayed_products(queries, keys, None)
        from_start = to_end = whole = torch.ones_like(strength)
        whole = whole[..., :1, :]
    else:
        # exp underflows to zero long before; a finite floor keeps -inf minus -inf out of the sums.
        floor = math.log(torch.finfo(dtype).tiny) - 20
        decay = chunked(g).clamp_min(floor)
        kk, qk = decayed_products(queries, keys, decay)
        total = decay.cumsum(3)
        # summed from the end: near it, where it matters, nothing large cancels
        rest = decay.flip(3).cumsum(3).flip(3) - decay
        from_start, to_end, whole = total.exp(), rest.exp(), total[:, :, :, -1:].exp()
        if g.dim() == 3:
            from_start, to_end = from_start.unsqueeze(-1), to_end.unsqueeze(-1)
            whole = whole.unsqueeze(-1)
    solve = unit_lower_inverse(kk * strength) * strength.transpose(-1, -2)
    key_start, query_start = keys * from_start, queries * from_start
    key_end, whole = (keys * to_end).transpose(-1, -2), whole.transpose(-1, -2)
    return ChunkFactors(values, solve, qk, key_start, query_start, key_end, whole)


def delta_rule_chunk(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor,
    state: Tensor | None,
    scale: float,
    l2norm_eps: float | None = None,
    chunk: int = CHUNK,
) -> tuple[Tensor, Tensor]:
    """The same function by chunks: products inside a chunk, a serial pass over their states.

    With G the running log decay of a chunk and A = beta * (k k^T * exp(G_i - G_j)) below the
    diagonal, the writes are D = (I + A)^-1 beta (v - exp(G) k S), the outputs
    scale * (exp(G) q S + (q k^T * exp(G_i - G_j)) D), the next state
    exp(G_C) S + (k exp(G_C - G))^T D.
    Shapes and results as `inductor_moe::delta_rule`.
    """
    dtype = compute_dtype(q, v, state)
    padding = -q.shape[1] % chunk
    f = chunk_factors(q, k, v, g, beta, scale, l2norm_eps, chunk, padding, dtype)
    current = initial_state(q, v, state, dtype)
    outputs = []
    for i in range(f.values.shape[2]):
        delta = f.solve[:, :, i] @ (f.values[:, :, i] - f.key_start[:, :, i] @ current)
        outputs.append(f.query_start[:, :, i] @ current + f.qk[:, :, i] @ delta)
        current = current * f.whole[:, :, i] + f.key_end[:, :, i] @ delta
    out = torch.cat(outputs, 2)[:, :, : q.shape[1]].transpose(1, 2)
    return out.to(v.dtype).contiguous(), current.to(state_dtype(v, state))


def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor,
    state: Tensor | None,
    scale: float,
    l2norm_eps: float | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Dispatch on the token count, which must be a plain integer.

    One token is a single step without slices of the state; up to 8 unroll; longer inputs go by
    chunks no larger than needed. With cu_seqlens (read on the host) the sequences run one by one.
    """
    if cu_seqlens is not None:
        return _by_sequence(q, k, v, g, beta, state, scale, l2norm_eps, cu_seqlens)
    tokens = q.shape[1]
    if isinstance(tokens, int) and tokens <= UNROLLED_TOKENS:
        return delta_rule_recurrent(q, k, v, g, beta, state, scale, l2norm_eps)
    chunk = CHUNK
    while isinstance(tokens, int) and chunk // 2 >= max(tokens, 16):
        chunk //= 2
    return delta_rule_chunk(q, k, v, g, beta, state, scale, l2norm_eps, chunk)


def _by_sequence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor,
    state: Tensor | None,
    scale: float,
    l2norm_eps: float | None,
    cu_seqlens: Tensor,
) -> tuple[Tensor, Tensor]:
    ends = cu_seqlens.tolist()
    out = torch.empty_like(v, memory_format=torch.contiguous_format)
    shape = (len(ends) - 1, v.shape[2], q.shape[3], v.shape[3])
    final = torch.empty(shape, dtype=state_dtype(v, state), device=v.device)
    for n, (start, end) in enumerate(pairwise(ends)):
        part = slice(start, end)
        out[:, part], final[n : n + 1] = delta_rule(
            q[:, part],
            k[:, part],
            v[:, part],
            None if g is None else g[:, part],
            beta[:, part],
            None if state is None else state[n : n + 1],
            scale,
            l2norm_eps,
        )
    return out, final


def conv_update(
    x: Tensor, conv_state: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """One token through a causal depthwise convolution and SiLU.

    x           [B, C]
    conv_state  [B, C, L], the last L >= W - 1 inputs, newest last
    weight      [C, W]; bias [C]
    returns [B, C] in the compute dtype and the shifted state in its own dtype
    """
    dtype = compute_dtype(x, conv_state)
    token = x.unsqueeze(-1)
    window = torch.cat([conv_state.to(dtype), token.to(dtype)], -1)
    width = weight.shape[1]
    out = (window[..., -width:] * weight.to(dtype)).sum(-1)
    if bias is not None:
        out = out + bias.to(dtype)
    return F.silu(out), torch.cat([conv_state[..., 1:], token.to(conv_state.dtype)], -1)


def decode_gates(
    a: Tensor,
    b: Tensor,
    A_log: Tensor | None,
    dt_bias: Tensor | None,
    gate: str,
    gate_lower_bound: float,
    beta_scale: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Log decay [B, HV] or [B, HV, K] and write strength [B, HV] from the projections a and b."""
    if gate == "given":
        return a.to(dtype), b.to(dtype)
    assert A_log is not None
    x = a.to(dtype)
    if dt_bias is not None:
        x = x + dt_bias.to(dtype)
    rate = A_log.to(dtype).exp()
    if a.dim() == 3:
        rate = rate.unsqueeze(-1)
    log_decay = (
        -rate * F.softplus(x) if gate == "softplus" else gate_lower_bound * torch.sigmoid(rate * x)
    )
    return log_decay, torch.sigmoid(b.to(dtype)) * beta_scale


def gated_rms_norm(
    x: Tensor, weight: Tensor, z: Tensor | None, eps: float, activation: str
) -> Tensor:
    """x * rsqrt(mean(x * x) + eps) * weight * activation(z), in x's dtype."""
    out = x * torch.rsqrt((x * x).mean(-1, keepdim=True) + eps) * weight.to(x.dtype)
    if z is None:
        return out
    gate = z.to(x.dtype)
    return out * (F.silu(gate) if activation == "silu" else torch.sigmoid(gate))


def delta_decode_functional(
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
    scale: float,
    l2norm_eps: float | None,
    norm_eps: float,
    norm_activation: str,
    gate: str,
    gate_lower_bound: float,
    beta_scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """One decoded token from the convolution's input to the gated norm.

    Arguments as `inductor_moe::delta_decode`, without slots.
    returns out [B, HV, V], the new conv_state, the new recurrent_state
    """
    batch, value_heads, key_width, value_width = recurrent_state.shape
    dtype = compute_dtype(qkv, recurrent_state)
    mixed, new_conv = conv_update(qkv, conv_state, conv_weight, conv_bias)
    keys_total = (qkv.shape[1] - value_heads * value_width) // 2
    q, k, v = mixed.to(dtype).split([keys_total, keys_total, value_heads * value_width], -1)
    q, k = (x.reshape(batch, 1, -1, key_width) for x in (q, k))
    log_decay, beta = decode_gates(a, b, A_log, dt_bias, gate, gate_lower_bound, beta_scale, dtype)
    out, new_state = delta_rule_recurrent(
        q,
        k,
        v.reshape(batch, 1, value_heads, value_width),
        log_decay.unsqueeze(1),
        beta.unsqueeze(1),
        recurrent_state,
        scale,
        l2norm_eps,
    )
    out = out.squeeze(1)
    if norm_weight is not None:
        out = gated_rms_norm(out, norm_weight, z, norm_eps, norm_activation)
    return out.to(qkv.dtype), new_conv, new_state


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
    l2norm_eps: float | None,
    norm_eps: float,
    norm_activation: str,
    gate: str,
    gate_lower_bound: float,
    beta_scale: float,
) -> Tensor:
    """`delta_decode_functional` with both states updated in place, rows chosen by slots [B]."""
    rest: tuple[Any, ...] = (
        scale, l2norm_eps, norm_eps, norm_activation, gate, gate_lower_bound, beta_scale
    )  # fmt: skip
    weights = (conv_weight, conv_bias)
    if slots is None:
        out, new_conv, new_state = delta_decode_functional(
            qkv, conv_state, *weights, a, b, A_log, dt_bias, recurrent_state, z, norm_weight, *rest
        )
        conv_state.copy_(new_conv)
        recurrent_state.copy_(new_state)
        return out
    used = slots >= 0
    rows = slots.clamp_min(0).long()
    out, new_conv, new_state = delta_decode_functional(
        qkv,
        conv_state[rows],
        *weights,
        a,
        b,
        A_log,
        dt_bias,
        recurrent_state[rows],
        z,
        norm_weight,
        *rest,
    )
    rows = slots[used].long()
    conv_state[rows] = new_conv[used]
    recurrent_state[rows] = new_state[used]
    return out * used[:, None, None].to(out.dtype)
