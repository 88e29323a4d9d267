"""The expert ops: `moe_experts`, and its halves for an activation that has no name here."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from inductor_moe.ops.dispatch import kernels_serve
from inductor_moe.ops.moe_checks import check_down, check_experts, check_up
from inductor_moe.ops.moe_cpu import moe_down_combine_cpu, moe_experts_cpu, moe_up_cpu
from inductor_moe.reference.moe import (
    moe_down_combine_reference,
    moe_experts_reference,
    moe_up_reference,
)

__all__ = [
    "moe_down_combine",
    "moe_down_combine_cpu",
    "moe_experts",
    "moe_experts_cpu",
    "moe_up",
    "moe_up_cpu",
]


@torch.library.custom_op("inductor_moe::moe_experts", mutates_args=(), device_types="cpu")
def moe_experts(
    x: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    ids: Tensor,
    weights: Tensor,
    bias_up: Tensor | None,
    bias_down: Tensor | None,
    activation: str,
    gate: str,
    alpha: float = 1.0,
    up_offset: float = 0.0,
    limit: float | None = None,
    weights_on_input: bool = False,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Routed experts: y[t] = sum_k weights[t, k] * W_down[e] act(W_up[e] x[t]), e = ids[t, k].

    x          [T, H]     any float
    w_up       [E, N, H]  x.dtype, any strides; N is I, or 2 * I when gated
    w_down     [E, H, I]  x.dtype, any strides
    ids        [T, K]     int32 or int64; ids outside [0, E) are skipped
    weights    [T, K]     any float; scales the output, or x (rounded) if weights_on_input
    bias_up    [E, N]     any float
    bias_down  [E, H]     any float
    activation            silu, gelu, gelu_tanh, relu, relu2; alpha: slope in silu's sigmoid
    gate                  none, chunked (gate = rows [:I]) or interleaved (gate = rows [0::2])
    limit                 gate <= limit and |up| <= limit before the activation
    up_offset             added to the up half after the limit
    returns    [T, H]     out_dtype or x.dtype; sums in fp32, h rounded to x.dtype between GEMMs
    Source: Shazeer et al., arXiv:1701.06538; limit, alpha, up_offset: gpt-oss's clamped swiglu.
    """
    check_experts(
        x,
        w_up,
        w_down,
        ids,
        weights,
        bias_up,
        bias_down,
        activation,
        gate,
        alpha,
        up_offset,
        limit,
    )
    return moe_experts_reference(
        x, w_up, w_down, ids, weights, bias_up, bias_down, activation, gate,
        alpha, up_offset, limit, weights_on_input, out_dtype,
    )  # fmt: skip


@moe_experts.register_fake
def _(
    x: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    ids: Tensor,
    weights: Tensor,
    bias_up: Tensor | None,
    bias_down: Tensor | None,
    activation: str,
    gate: str,
    alpha: float = 1.0,
    up_offset: float = 0.0,
    limit: float | None = None,
    weights_on_input: bool = False,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    check_experts(
        x,
        w_up,
        w_down,
        ids,
        weights,
        bias_up,
        bias_down,
        activation,
        gate,
        alpha,
        up_offset,
        limit,
    )
    return torch.empty(x.shape, dtype=out_dtype or x.dtype, device=x.device)


@moe_experts.register_kernel("cuda")
def _(
    x: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    ids: Tensor,
    weights: Tensor,
    bias_up: Tensor | None,
    bias_down: Tensor | None,
    activation: str,
    gate: str,
    alpha: float = 1.0,
    up_offset: float = 0.0,
    limit: float | None = None,
    weights_on_input: bool = False,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    check_experts(
        x,
        w_up,
        w_down,
        ids,
        weights,
        bias_up,
        bias_down,
        activation,
        gate,
        alpha,
        up_offset,
        limit,
    )
    cuda = triton_launches(x)
    run = cuda.moe_experts_cuda if cuda else moe_experts_reference
    return run(
        x, w_up, w_down, ids, weights, bias_up, bias_down, activation, gate,
        alpha, up_offset, limit, weights_on_input, out_dtype,
    )  # fmt: skip


@torch.library.custom_op("inductor_moe::moe_up", mutates_args=(), device_types="cpu")
def moe_up(
    x: Tensor,
    w_up: Tensor,
    ids: Tensor,
    bias_up: Tensor | None,
    input_weights: Tensor | None,
) -> Tensor:
    """The up projection of every (token, slot) pair.

    x              [T, H]      any float
    w_up           [E, N, H]   x.dtype, any strides
    ids            [T, K]      int32 or int64; ids outside [0, E) give rows of zeros
    bias_up        [E, N]      any float
    input_weights  [T, K]      any float; scales x, rounded to x.dtype
    returns        [T * K, N]  x.dtype, in pair order p = t * K + k
    """
    check_up(x, w_up, ids, bias_up, input_weights)
    return moe_up_reference(x, w_up, ids, bias_up, input_weights)


@moe_up.register_fake
def _(
    x: Tensor,
    w_up: Tensor,
    ids: Tensor,
    bias_up: Tensor | None,
    input_weights: Tensor | None,
) -> Tensor:
    check_up(x, w_up, ids, bias_up, input_weights)
    return x.new_empty(ids.shape[0] * ids.shape[1], w_up.shape[1])


@moe_up.register_kernel("cuda")
def _(
    x: Tensor,
    w_up: Tensor,
    ids: Tensor,
    bias_up: Tensor | None,
    input_weights: Tensor | None,
) -> Tensor:
    check_up(x, w_up, ids, bias_up, input_weights)
    cuda = triton_launches(x)
    run = cuda.moe_up_cuda if cuda else moe_up_reference
    return run(x, w_up, ids, bias_up, input_weights)


@torch.library.custom_op("inductor_moe::moe_down_combine", mutates_args=(), device_types="cpu")
def moe_down_combine(
    h: Tensor,
    w_down: Tensor,
    ids: Tensor,
    weights: Tensor | None,
    bias_down: Tensor | None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """The down projection of every pair, weighted and summed over each token's slots.

    h          [T * K, I]  any float, in pair order p = t * K + k
    w_down     [E, H, I]   h.dtype, any strides
    ids        [T, K]      int32 or int64; ids outside [0, E) are skipped
    weights    [T, K]      any float; None sums unweighted
    bias_down  [E, H]      any float
    returns    [T, H]      out_dtype or h.dtype; sums in fp32
    """
    check_down(h, w_down, ids, weights, bias_down)
    return moe_down_combine_reference(h, w_down, ids, weights, bias_down, out_dtype)


@moe_down_combine.register_fake
def _(
    h: Tensor,
    w_down: Tensor,
    ids: Tensor,
    weights: Tensor | None,
    bias_down: Tensor | None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    check_down(h, w_down, ids, weights, bias_down)
    return torch.empty(
        (ids.shape[0], w_down.shape[1]), dtype=out_dtype or h.dtype, device=h.device
    )


@moe_down_combine.register_kernel("cuda")
def _(
    h: Tensor,
    w_down: Tensor,
    ids: Tensor,
    weights: Tensor | None,
    bias_down: Tensor | None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    check_down(h, w_down, ids, weights, bias_down)
    cuda = triton_launches(h)
    run = cuda.moe_down_combine_cuda if cuda else moe_down_combine_reference
    return run(h, w_down, ids, weights, bias_down, out_dtype)


def triton_launches(x: Tensor) -> ModuleType | None:
    """The Triton implementations, or None where they do not serve x."""
    if not kernels_serve(x):
        return None
    from inductor_moe.ops import moe_cuda

    return moe_cuda
