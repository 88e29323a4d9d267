"""Plain torch for the expert ops: one GEMM an expert, any device, any float dtype."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu", "relu2")
GATES = ("none", "chunked", "interleaved")


def activate(value: Tensor, activation: str, alpha: float = 1.0) -> Tensor:
    """The named activation; `alpha` is the slope inside silu's sigmoid."""
    if activation == "silu":
        return value * torch.sigmoid(value * alpha) if alpha != 1.0 else F.silu(value)
    if activation == "gelu":
        return F.gelu(value)
    if activation == "gelu_tanh":
        return F.gelu(value, approximate="tanh")
    if activation == "relu":
        return F.relu(value)
    if activation == "relu2":
        return F.relu(value).square()
    raise ValueError(f"activation must be one of {ACTIVATIONS} (got {activation!r})")


def gated_activation(
    up: Tensor,
    activation: str,
    gate: str,
    alpha: float = 1.0,
    up_offset: float = 0.0,
    limit: float | None = None,
) -> Tensor:
    """What happens between the two expert GEMMs, in fp32 at least.

    up       [..., N]    the up projection's rows
    returns  [..., I]    in up.dtype; I is N, or N // 2 when gated
    Source: Shazeer, GLU Variants, arXiv:2002.05202; limit, alpha, up_offset: gpt-oss.
    """
    value = up if up.dtype == torch.float64 else up.float()
    if gate == "none":
        if limit is not None:
            value = value.clamp(max=limit)
        return activate(value, activation, alpha).to(up.dtype)
    if gate == "chunked":
        gate_half, up_half = value.chunk(2, dim=-1)
    else:
        gate_half, up_half = value[..., 0::2], value[..., 1::2]
    if limit is not None:
        gate_half = gate_half.clamp(max=limit)
        up_half = up_half.clamp(min=-limit, max=limit)
    return (activate(gate_half, activation, alpha) * (up_half + up_offset)).to(up.dtype)


def moe_up_reference(
    x: Tensor,
    w_up: Tensor,
    ids: Tensor,
    bias_up: Tensor | None = None,
    input_weights: Tensor | None = None,
) -> Tensor:
    """The up projection of every (token, slot) pair, in pair order p = t * K + k.

    x [T, H], w_up [E, N, H], ids [T, K], bias_up [E, N], input_weights [T, K]
    returns [T * K, N] in x.dtype; rows of ids outside [0, E) are zeros
    """
    top_k = ids.shape[1]
    flat = ids.reshape(-1)
    out = x.new_zeros(flat.shape[0], w_up.shape[1])
    for expert, pairs in _pairs_by_expert(flat, w_up.shape[0]):
        rows = x[pairs // top_k]
        if input_weights is not None:
            scale = input_weights.reshape(-1)[pairs]
            rows = (rows * scale[:, None]).to(x.dtype)
        bias = None if bias_up is None else bias_up[expert].to(x.dtype)
        out[pairs] = F.linear(rows, w_up[expert], bias)
    return out


def moe_down_combine_reference(
    h: Tensor,
    w_down: Tensor,
    ids: Tensor,
    weights: Tensor | None = None,
    bias_down: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """The down projection of every pair, weighted and summed over a token's slots.

    h [T * K, I] in pair order, w_down [E, H, I], ids [T, K], weights [T, K], bias_down [E, H]
    returns [T, H] in out_dtype or h.dtype, summed in fp32 (fp64 for fp64)
    """
    tokens, top_k = ids.shape
    flat = ids.reshape(-1)
    wide = torch.float64 if h.dtype == torch.float64 else torch.float32
    rows = torch.zeros(tokens * top_k, w_down.shape[1], dtype=wide, device=h.device)
    for expert, pairs in _pairs_by_expert(flat, w_down.shape[0]):
        bias = None if bias_down is None else bias_down[expert].to(h.dtype)
        value = F.linear(h[pairs], w_down[expert], bias).to(wide)
        if weights is not None:
            value = value * weights.reshape(-1)[pairs, None]
        rows[pairs] = value.to(wide)
    return rows.view(tokens, top_k, rows.shape[1]).sum(1).to(out_dtype or h.dtype)


def moe_experts_reference(
    x: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    ids: Tensor,
    weights: Tensor,
    bias_up: Tensor | None = None,
    bias_down: Tensor | None = None,
    activation: str = "silu",
    gate: str = "chunked",
    alpha: float = 1.0,
    up_offset: float = 0.0,
    limit: float | None = None,
    weights_on_input: bool = False,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """`inductor_moe::moe_experts` in plain torch; see `inductor_moe.ops.moe` for the contract."""
    on_input, on_output = (weights, None) if weights_on_input else (None, weights)
    up = moe_up_reference(x, w_up, ids, bias_up, on_input)
    h = gated_activation(up, activation, gate, alpha, up_offset, limit)
    return moe_down_combine_reference(h, w_down, ids, on_output, bias_down, out_dtype or x.dtype)


def shared_expert_reference(
    x: Tensor,
    gate: Any,
    up: Any,
    down: Any,
    logits: Tensor | None = None,
    activation: str = "silu",
    alpha: float = 1.0,
    up_offset: float = 0.0,
    limit: float | None = None,
    linear: Callable[[Tensor, Any], Tensor] = F.linear,
) -> Tensor:
    """The expert that every token passes through, times the sigmoid of its logit if it has one.

    x [T, H], gate [S, H] or None, up [S, H], down [H, S], logits [T, 1]; `linear` multiplies rows
    by one of the weights
    returns [T, H] in fp32 (fp64 for fp64); h [T, S] is rounded to x.dtype
    """
    rows = linear(x, up)
    if gate is not None:
        rows = torch.cat([linear(x, gate), rows], -1)
    layout = "none" if gate is None else "chunked"
    h = gated_activation(rows, activation, layout, alpha, up_offset, limit)
    wide = torch.promote_types(x.dtype, torch.float32)
    y = linear(h, down).to(wide)
    return y if logits is None else y * torch.sigmoid(logits.to(wide))


def _pairs_by_expert(flat: Tensor, experts: int) -> list[tuple[int, Tensor]]:
    """(expert, indices of its pairs) for each expert that has any; other ids are skipped."""
    known = torch.where((flat >= 0) & (flat < experts), flat, experts).long()
    order = torch.argsort(known, stable=True)
    counts = torch.bincount(known, minlength=experts + 1).tolist()
    groups = torch.split(order, counts)
    return [(e, pairs) for e, pairs in enumerate(groups[:experts]) if counts[e]]
