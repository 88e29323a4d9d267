"""Ops on packed weights: `dequantize`, the linear layer and the expert ops with weights packed.

The number of bits is the dtype of the packed tensor: int16 words hold 4-bit codes, int8 holds
8-bit ones. `inductor_moe.reference.quant` has the layout and the arithmetic.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from inductor_moe.ops.dispatch import PACKED_KERNEL_DTYPES, kernels_serve
from inductor_moe.ops.moe_checks import check_down, check_experts, check_up
from inductor_moe.ops.quant_checks import check_linear, check_packed
from inductor_moe.ops.quant_plain import (
    as_multiplied,
    experts_on_int8,
    moe_down_combine_quantized_plain,
    moe_experts_quantized_plain,
    moe_up_quantized_plain,
    quantized_linear_plain,
    up_on_int8,
)
from inductor_moe.reference.moe import (
    moe_down_combine_reference,
    moe_experts_reference,
    moe_up_reference,
)
from inductor_moe.reference.quant import BITS, INT8_GROUPS, dequantize_reference

__all__ = [
    "BITS",
    "INT8_GROUPS",
    "dequantize",
    "moe_down_combine_quantized",
    "moe_down_combine_quantized_plain",
    "moe_experts_quantized",
    "moe_experts_quantized_plain",
    "moe_up_quantized",
    "moe_up_quantized_plain",
    "quantized_linear",
    "quantized_linear_plain",
]


@torch.library.custom_op("inductor_moe::dequantize", mutates_args=())
def dequantize(
    packed: Tensor, scales: Tensor, zeros: Tensor | None, group_size: int, in_features: int
) -> Tensor:
    """The weight that packed buffers stand for: (code - zero) * scale.

    packed       [..., N, ceil(K / 64) * 16] int16 for 4 bits, [..., N, K] int8 for 8; contiguous
    scales       [..., N, G]  any float; G = ceil(K / group_size), or 1 if group_size is 0
    zeros        [..., N, G]  scales.dtype or fp32; None is 8 for 4 bits and 0 for 8
    group_size   inputs that share a scale: 0, or a multiple of 16 that divides or is divided by 64
    in_features  K
    returns      [..., N, K]  in scales.dtype, computed in fp32 (fp64 for fp64)
    """
    check_packed("dequantize", "", packed, scales, zeros, group_size, in_features)
    return dequantize_reference(packed, scales, zeros, group_size, in_features)


@dequantize.register_fake
def _(
    packed: Tensor, scales: Tensor, zeros: Tensor | None, group_size: int, in_features: int
) -> Tensor:
    check_packed("dequantize", "", packed, scales, zeros, group_size, in_features)
    return scales.new_empty([*packed.shape[:-1], in_features])


@torch.library.custom_op("inductor_moe::quantized_linear", mutates_args=())
def quantized_linear(
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    group_size: int,
    int8_activations: bool = False,
) -> Tensor:
    """x @ W.T + bias, W = dequantize(packed, scales, zeros, group_size, x.shape[1]).

    x        [M, K]  bf16, fp16 or fp32, the dtype of scales
    packed, scales, zeros, group_size  as in `dequantize`, without leading dims
    bias     [N]     any float
    int8_activations  round x to int8 for each row and group, as `round_activations` has it;
             4-bit weights in groups of 32, 64 or 128 only
    returns  [M, N]  x.dtype; sums in fp32
    """
    check_linear(x, packed, scales, zeros, bias, group_size, int8_activations)
    cuda = triton_launches(x)
    if cuda is not None:
        out: Tensor = cuda.quantized_linear_cuda(
            x, packed, scales, zeros, bias, group_size, int8_activations
        )
        return out
    return quantized_linear_plain(x, packed, scales, zeros, bias, group_size, int8_activations)


@quantized_linear.register_fake
def _(
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    group_size: int,
    int8_activations: bool = False,
) -> Tensor:
    check_linear(x, packed, scales, zeros, bias, group_size, int8_activations)
    return x.new_empty(x.shape[0], packed.shape[0])


@torch.library.custom_op("inductor_moe::moe_experts_quantized", mutates_args=())
def moe_experts_quantized(
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
    bias_up: Tensor | None,
    bias_down: Tensor | None,
    activation: str,
    gate: str,
    alpha: float = 1.0,
    up_offset: float = 0.0,
    limit: float | None = None,
    weights_on_input: bool = False,
    out_dtype: torch.dtype | None = None,
    int8_activations: bool = False,
) -> Tensor:
    """`moe_experts` on packed weights: w_up [E, N, H] and w_down [E, H, inner].

    x            [T, H]  bf16, fp16 or fp32, the dtype of the scales
    up_*, down_* the arguments of `dequantize`
    inner        I, the inputs of w_down
    the others   as in `moe_experts`
    int8_activations  as in `quantized_linear`, of the inputs of both GEMMs
    returns      [T, H]  out_dtype or x.dtype; h is rounded to x.dtype between the GEMMs
    """
    _check_both(x, up_packed, up_scales, up_zeros, up_group_size,
                down_packed, down_scales, down_zeros, down_group_size, inner,
                int8_activations)  # fmt: skip
    rest = (ids, weights, bias_up, bias_down, activation, gate, alpha, up_offset, limit,
            weights_on_input, out_dtype)  # fmt: skip
    cuda = triton_launches(x)
    if cuda is not None:
        _check_experts(x, up_packed, down_packed, inner, *rest[:9])
        out: Tensor = cuda.moe_experts_quantized_cuda(
            x, up_packed, up_scales, up_zeros, up_group_size,
            down_packed, down_scales, down_zeros, down_group_size, inner, *rest, int8_activations,
        )  # fmt: skip
        return out
    w_up = dequantize_reference(up_packed, up_scales, up_zeros, up_group_size, x.shape[1])
    w_down = dequantize_reference(down_packed, down_scales, down_zeros, down_group_size, inner)
    check_experts(x, w_up, w_down, *rest[:9])
    if int8_activations:
        halves = moe_up_reference, moe_down_combine_reference
        return experts_on_int8(halves, up_group_size, down_group_size, x, w_up, w_down, *rest)
    return moe_experts_reference(x, w_up, w_down, *rest)


@moe_experts_quantized.register_fake
def _(
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
    bias_up: Tensor | None,
    bias_down: Tensor | None,
    activation: str,
    gate: str,
    alpha: float = 1.0,
    up_offset: float = 0.0,
    limit: float | None = None,
    weights_on_input: bool = False,
    out_dtype: torch.dtype | None = None,
    int8_activations: bool = False,
) -> Tensor:
    _check_both(x, up_packed, up_scales, up_zeros, up_group_size,
                down_packed, down_scales, down_zeros, down_group_size, inner,
                int8_activations)  # fmt: skip
    _check_experts(x, up_packed, down_packed, inner, ids, weights, bias_up, bias_down,
                   activation, gate, alpha, up_offset, limit)  # fmt: skip
    return torch.empty(x.shape, dtype=out_dtype or x.dtype, device=x.device)


@torch.library.custom_op("inductor_moe::moe_up_quantized", mutates_args=())
def moe_up_quantized(
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
    """`moe_up` on a packed weight [E, N, H]; the arguments are those of `dequantize`."""
    op = "moe_up_quantized"
    check_packed(op, "", packed, scales, zeros, group_size, x.shape[1], int8_activations)
    cuda = triton_launches(x)
    if cuda is not None:
        check_up(x, _stand_in(packed, x.shape[1], x), ids, bias_up, input_weights)
        out: Tensor = cuda.moe_up_quantized_cuda(
            x, packed, scales, zeros, group_size, ids, bias_up, input_weights, int8_activations
        )
        return out
    weight = dequantize_reference(packed, scales, zeros, group_size, x.shape[1])
    check_up(x, weight, ids, bias_up, input_weights)
    if int8_activations:
        return up_on_int8(moe_up_reference, group_size, x, weight, ids, bias_up, input_weights)
    return moe_up_reference(x, weight, ids, bias_up, input_weights)


@moe_up_quantized.register_fake
def _(
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
    op = "moe_up_quantized"
    check_packed(op, "", packed, scales, zeros, group_size, x.shape[1], int8_activations)
    check_up(x, _stand_in(packed, x.shape[1], x), ids, bias_up, input_weights)
    return x.new_empty(ids.shape[0] * ids.shape[1], packed.shape[1])


@torch.library.custom_op("inductor_moe::moe_down_combine_quantized", mutates_args=())
def moe_down_combine_quantized(
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
    """`moe_down_combine` on a packed weight [E, H, I]; the arguments are those of `dequantize`."""
    op = "moe_down_combine_quantized"
    check_packed(op, "", packed, scales, zeros, group_size, h.shape[1], int8_activations)
    cuda = triton_launches(h)
    if cuda is not None:
        check_down(h, _stand_in(packed, h.shape[1], h), ids, weights, bias_down)
        out: Tensor = cuda.moe_down_combine_quantized_cuda(
            h, packed, scales, zeros, group_size, ids, weights, bias_down, out_dtype,
            int8_activations,
        )  # fmt: skip
        return out
    weight = dequantize_reference(packed, scales, zeros, group_size, h.shape[1])
    check_down(h, weight, ids, weights, bias_down)
    rows = as_multiplied(h, group_size, int8_activations)
    return moe_down_combine_reference(rows, weight, ids, weights, bias_down, out_dtype)


@moe_down_combine_quantized.register_fake
def _(
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
    op = "moe_down_combine_quantized"
    check_packed(op, "", packed, scales, zeros, group_size, h.shape[1], int8_activations)
    check_down(h, _stand_in(packed, h.shape[1], h), ids, weights, bias_down)
    shape = (ids.shape[0], packed.shape[1])
    return torch.empty(shape, dtype=out_dtype or h.dtype, device=h.device)


def _stand_in(packed: Tensor, in_features: int, like: Tensor) -> Tensor:
    """A weight's shape, dtype and device without its memory, for the checks."""
    return like.new_empty(1).expand(*packed.shape[:-1], in_features)


def _check_both(
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
    int8_activations: bool,
) -> None:
    op = "moe_experts_quantized"
    check_packed(op, "up_", up_packed, up_scales, up_zeros, up_group_size, x.shape[-1],
                 int8_activations)  # fmt: skip
    check_packed(op, "down_", down_packed, down_scales, down_zeros, down_group_size, inner,
                 int8_activations)  # fmt: skip


def _check_experts(
    x: Tensor, up_packed: Tensor, down_packed: Tensor, inner: int, *rest: object
) -> None:
    w_up = _stand_in(up_packed, x.shape[1], x)
    w_down = _stand_in(down_packed, inner, x)
    check_experts(x, w_up, w_down, *rest)  # type: ignore[arg-type]


def triton_launches(x: Tensor) -> Any:
    """The Triton implementations, or None where they do not serve x."""
    if not kernels_serve(x, dtypes=PACKED_KERNEL_DTYPES):
        return None
    from inductor_moe.ops import quant_cuda

    return quant_cuda
