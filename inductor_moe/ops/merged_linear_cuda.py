"""`merged_linear` as a Triton launch; traces like `inductor_moe.ops.moe_cuda`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from inductor_moe.kernels.merged_linear import merged_linear_kernel
from inductor_moe.kernels.merged_rows import merged_rows_kernel
from inductor_moe.kernels.merged_vector import merged_vector_kernel
from inductor_moe.ops.merged_linear import MEMBERS, MOST_ROWS
from inductor_moe.ops.moe_cuda import Wrap, _as_is, _cdiv, _inner_contiguous
from inductor_moe.ops.quant_cuda import _Weight
from inductor_moe.ops.quant_vector_cuda import vector_constants
from inductor_moe.quant_tiles import (
    QuantizedLinear,
    QuantizedPlan,
    VectorTile,
    choose_quantized_plan,
    linear_by_rule,
)
from inductor_moe.tiles import GemmTile, Gpu, generic_gpu, gpu_of

DENSE_ROWS = 4  # of a program: as many bytes as 16 rows of 4 bits
DENSE_STEP = 2048
VECTOR_DENSE_ROWS, VECTOR_DENSE_STEP = 2, 1024  # of one warp
BATCH_DENSE_ROWS, BATCH_DENSE_STEP = 16, 64  # of a program, for several rows of x


@dataclass(frozen=True)
class _Layers:
    """What the layers of one launch multiply with.

    layer  the packed ones as one
    """

    packed: list[_Weight]
    dense: list[Tensor]
    has_zeros: bool
    layer: QuantizedLinear

    @property
    def packed_rows(self) -> list[int]:
        return [weight.rows for weight in self.packed]

    @property
    def dense_rows(self) -> list[int]:
        return [int(weight.shape[0]) for weight in self.dense]

    def blocks(self, packed: int, dense: int) -> int:
        """Programs with this many rows of a packed or of a dense weight."""
        found = sum(_cdiv(n, packed) for n in self.packed_rows)
        return int(found + sum(_cdiv(n, dense) for n in self.dense_rows))

    def tensors(self, x: Tensor) -> list[Tensor]:
        """The weights, `MEMBERS` of each kind; x stands for what there is none of."""
        kinds = list(zip(*(weight.tensors() for weight in self.packed), strict=True))
        return [part for kind in (*(kinds or [(x,)] * 3), self.dense or [x])
                for part in _filled(kind)]  # fmt: skip

    def counts(self) -> list[int]:
        return [n for kind in (self.packed_rows, self.dense_rows)
                for n in (*kind, *[0] * (MEMBERS - len(kind)))]  # fmt: skip


def merged_linear_cuda(
    x: Tensor,
    packed: Sequence[Tensor],
    scales: Sequence[Tensor],
    zeros: Sequence[Tensor],
    group_size: int,
    dense: Sequence[Tensor],
    *,
    plan: QuantizedPlan | None = None,
    wrap: Wrap = _as_is,
) -> Tensor:
    """`merged_linear` on a Triton kernel. `plan` is one for as many rows as x has."""
    tokens, inputs = x.shape
    x = _inner_contiguous(x)
    weights = [
        _Weight.of(w, s, zeros[i] if zeros else None, group_size, inputs)
        for i, (w, s) in enumerate(zip(packed, scales, strict=True))
    ]
    bits = weights[0].bits if weights else 4
    outputs = sum(weight.rows for weight in weights)
    layer = QuantizedLinear(outputs or 1, int(inputs), bits, group_size)
    layers = _Layers(weights, [weight.contiguous() for weight in dense], bool(zeros), layer)
    width = outputs + sum(layers.dense_rows)
    out = torch.empty((tokens * width,), dtype=x.dtype, device=x.device)
    if isinstance(tokens, int) and tokens == 0:
        return out
    if isinstance(tokens, int) and tokens == 1:
        _one_row(x, layers, out, plan or choose_quantized_plan(layer, 1, _gpu(x)), wrap)
        return out
    if plan is None:
        rows = min(tokens, MOST_ROWS) if isinstance(tokens, int) else MOST_ROWS
        plan = choose_quantized_plan(layer, rows, _gpu(x))
        if not plan.block_m:  # a table's, for a kernel that reads the weights for each row
            plan = linear_by_rule(layer, rows, _gpu(x) or generic_gpu((8, 0)))
    _rows(x, layers, out, plan, wrap)
    return out


def _one_row(x: Tensor, layers: _Layers, out: Tensor, plan: QuantizedPlan, wrap: Wrap) -> None:
    tile = plan.up if layers.packed else plan.down
    assert not isinstance(tile, GemmTile)
    inputs = layers.layer.inputs
    tensors, counts = layers.tensors(x), layers.counts()
    constants = {"HAS_ZEROS": layers.has_zeros, "GROUP": layers.layer.group_size}
    if isinstance(tile, VectorTile):
        vector, block = vector_constants(tile, layers.layer)
        wrap(merged_vector_kernel)[(layers.blocks(block, VECTOR_DENSE_ROWS),)](
            x, *tensors, out, *counts, inputs, DENSE=bool(layers.dense), **constants, **vector,
            BLOCK_D=VECTOR_DENSE_ROWS,
            DENSE_K=min(VECTOR_DENSE_STEP, triton.next_power_of_2(inputs)),
            num_warps=tile.warps, num_stages=1,
        )  # fmt: skip
        return
    like = layers.packed[0] if layers.packed else None
    step = like.step(tile) if like else 64
    k_slice = like.slice_of(step, tile.parts) if like else 64
    even = all(n % tile.block_n == 0 for n in layers.packed_rows)
    wrap(merged_linear_kernel)[(layers.blocks(tile.block_n, DENSE_ROWS), 1)](
        x, *tensors, out, *counts, inputs, *(like.sizes() if like else (0, 0)),
        k_slice, x.stride(0), out.shape[0],
        PACKED=like is not None, DENSE=bool(layers.dense), BITS=layers.layer.bits, **constants,
        EVEN=even and k_slice * tile.parts == inputs,
        PARTS=tile.parts, BLOCK_N=tile.block_n, BLOCK_K=step,
        BLOCK_D=DENSE_ROWS, DENSE_K=min(DENSE_STEP, triton.next_power_of_2(inputs)),
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip


def _rows(x: Tensor, layers: _Layers, out: Tensor, plan: QuantizedPlan, wrap: Wrap) -> None:
    tile, block_m = plan.up, plan.block_m
    assert isinstance(tile, GemmTile)
    tokens, inputs = x.shape[0], layers.layer.inputs
    like = layers.packed[0] if layers.packed else None
    step = like.step(tile) if like else 64
    k_slice = like.slice_of(step, tile.parts) if like else 64
    whole = step if tile.parts == 1 else k_slice * tile.parts
    grid = (layers.blocks(tile.block_n, BATCH_DENSE_ROWS), _cdiv(tokens, block_m))
    wrap(merged_rows_kernel)[grid](
        x, *layers.tensors(x), out, *layers.counts(), tokens, inputs,
        *(like.sizes() if like else (0, 0)), k_slice, x.stride(0),
        PACKED=like is not None, DENSE=bool(layers.dense), HAS_ZEROS=layers.has_zeros,
        BITS=layers.layer.bits, GROUP=layers.layer.group_size, EVEN=inputs % whole == 0,
        PARTS=tile.parts, BLOCK_M=block_m, BLOCK_N=tile.block_n, BLOCK_K=step,
        BLOCK_D=BATCH_DENSE_ROWS, DENSE_EVEN=inputs % (tile.warps * BATCH_DENSE_STEP) == 0,
        DENSE_PARTS=tile.warps, DENSE_K=BATCH_DENSE_STEP,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip


def _gpu(x: Tensor) -> Gpu | None:
    return gpu_of(x.device.index)


def _filled(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [*tensors, *[tensors[0]] * (MEMBERS - len(tensors))]
