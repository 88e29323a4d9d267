"""Launches of the GEMMs on packed weights, with the activations as they are or rounded to int8."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from inductor_moe.kernels.quant_gemm import moe_quantized_gemm_kernel, quantized_linear_kernel
from inductor_moe.kernels.quant_gemm_int8 import (
    int8_linear_kernel,
    moe_int8_gemm_kernel,
    quantize_activations_kernel,
)
from inductor_moe.kernels.quant_slices import quantized_slices_kernel
from inductor_moe.kernels.quant_widen import widen_kernel
from inductor_moe.ops.moe_cuda import Activation, Wrap, _bias_args, _cdiv, _Routed
from inductor_moe.tiles import GemmTile

if TYPE_CHECKING:
    from inductor_moe.ops.quant_cuda import Tile, _Weight
    from inductor_moe.quant_tiles import QuantizedPlan


def grouped_gemm(
    routed: _Routed,
    a: Tensor,
    repeat: int,
    weight: _Weight,
    bias: Tensor | None,
    weights: Tensor | None,
    out: Tensor,
    epilogue: Activation,
    tile: Tile,
    *,
    out_sorted: bool,
    a_sorted: bool = False,
    int8_activations: bool = False,
) -> None:
    """Rows of a [T or S, K] times the weights of their experts, into out [S, N or N / 2].

    repeat      pairs that share a row of a
    weights     [T, K] scale the output rows, or None
    a_sorted, out_sorted  whether rows are in the order of `routed`, or in pair order
    """
    assert isinstance(tile, GemmTile)
    wrap = routed.wrap
    kernel, step = moe_quantized_gemm_kernel, weight.step(tile)
    rows: tuple[Tensor, ...] = (a,)
    sizes: tuple[int, ...] = (a.stride(0),)
    constants = weight.constants()
    if int8_activations:
        kernel, step = moe_int8_gemm_kernel, max(64, weight.group_size)
        rows, sizes = quantize_activations(a, weight.group_size, wrap)
        del constants["BITS"]
    bias_arg, stride_be, stride_bn = _bias_args(bias, weight.packed)
    scale, stride_st, stride_sk = _bias_args(weights, weight.packed)
    columns = tile.block_n if epilogue.gate == "none" else tile.block_n // 2
    inner, capacity = out.shape[1], routed.capacity
    wrap(kernel)[(capacity * _cdiv(inner, columns),)](
        *rows, *weight.tensors(), bias_arg, scale, routed.order, routed.blocks, out,
        repeat, capacity, tile.group_m, weight.in_features, inner, weight.rows, *weight.sizes(),
        *sizes, stride_be, stride_bn, stride_st, stride_sk,
        TOP_K=routed.ids.shape[1], A_SORTED=a_sorted, OUT_SORTED=out_sorted,
        **epilogue.constants(), HAS_BIAS=bias is not None, HAS_WEIGHTS=weights is not None,
        **constants,
        EVEN=inner % columns == 0 and weight.in_features % step == 0,
        BLOCK_M=routed.block_m, BLOCK_N=tile.block_n, BLOCK_K=step,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip


def linear_gemm(
    x: Tensor,
    weight: _Weight,
    bias: Tensor | None,
    out: Tensor,
    plan: QuantizedPlan,
    wrap: Wrap,
    *,
    int8_activations: bool = False,
) -> None:
    """x [M, K] times the weight, plus bias [1, N], into out [M, N]."""
    tile = plan.up
    assert isinstance(tile, GemmTile)
    kernel, step = quantized_linear_kernel, weight.step(tile)
    rows: tuple[Tensor, ...] = (x,)
    sizes: tuple[int, ...] = (x.stride(0),)
    constants = weight.constants()
    even = weight.in_features % step == 0
    if int8_activations:
        kernel, step = int8_linear_kernel, max(64, weight.group_size)
        even = weight.in_features % step == 0
        rows, sizes = quantize_activations(x, weight.group_size, wrap)
        del constants["BITS"]
    elif tile.parts > 1:
        kernel, k_slice = quantized_slices_kernel, weight.slice_of(step, tile.parts)
        even = k_slice * tile.parts == weight.in_features
        sizes = (*sizes, k_slice)
        constants["PARTS"] = tile.parts
    tokens = x.shape[0]
    bias_arg, _, stride_b = _bias_args(bias, weight.packed)
    wrap(kernel)[(_cdiv(tokens, plan.block_m) * _cdiv(weight.rows, tile.block_n),)](
        *rows, *weight.tensors(), bias_arg, out,
        tokens, weight.rows, weight.in_features, *weight.sizes(), *sizes, stride_b,
        HAS_BIAS=bias is not None, **constants, EVEN=even,
        GROUP_M=tile.group_m, BLOCK_M=plan.block_m, BLOCK_N=tile.block_n, BLOCK_K=step,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip


def widened(weight: _Weight, dtype: torch.dtype, wrap: Wrap) -> Tensor:
    """A packed weight [N, words] as [N, K] of dtype."""
    rows, inputs = weight.rows, weight.in_features
    out = torch.empty((rows, inputs), dtype=dtype, device=weight.packed.device)
    wrap(widen_kernel)[(_cdiv(rows, 8), _cdiv(inputs, 256))](
        *weight.tensors(), out, rows, inputs, *weight.sizes(), **weight.constants(),
        BLOCK_N=8, BLOCK_K=256, num_warps=4, num_stages=1,
    )  # fmt: skip
    return out


def quantize_activations(
    x: Tensor, group_size: int, wrap: Wrap
) -> tuple[tuple[Tensor, Tensor, Tensor], tuple[int, int]]:
    """Rows as int8 for the GEMMs on 4-bit weights in groups of 32, 64 or 128.

    returns  (codes [M, width], scales [M, width / group_size], their sums), (width, groups)
    """
    step = max(64, group_size)
    rows, inputs = x.shape
    width = _cdiv(int(inputs), step) * step
    groups = width // group_size
    codes = torch.empty((rows, width), dtype=torch.int8, device=x.device)
    scales = torch.empty((rows, groups), dtype=torch.float32, device=x.device)
    sums = torch.empty((rows, groups), dtype=torch.float32, device=x.device)
    wrap(quantize_activations_kernel)[(_cdiv(rows, 16), width // step)](
        x, codes, scales, sums, rows, int(inputs), width, groups, x.stride(0),
        GROUP=group_size, BLOCK_M=16, BLOCK_K=step, num_warps=4, num_stages=1,
    )  # fmt: skip
    return (codes, scales, sums), (width, groups)
