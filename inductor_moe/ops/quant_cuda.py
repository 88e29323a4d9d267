"""The ops on packed weights as Triton launches.

Like `inductor_moe.ops.moe_cuda`: each function runs eagerly and traces, and the number of rows may
be a SymInt as long as `tokens_hint` names one to choose kernels and tiles for.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from inductor_moe.kernels.quant_decode import (
    quantized_down_decode_kernel,
    quantized_up_decode_kernel,
)
from inductor_moe.ops.moe_cuda import (
    IDENTITY,
    Activation,
    SharedExpert,
    Wrap,
    _as_is,
    _bias_args,
    _cdiv,
    _combine,
    _inner_contiguous,
    _input_rows,
    _power_of_two,
    _Routed,
    _rows_aligned,
    _sort,
    _tokens,
)
from inductor_moe.ops.quant_gemm_cuda import grouped_gemm, linear_gemm, widened
from inductor_moe.ops.quant_vector_cuda import (
    down_vector,
    linear_vector,
    serves_down,
    serves_up,
    up_vector,
)
from inductor_moe.quant_tiles import (
    FEW_PAIRS,
    PartsTile,
    QuantizedExperts,
    QuantizedLinear,
    QuantizedPlan,
    VectorTile,
    choose_int8_plan,
    choose_quantized_plan,
    step_of,
    widens,
)
from inductor_moe.reference.quant import BITS
from inductor_moe.tiles import GemmTile, gpu_of

Tile = PartsTile | GemmTile | VectorTile


@dataclass(frozen=True)
class _Weight:
    """A packed weight [E, N, K] or [N, K] as the kernels take it.

    settled  it was there before the kernel that launches before the one that takes it
    """

    packed: Tensor
    scales: Tensor
    zeros: Tensor | None
    group_size: int
    in_features: int
    settled: bool = False

    @staticmethod
    def of(
        packed: Tensor,
        scales: Tensor,
        zeros: Tensor | None,
        group_size: int,
        in_features: int,
        settled: bool = False,
    ) -> _Weight:
        given = [packed, scales] if zeros is None else [packed, scales, zeros]
        settled = settled and all(tensor.is_contiguous() for tensor in given)
        zeros = None if zeros is None else zeros.contiguous()
        return _Weight(
            packed.contiguous(), scales.contiguous(), zeros, group_size, int(in_features), settled
        )

    @property
    def bits(self) -> int:
        return BITS[self.packed.dtype]

    @property
    def experts(self) -> int:
        return int(self.packed.shape[0]) if self.packed.dim() == 3 else 1

    @property
    def rows(self) -> int:
        return int(self.packed.shape[-2])

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.packed, self.scales, self.scales if self.zeros is None else self.zeros

    def sizes(self) -> tuple[int, int]:
        """(elements of a packed row, groups of a row)"""
        return int(self.packed.shape[-1]), int(self.scales.shape[-1])

    def constants(self) -> dict[str, Any]:
        return {"HAS_ZEROS": self.zeros is not None, "BITS": self.bits, "GROUP": self.group_size}

    def step(self, tile: PartsTile | GemmTile) -> int:
        return step_of(tile.block_k, self.bits, self.group_size)

    def slice_of(self, block_k: int, splits: int) -> int:
        """Inputs of one of `splits` slices of a row: whole groups and steps."""
        unit = max(self.group_size, block_k)
        return int(_cdiv(_cdiv(self.in_features, unit), splits)) * unit

    def short_slices(self, step: int, splits: int) -> tuple[int, int]:
        """(step, slice): one step, a part of `step`, where `splits` of them hold a row."""
        short = min(step, max(64, _power_of_two(_cdiv(self.in_features, splits))))
        if short * splits >= self.in_features:
            return short, short
        return step, self.slice_of(step, splits)


def quantized_linear_cuda(
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    group_size: int,
    int8_activations: bool = False,
    *,
    tokens_hint: int | None = None,
    plan: QuantizedPlan | None = None,
    settled: bool = False,
    wrap: Wrap = _as_is,
) -> Tensor:
    """`quantized_linear` on Triton kernels. `settled`: of the weight, see `_Weight`."""
    tokens = x.shape[0]
    weight = _Weight.of(packed, scales, zeros, group_size, x.shape[1], settled)
    layer = QuantizedLinear(weight.rows, weight.in_features, weight.bits, group_size)
    hint = _tokens(x, tokens_hint)
    gpu = gpu_of(x.device.index)
    plain = not int8_activations and (bias is None or bias.dtype == x.dtype)
    if plan is None and plain and widens(layer, hint, gpu):
        return F.linear(x, widened(weight, x.dtype, wrap), bias)
    out = torch.empty((tokens, weight.rows), dtype=x.dtype, device=x.device)
    if isinstance(tokens, int) and tokens == 0:
        return out
    choose = choose_int8_plan if int8_activations else choose_quantized_plan
    plan = plan or choose(layer, hint, gpu)
    x = _inner_contiguous(x)
    bias_rows = None if bias is None else bias.unsqueeze(0)
    if isinstance(plan.up, VectorTile) and isinstance(tokens, int) and tokens == 1:
        linear_vector(x, weight, layer, bias, out, plan.up, wrap)
        return out
    if not plan.block_m:
        _up_decode(x, 1, weight, bias_rows, None, out, IDENTITY, plan.down, wrap)
        return out
    linear_gemm(x, weight, bias_rows, out, plan, wrap, int8_activations=int8_activations)
    return out


def moe_experts_quantized_cuda(
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
    *,
    tokens_hint: int | None = None,
    plan: QuantizedPlan | None = None,
    settled: bool = False,
    wrap: Wrap = _as_is,
) -> Tensor:
    """`moe_experts_quantized` on Triton kernels. `settled`: of all weights, see `_Weight`."""
    tokens, top_k = ids.shape
    out_dtype = out_dtype or x.dtype
    if isinstance(tokens, int) and tokens == 0:
        return x.new_zeros(x.shape, dtype=out_dtype)
    up = _Weight.of(up_packed, up_scales, up_zeros, up_group_size, x.shape[1], settled)
    down = _Weight.of(down_packed, down_scales, down_zeros, down_group_size, inner, settled)
    plan = plan or _plan(ids, tokens_hint, up, inner, gate != "none", int8_activations)
    epilogue = Activation(activation, gate, alpha, up_offset, limit)
    rows, repeat = _input_rows(x, weights if weights_on_input else None, top_k)
    on_output = None if weights_on_input else weights
    h = torch.empty((tokens * top_k, inner), dtype=x.dtype, device=x.device)
    if not plan.block_m:
        _up_decode(rows, repeat, up, bias_up, ids, h, epilogue, plan.up, wrap)
        return _down_decode(h, down, bias_down, ids, on_output, out_dtype, plan.down, wrap)
    routed = _sort(ids, up.experts, plan.block_m, tokens_hint, wrap)
    grouped_gemm(
        routed, rows, repeat, up, bias_up, None, h, epilogue, plan.up,
        out_sorted=True, int8_activations=int8_activations,
    )  # fmt: skip
    return _down_combine(
        routed, h, down, bias_down, on_output, out_dtype, plan.down, True, int8_activations
    )


def moe_up_quantized_cuda(
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    group_size: int,
    ids: Tensor,
    bias_up: Tensor | None = None,
    input_weights: Tensor | None = None,
    int8_activations: bool = False,
    *,
    tokens_hint: int | None = None,
    plan: QuantizedPlan | None = None,
    wrap: Wrap = _as_is,
) -> Tensor:
    """`moe_up_quantized` on Triton kernels."""
    tokens, top_k = ids.shape
    weight = _Weight.of(packed, scales, zeros, group_size, x.shape[1])
    size = (tokens * top_k, weight.rows)
    if isinstance(tokens, int) and tokens == 0:
        return x.new_zeros(size)
    plan = plan or _plan(ids, tokens_hint, weight, weight.rows, False, int8_activations)
    rows, repeat = _input_rows(x, input_weights, top_k)
    if not plan.block_m:
        out = torch.empty(size, dtype=x.dtype, device=x.device)
        _up_decode(rows, repeat, weight, bias_up, ids, out, IDENTITY, plan.up, wrap)
        return out
    # No block covers the rows of skipped pairs.
    out = torch.zeros(size, dtype=x.dtype, device=x.device)
    routed = _sort(ids, weight.experts, plan.block_m, tokens_hint, wrap)
    grouped_gemm(
        routed, rows, repeat, weight, bias_up, None, out, IDENTITY, plan.up,
        out_sorted=False, int8_activations=int8_activations,
    )  # fmt: skip
    return out


def moe_down_combine_quantized_cuda(
    h: Tensor,
    packed: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    group_size: int,
    ids: Tensor,
    weights: Tensor | None = None,
    bias_down: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    int8_activations: bool = False,
    *,
    tokens_hint: int | None = None,
    plan: QuantizedPlan | None = None,
    wrap: Wrap = _as_is,
) -> Tensor:
    """`moe_down_combine_quantized` on Triton kernels."""
    tokens = ids.shape[0]
    out_dtype = out_dtype or h.dtype
    weight = _Weight.of(packed, scales, zeros, group_size, h.shape[1])
    if isinstance(tokens, int) and tokens == 0:
        return h.new_zeros((tokens, weight.rows), dtype=out_dtype)
    plan = plan or _plan(ids, tokens_hint, weight, weight.in_features, False, int8_activations)
    h = _inner_contiguous(h)
    if not plan.block_m:
        return _down_decode(h, weight, bias_down, ids, weights, out_dtype, plan.down, wrap)
    routed = _sort(ids, weight.experts, plan.block_m, tokens_hint, wrap)
    return _down_combine(
        routed, h, weight, bias_down, weights, out_dtype, plan.down, False, int8_activations
    )


def _plan(
    ids: Tensor,
    tokens_hint: int | None,
    weight: _Weight,
    inner: int,
    gated: bool,
    int8_activations: bool,
) -> QuantizedPlan:
    layer = QuantizedExperts(
        top_k=int(ids.shape[1]),
        experts=weight.experts,
        hidden=weight.in_features,
        inner=int(inner),
        gated=gated,
        bits=weight.bits,
        group_size=weight.group_size,
    )
    choose = choose_int8_plan if int8_activations else choose_quantized_plan
    return choose(layer, _tokens(ids, tokens_hint), gpu_of(ids.device.index))


def _up_decode(
    rows: Tensor,
    repeat: int,
    weight: _Weight,
    bias: Tensor | None,
    ids: Tensor | None,
    out: Tensor,
    epilogue: Activation,
    tile: Tile,
    wrap: Wrap,
    shared: SharedExpert[_Weight] | None = None,
) -> None:
    gated = epilogue.gate != "none"
    inner = weight.rows // (2 if gated else 1)
    own = shared or SharedExpert(weight, weight, weight, None, 0)
    if isinstance(tile, VectorTile) and ids is not None:
        if serves_up(tile, weight, bias, inner, own.inner):
            up_vector(rows, repeat, weight, ids, out, epilogue, tile, wrap, own)
            return
        tile = FEW_PAIRS
    assert isinstance(tile, PartsTile)
    step = weight.step(tile)
    k_slice = weight.slice_of(step, tile.parts)
    columns = tile.block_n // 2 if gated else tile.block_n
    bias_arg, stride_be, stride_bn = _bias_args(bias, weight.packed)
    id_arg, id_strides = (weight.packed, (0, 0)) if ids is None else (ids, ids.stride())
    tokens, top_k = (rows.shape[0], 1) if ids is None else ids.shape
    slots = _cdiv(own.inner, inner)
    wrap(quantized_up_decode_kernel)[(tokens * (top_k + slots), _cdiv(inner, columns))](
        rows, *weight.tensors(), bias_arg, id_arg, *own.gate.tensors(), *own.up.tensors(), out,
        repeat, weight.experts, weight.in_features, inner, own.inner, weight.rows,
        *weight.sizes(), k_slice, rows.stride(0), stride_be, stride_bn, *id_strides,
        TOP_K=top_k, SHARED=slots, HAS_IDS=ids is not None,
        **epilogue.constants(), HAS_BIAS=bias is not None, **weight.constants(),
        ALIGNED=_rows_aligned(weight.packed, own.gate.packed, own.up.packed),
        EVEN=inner % columns == 0 and own.inner % inner == 0
        and k_slice * tile.parts == weight.in_features,
        PARTS=tile.parts, BLOCK_N=tile.block_n, BLOCK_K=step,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip


def _down_decode(
    h: Tensor,
    weight: _Weight,
    bias: Tensor | None,
    ids: Tensor,
    weights: Tensor | None,
    out_dtype: torch.dtype,
    tile: Tile,
    wrap: Wrap,
    shared: SharedExpert[_Weight] | None = None,
) -> Tensor:
    tokens, top_k = ids.shape
    y = torch.empty((tokens, weight.rows), dtype=out_dtype, device=h.device)
    own = shared or SharedExpert(weight, weight, weight, None, 0)
    # h is [T * K, I], or [T, K * I + the shared inner].
    pair = (
        (top_k * h.stride(0), h.stride(0)) if shared is None else (h.stride(0), weight.in_features)
    )
    if isinstance(tile, VectorTile):
        if serves_down(weight, bias, top_k, own.inner):
            down_vector(h, pair, weight, ids, weights, y, tile, wrap, own)
            return y
        tile = FEW_PAIRS
    assert isinstance(tile, PartsTile)
    slots = min(tile.parts, _power_of_two(top_k))
    splits = tile.parts // slots
    step = weight.step(tile)
    k_slice = weight.slice_of(step, splits)
    hidden = weight.rows
    bias_arg, stride_be, stride_bh = _bias_args(bias, weight.packed)
    scale, stride_st, stride_sk = _bias_args(weights, weight.packed)
    own_step, own_slice = own.down.short_slices(step, tile.parts)
    logits, stride_lt, _ = _bias_args(own.logits, weight.packed)
    wrap(quantized_down_decode_kernel)[(tokens, _cdiv(hidden, tile.block_n))](
        h, *weight.tensors(), bias_arg, ids, scale, *own.down.tensors(), logits, y,
        weight.experts, weight.in_features, hidden, *weight.sizes(), k_slice,
        own.inner, *own.down.sizes(), own_slice, *pair,
        stride_be, stride_bh, *ids.stride(), stride_st, stride_sk, stride_lt,
        TOP_K=top_k, SHARED=own.inner > 0, HAS_LOGITS=own.logits is not None, SLOTS=slots,
        SHARED_EVEN=hidden % tile.block_n == 0 and own_slice * tile.parts == own.inner,
        HAS_WEIGHTS=weights is not None, HAS_BIAS=bias is not None, **weight.constants(),
        EVEN=hidden % tile.block_n == 0 and k_slice * splits == weight.in_features,
        PARTS=tile.parts, BLOCK_N=tile.block_n, BLOCK_K=step, SHARED_K=own_step,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return y


def _down_combine(
    routed: _Routed,
    h: Tensor,
    weight: _Weight,
    bias: Tensor | None,
    weights: Tensor | None,
    out_dtype: torch.dtype,
    tile: Tile,
    sorted_h: bool,
    int8_activations: bool,
) -> Tensor:
    rows = torch.empty((routed.order.shape[0], weight.rows), dtype=h.dtype, device=h.device)
    grouped_gemm(
        routed, h, 1, weight, bias, weights, rows, IDENTITY, tile,
        out_sorted=False, a_sorted=sorted_h, int8_activations=int8_activations,
    )  # fmt: skip
    top_k = routed.ids.shape[1]
    return _combine(rows, routed.ids, top_k, True, weight.experts, out_dtype, routed.wrap)
