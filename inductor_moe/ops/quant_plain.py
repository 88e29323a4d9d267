"""The ops on packed weights in aten, for Inductor's C++ backend and devices without our kernels.

Traceable like `inductor_moe.ops.moe_cpu`; the arguments are those of the ops.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from inductor_moe.ops.moe_cpu import moe_down_combine_cpu, moe_experts_cpu, moe_up_cpu
from inductor_moe.reference.moe import gated_activation
from inductor_moe.reference.quant import dequantize_reference, round_activations


def quantized_linear_plain(
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    group_size: int,
    int8_activations: bool = False,
) -> Tensor:
    """`quantized_linear` in aten; with int8 activations in fp32, as exact as the kernels."""
    rows = round_activations(x, group_size) if int8_activations else x
    weight = dequantize_reference(
        packed,
        scales.to(rows.dtype) if int8_activations else scales,
        zeros,
        group_size,
        x.shape[1],
    )
    out = F.linear(rows, weight, None if bias is None else bias.to(rows.dtype))
    return out.to(x.dtype)


def moe_experts_quantized_plain(
    x: Tensor,
    up_packed: Tensor,
    up_scales: Tensor,
    up_zeros: Tensor | None,
    up_group_size: int,
    down_packed: Tensor,
    down_scales: Tensor,
    down_zeros: Tensor | None,
    down_group_size: int,
    inner: int,
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
    int8_activations: bool = False,
) -> Tensor:
    """`moe_experts_quantized` in aten."""
    w_up = dequantize_reference(up_packed, up_scales, up_zeros, up_group_size, x.shape[1])
    w_down = dequantize_reference(down_packed, down_scales, down_zeros, down_group_size, inner)
    rest = (ids, weights, bias_up, bias_down, activation, gate, alpha, up_offset, limit,
            weights_on_input, out_dtype)  # fmt: skip
    if int8_activations:
        halves = moe_up_cpu, moe_down_combine_cpu
        return experts_on_int8(halves, up_group_size, down_group_size, x, w_up, w_down, *rest)
    return moe_experts_cpu(x, w_up, w_down, *rest)


def moe_up_quantized_plain(
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    group_size: int,
    ids: Tensor,
    bias_up: Tensor | None,
    input_weights: Tensor | None,
    int8_activations: bool = False,
) -> Tensor:
    """`moe_up_quantized` in aten."""
    weight = dequantize_reference(packed, scales, zeros, group_size, x.shape[1])
    if int8_activations:
        return up_on_int8(moe_up_cpu, group_size, x, weight, ids, bias_up, input_weights)
    return moe_up_cpu(x, weight, ids, bias_up, input_weights)


def moe_down_combine_quantized_plain(
    h: Tensor,
    packed: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    group_size: int,
    ids: Tensor,
    weights: Tensor | None,
    bias_down: Tensor | None,
    out_dtype: torch.dtype | None = None,
    int8_activations: bool = False,
) -> Tensor:
    """`moe_down_combine_quantized` in aten."""
    weight = dequantize_reference(packed, scales, zeros, group_size, h.shape[1])
    rows = as_multiplied(h, group_size, int8_activations)
    return moe_down_combine_cpu(rows, weight, ids, weights, bias_down, out_dtype)


def as_multiplied(x: Tensor, group_size: int, int8_activations: bool) -> Tensor:
    """Rows as the weights meet them: x, or x in steps of int8 codes."""
    return round_activations(x, group_size).to(x.dtype) if int8_activations else x


def up_on_int8(
    up: Callable[..., Tensor],
    group_size: int,
    x: Tensor,
    w_up: Tensor,
    ids: Tensor,
    bias_up: Tensor | None,
    input_weights: Tensor | None,
) -> Tensor:
    """`up`, an implementation of `moe_up`, on rows in steps of int8 codes."""
    if input_weights is not None:
        # Rows are rounded after the weights have scaled them: each pair has its own.
        x = (x[:, None, :] * input_weights[:, :, None]).to(x.dtype).flatten(0, 1)
        ids = ids.reshape(-1, 1)
    return up(as_multiplied(x, group_size, True), w_up, ids, bias_up, None)


def experts_on_int8(
    halves: tuple[Callable[..., Tensor], Callable[..., Tensor]],
    up_group_size: int,
    down_group_size: int,
    x: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    ids: Tensor,
    weights: Tensor,
    bias_up: Tensor | None,
    bias_down: Tensor | None,
    activation: str,
    gate: str,
    alpha: float,
    up_offset: float,
    limit: float | None,
    weights_on_input: bool,
    out_dtype: torch.dtype | None,
) -> Tensor:
    """`moe_experts` with the inputs of both GEMMs in steps of int8 codes.

    halves  implementations of `moe_up` and `moe_down_combine`
    """
    up, down = halves
    on_input, on_output = (weights, None) if weights_on_input else (None, weights)
    rows = up_on_int8(up, up_group_size, x, w_up, ids, bias_up, on_input)
    h = gated_activation(rows, activation, gate, alpha, up_offset, limit)
    h = as_multiplied(h, down_group_size, True)
    return down(h, w_down, ids, on_output, bias_down, out_dtype or x.dtype)
