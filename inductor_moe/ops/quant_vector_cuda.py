"""Launches of the kernels that multiply packed weights with vectors, without tensor cores."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from inductor_moe.kernels.quant_vector import quantized_vector_kernel
from inductor_moe.kernels.quant_vector_experts import (
    quantized_up_vector_kernel,
)
from inductor_moe.ops.moe_cuda import (
    Activation,
    SharedExpert,
    Wrap,
    _cdiv,
)
from inductor_moe.quant_tiles import QuantizedLinear, VectorTile

if TYPE_CHECKING:
    from inductor_moe.ops.quant_cuda import _Weight


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
        **constants, num_warps=tile.warps, num_stages=1,
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
        num_warps=tile.warps, num_stages=1,
    )  # fmt: skip


def _linear(weight: _Weight) -> QuantizedLinear:
    return QuantizedLinear(weight.rows, weight.in_features, weight.bits, weight.group_size)
