"""Ops on packed weights: `dequantize`, the linear layer and the expert ops with weights packed.

The number of bits is the dtype of the packed tensor: int16 words hold 4-bit codes, int8 holds
8-bit ones. `inductor_moe.reference.quant` has the layout and the arithmetic.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from inductor_moe.ops.moe_checks import check_down, check_experts, check_up
from inductor_moe.ops.moe_cpu import moe_down_combine_cpu, moe_experts_cpu, moe_up_cpu
from inductor_moe.ops.quant_checks import check_linear, check_packed
from inductor_moe.reference.moe import (
    moe_down_combine_reference,
    moe_experts_reference,
    moe_up_reference,
)
from inductor_moe.reference.quant import BITS, dequantize_reference

__all__ = [
    "BITS",
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
) -> Tensor:
    """x @ W.T + bias, W = dequantize(packed, scales, zeros, group_size, x.shape[1]).

    x        [M, K]  bf16, fp16 or fp32, the dtype of scales
    packed, scales, zeros, group_size  as in `dequantize`, without leading dims
    bias     [N]     any float
    returns  [M, N]  x.dtype; sums in fp32
    """
    check_linear(x, packed, scales, zeros, bias, group_size)
    cuda = triton_launches(x)
    if cuda is not None:
        out: Tensor = cuda.quantized_linear_cuda(x, packed, scales, zeros, bias, group_size)
        return out
    return quantized_linear_plain(x, packed, scales, zeros, bias, group_size)


@quantized_linear.register_fake
def _(
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    group_size: int,
) -> Tensor:
    check_linear(x, packed, scales, zeros, bias, group_size)
    return x.new_empty(x.shape[0], packed.shape[0])


def quantized_linear_plain(
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    group_size: int,
) -> Tensor:
    """`quantized_linear` in aten, for Inductor's C++ backend and devices without our kernels."""
    weight = dequantize_reference(packed, scales, zeros, group_size, x.shape[1])
    return F.linear(x, weight, None if bias is None else bias.to(x.dtype))


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
) -> Tensor:
    """`moe_experts` on packed weights: w_up [E, N, H] and w_down [E, H, inner].

    x            [T, H]  bf16, fp16 or fp32, the dtype of the scales
    up_*, down_* the arguments of `dequantize`
    inner        I, the inputs of w_down
    the others   as in `moe_experts`
    returns      [T, H]  out_dtype or x.dtype; h is rounded to x.dtype between the GEMMs
    """
    _check_both(x, up_packed, up_scales, up_zeros, up_group_size,
                down_packed, down_scales, down_zeros, down_group_size, inner)  # fmt: skip
    rest = (ids, weights, bias_up, bias_down, activation, gate, alpha, up_offset, limit,
            weights_on_input, out_dtype)  # fmt: skip
    cuda = triton_launches(x)
    if cuda is not None:
        _check_experts(x, up_packed, down_packed, inner, *rest[:9])
        out: Tensor = cuda.moe_experts_quantized_cuda(
            x, up_packed, up_scales, up_zeros, up_group_size,
            down_packed, down_scales, down_zeros, down_group_size, inner, *rest,
        )  # fmt: skip
        return out
    w_up = dequantize_reference(up_packed, up_scales, up_zeros, up_group_size, x.shape[1])
    w_down = dequantize_reference(down_packed, down_scales, down_zeros, down_group_size, inner)
    check_experts(x, w_up, w_down, *rest[:9])
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
) -> Tensor:
    _check_both(x, up_packed, up_scales, up_zeros, up_group_size,
                down_packed, down_scales, down_zeros, down_group_size, inner)  # fmt: skip
    _check_experts(x, up_packed, down_packed, inner, ids, weights, bias_up, bias_down,
                   activation, gate, alpha, up_offset, limit)  # fmt: skip
    return torch.empty(x.shape, dtype=out_dtype or x.dtype, device=x.device)


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
    *rest: object,
) -> Tensor:
    """`moe_experts_quantized` in aten, traceable like `moe_experts_cpu`."""
    w_up = dequantize_reference(up_packed, up_scales, up_zeros, up_group_size, x.shape[1])
    w_down = dequantize_reference(down_packed, down_scales, down_zeros, down_group_size, inner)
    return moe_experts_cpu(x, w_up, w_down, ids, *rest)  # type: ignore[arg-type]


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
) -> Tensor:
    """`moe_up` on a packed weight [E, N, H]; the arguments are those of `dequantize`."""
    check_packed("moe_up_quantized", "", packed, scales, zeros, group_size, x.shape[1])
    cuda = triton_launches(x)
    if cuda is not None:
        check_up(x, _stand_in(packed, x.shape[1], x), ids, bias_up, input_weights)
        out: Tensor = cuda.moe_up_quantized_cuda(
            x, packed, scales, zeros, group_size, ids, bias_up, input_weights
        )
        return out
    weight = dequantize_reference(packed, scales, zeros, group_size, x.shape[1])
    check_up(x, weight, ids, bias_up, input_weights)
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
) -> Tensor:
    check_packed("moe_up_quantized", "", packed, scales, zeros, group_size, x.shape[1])
    check_up(x, _stand_in(packed, x.shape[1], x), ids, bias_up, input_weights)
    return x.new_empty(ids.shape[0] * ids.shape[1], packed.shape[1])


