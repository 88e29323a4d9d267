"""`merged_linear` as a Triton launch; traces like `inductor_moe.ops.moe_cuda`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
from torch import Tensor

from inductor_moe.kernels.merged_linear import merged_linear_kernel
from inductor_moe.kernels.merged_vector import merged_vector_kernel
from inductor_moe.ops.merged_linear import MEMBERS
from inductor_moe.ops.moe_cuda import Wrap, _as_is, _inner_contiguous
from inductor_moe.ops.quant_cuda import _Weight
from inductor_moe.ops.quant_vector_cuda import vector_constants
from inductor_moe.quant_tiles import (
    PartsTile,
    QuantizedLinear,
    VectorTile,
    choose_quantized_plan,
)
from inductor_moe.tiles import GemmTile, gpu_of

DENSE_ROWS = 4  # of a program: as many bytes as 16 rows of 4 bits
DENSE_STEP = 2048
VECTOR_DENSE_ROWS, VECTOR_DENSE_STEP = 2, 1024  # of one warp


def merged_linear_cuda(
    x: Tensor,
    packed: Sequence[Tensor],
    scales: Sequence[Tensor],
    zeros: Sequence[Tensor],
    group_size: int,
    dense: Sequence[Tensor],
    *,
    tile: PartsTile | VectorTile | None = None,
    wrap: Wrap = _as_is,
) -> Tensor:
    """`merged_linear` on a Triton kernel. It reads the weights once for each row of x."""
    tokens, inputs = x.shape
    x = _inner_contiguous(x)
    dense = [weight.contiguous() for weight in dense]
    weights = [
        _Weight.of(w, s, zeros[i] if zeros else None, group_size, inputs)
        for i, (w, s) in enumerate(zip(packed, scales, strict=True))
    ]
    rows = [weight.rows for weight in weights]
    dense_rows = [int(weight.shape[0]) for weight in dense]
    out = torch.empty((tokens, sum(rows) + sum(dense_rows)), dtype=x.dtype, device=x.device)
    if isinstance(tokens, int) and tokens == 0:
        return out
    like = weights[0] if weights else None
    bits = like.bits if like else 4
    columns = list(zip(*(weight.tensors() for weight in weights), strict=True)) or [(x,)] * 3
    tensors = [part for column in columns for part in _filled(column)] + _filled(dense or [x])
    layer = QuantizedLinear(sum(rows) or 1, int(inputs), bits, group_size)
    if tile is None:
        plan = choose_quantized_plan(layer, 1, gpu_of(x.device.index))
        one = isinstance(tokens, int) and tokens == 1 and like is not None
        chosen = plan.up if one else plan.down
        assert not isinstance(chosen, GemmTile)
        tile = chosen
    if isinstance(tile, VectorTile):
        constants, block = vector_constants(tile, layer)
        blocks = sum(triton.cdiv(n, block) for n in rows)
        blocks += sum(triton.cdiv(n, VECTOR_DENSE_ROWS) for n in dense_rows)
        wrap(merged_vector_kernel)[(blocks,)](
            x, *tensors, out, *_counts(rows), *_counts(dense_rows), inputs,
            DENSE=bool(dense), HAS_ZEROS=bool(zeros), GROUP=group_size, **constants,
            BLOCK_D=VECTOR_DENSE_ROWS,
            DENSE_K=min(VECTOR_DENSE_STEP, triton.next_power_of_2(inputs)),
            num_warps=tile.warps, num_stages=1,
        )  # fmt: skip
        return out
    step = like.step(tile) if like else 64
    k_slice = like.slice_of(step, tile.parts) if like else 64
    even = all(n % tile.block_n == 0 for n in rows) and k_slice * tile.parts == inputs
    blocks = sum(triton.cdiv(n, tile.block_n) for n in rows)
    blocks += sum(triton.cdiv(n, DENSE_ROWS) for n in dense_rows)
    wrap(merged_linear_kernel)[(blocks, tokens)](
        x, *tensors, out,
        *_counts(rows), *_counts(dense_rows), inputs, *(like.sizes() if like else (0, 0)),
        k_slice, x.stride(0), out.stride(0),
        PACKED=bool(weights), DENSE=bool(dense),
        HAS_ZEROS=bool(zeros), BITS=bits, GROUP=group_size, EVEN=even,
        PARTS=tile.parts, BLOCK_N=tile.block_n, BLOCK_K=step,
        BLOCK_D=DENSE_ROWS, DENSE_K=min(DENSE_STEP, triton.next_power_of_2(inputs)),
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return out


def _filled(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [*tensors, *[tensors[0]] * (MEMBERS - len(tensors))]


def _counts(rows: Sequence[int]) -> list[int]:
    return [*rows, *[0] * (MEMBERS - len(rows))]
