"""Launches of the kernels that multiply packed weights with vectors, without tensor cores."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from inductor_moe.kernels.quant_vector import quantized_vector_kernel
from inductor_moe.kernels.quant_vector_experts import (
    quantized_down_vector_kernel,
    quantized_up_vector_kernel,
)
from inductor_moe.ops.moe_cuda import (
    Activation,
    SharedExpert,
    Wrap,
    _bias_args,
    _cdiv,
    _power_of_two,
)
from inductor_moe.quant_tiles import QuantizedLinear, VectorTile

if TYPE_CHECKING:
    from inductor_moe.ops.quant_cuda import _Weight

MOST_SLOTS = 32  # experts of a token that a program holds at once


def vector_constants(tile: VectorTile, layer: QuantizedLinear) -> tuple[dict[str, int], int]:
    """The constants of `vector_rows`, and how many rows a program has.

    Raises ValueError for a layer that the tile is not for.
    """
    split = tile.split(layer)
    if split is None:
        raise ValueError(
            f"plan.up is {tile}, which is for 4 bits in groups of 64, 128, 256 or 512 and for "
            f"512, 1024, 2048 or 4096 inputs, a warp for each 2048; got {layer}."
        )
    lanes, parts, spans = split
    at_once = tile.warps * 32 // lanes
    constants = {
        "LANES": lanes, "PARTS": parts, "SPANS": spans, "R": at_once,
        "STEPS": tile.steps, "AHEAD": min(tile.ahead, tile.steps),
    }  # fmt: skip
    return constants, tile.steps * at_once // parts


def linear_vector(
    x: Tensor,
    weight: _Weight,
    layer: QuantizedLinear,
    bias: Tensor | None,
    out: Tensor,
    tile: VectorTile,
    wrap: Wrap,
) -> None:
    """x [1, K] times the weight, plus bias [N], into out [1, N]."""
    constants, block = vector_constants(tile, layer)
    wrap(quantized_vector_kernel)[(_cdiv(weight.rows, block),)](
        x, *weight.tensors(), weight.packed if bias is None else bias, out, weight.rows,
        0 if bias is None else bias.stride(0),
        HAS_BIAS=bias is not None, HAS_ZEROS=weight.zeros is not None, GROUP=weight.group_size,
        **constants, EARLY=weight.settled, num_warps=tile.warps, num_stages=1,
    )  # fmt: skip


def serves_up(
    tile: VectorTile, weight: _Weight, bias: Tensor | None, inner: int, own_inner: int
) -> bool:
    """Whether `up_vector` computes this up projection."""
    return bias is None and own_inner % inner == 0 and tile.split(_linear(weight)) is not None


def up_vector(
    rows: Tensor,
    repeat: int,
    weight: _Weight,
    ids: Tensor,
    out: Tensor,
    epilogue: Activation,
    tile: VectorTile,
    wrap: Wrap,
    own: SharedExpert[_Weight],
) -> None:
    """Rows [T or T * TOP_K, K] times the up weights of their experts, into out."""
    tokens, top_k = ids.shape
    inner = weight.rows // (1 if epilogue.gate == "none" else 2)
    slots = own.inner // inner
    constants, block = vector_constants(tile, _linear(weight))
    wrap(quantized_up_vector_kernel)[(tokens * (top_k + slots), _cdiv(inner, block))](
        rows, *weight.tensors(), ids, *own.gate.tensors(), *own.up.tensors(), out,
        repeat, weight.experts, inner, rows.stride(0), *ids.stride(),
        TOP_K=top_k, SHARED=slots, **epilogue.constants(),
        HAS_ZEROS=weight.zeros is not None, GROUP=weight.group_size, **constants,
        PLACE_NEXT=weight.settled and tokens == 1, num_warps=tile.warps, num_stages=1,
    )  # fmt: skip


def serves_down(weight: _Weight, bias: Tensor | None, top_k: int, own_inner: int) -> bool:
    """Whether `down_vector` computes this down projection."""
    inner = weight.in_features
    lanes = VectorTile.down_lanes(inner, weight.bits, weight.group_size)
    slots = top_k + own_inner // inner
    return bias is None and lanes is not None and own_inner % inner == 0 and slots <= MOST_SLOTS


def down_vector(
    h: Tensor,
    strides: tuple[int, int],
    weight: _Weight,
    ids: Tensor,
    weights: Tensor | None,
    y: Tensor,
    tile: VectorTile,
    wrap: Wrap,
    own: SharedExpert[_Weight],
) -> None:
    """h, tokens and slots `strides` apart, times the down weights of the experts, into y."""
    tokens, top_k = ids.shape
    lanes = weight.in_features // 32
    slots = own.inner // weight.in_features
    scale, stride_st, stride_sk = _bias_args(weights, weight.packed)
    logits, stride_lt, _ = _bias_args(own.logits, weight.packed)
    block = tile.steps * (32 // lanes)
    wrap(quantized_down_vector_kernel)[(tokens, _cdiv(weight.rows, block))](
        h, *weight.tensors(), ids, scale, *own.down.tensors(), logits, y,
        weight.experts, weight.rows, *strides, *ids.stride(), stride_st, stride_sk, stride_lt,
        TOP_K=top_k, SHARED=slots, SLOTS=_power_of_two(top_k + slots),
        HAS_LOGITS=own.logits is not None, HAS_WEIGHTS=weights is not None,
        HAS_ZEROS=weight.zeros is not None, GROUP=weight.group_size,
        LANES=lanes, SIDE=32 // lanes, STEPS=tile.steps, LEVELS=tile.steps.bit_length() - 1,
        EARLY=weight.settled and own.down.settled and tokens == 1,
        num_warps=tile.warps, num_stages=1,
    )  # fmt: skip


def _linear(weight: _Weight) -> QuantizedLinear:
    return QuantizedLinear(weight.rows, weight.in_features, weight.bits, weight.group_size)