def moe_up_quantized_plain(
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    group_size: int,
    ids: Tensor,
    bias_up: Tensor | None,
    input_weights: Tensor | None,
) -> Tensor:
    """`moe_up_quantized` in aten."""
    weight = dequantize_reference(packed, scales, zeros, group_size, x.shape[1])
    return moe_up_cpu(x, weight, ids, bias_up, input_weights)


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
) -> Tensor:
    """`moe_down_combine` on a packed weight [E, H, I]; the arguments are those of `dequantize`."""
    check_packed("moe_down_combine_quantized", "", packed, scales, zeros, group_size, h.shape[1])
    cuda = triton_launches(h)
    if cuda is not None:
        check_down(h, _stand_in(packed, h.shape[1], h), ids, weights, bias_down)
        out: Tensor = cuda.moe_down_combine_quantized_cuda(
            h, packed, scales, zeros, group_size, ids, weights, bias_down, out_dtype
        )
        return out
    weight = dequantize_reference(packed, scales, zeros, group_size, h.shape[1])
    check_down(h, weight, ids, weights, bias_down)
    return moe_down_combine_reference(h, weight, ids, weights, bias_down, out_dtype)


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
) -> Tensor:
    check_packed("moe_down_combine_quantized", "", packed, scales, zeros, group_size, h.shape[1])
    check_down(h, _stand_in(packed, h.shape[1], h), ids, weights, bias_down)
    shape = (ids.shape[0], packed.shape[1])
    return torch.empty(shape, dtype=out_dtype or h.dtype, device=h.device)


def moe_down_combine_quantized_plain(
    h: Tensor,
    packed: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    group_size: int,
    *rest: object,
) -> Tensor:
    """`moe_down_combine_quantized` in aten."""
    weight = dequantize_reference(packed, scales, zeros, group_size, h.shape[1])
    return moe_down_combine_cpu(h, weight, *rest)  # type: ignore[arg-type]


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
) -> None:
    op = "moe_experts_quantized"
    check_packed(op, "up_", up_packed, up_scales, up_zeros, up_group_size, x.shape[-1])
    check_packed(op, "down_", down_packed, down_scales, down_zeros, down_group_size, inner)


def _check_experts(
    x: Tensor, up_packed: Tensor, down_packed: Tensor, inner: int, *rest: object
) -> None:
    w_up = _stand_in(up_packed, x.shape[1], x)
    w_down = _stand_in(down_packed, inner, x)
    check_experts(x, w_up, w_down, *rest)  # type: ignore[arg-type]


def triton_launches(x: Tensor) -> Any:
    """The Triton implementations, or None where they do not serve this device or dtype."""
    if x.device.type != "cuda" or x.dtype not in (torch.bfloat16, torch.float16):
        return None
    return _module(x.device)


@functools.cache
def _module(device: torch.device) -> Any:
    if torch.cuda.get_device_capability(device) < (8, 0):
        return None
    try:
        from inductor_moe.ops import quant_cuda
    except ImportError:
        return None
    return quant_cuda
