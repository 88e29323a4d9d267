"""`merged_linear`: the linear layers that read one input, packed and dense, as one launch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from inductor_moe.ops.quant import quantized_linear_plain, triton_launches
from inductor_moe.ops.quant_checks import check_linear

MEMBERS = 4  # weights of a kind that one op takes
MOST_ROWS = 16  # of x, which one block of a kernel holds; it takes more, in several


@torch.library.custom_op("inductor_moe::merged_linear", mutates_args=())
def merged_linear(
    x: Tensor,
    packed: Sequence[Tensor],
    scales: Sequence[Tensor],
    zeros: Sequence[Tensor],
    group_size: int,
    dense: Sequence[Tensor],
) -> Tensor:
    """[x @ W.T for every W], one after the other: the packed weights first, then the dense ones.

    x           [M, K]    bf16, fp16 or fp32
    packed      [N_i, .]  at most 4, of one dtype; as in `dequantize`
    scales      [N_i, G]  one for each, in x.dtype
    zeros       [N_i, G]  one for each, or none at all
    group_size            of every packed weight
    dense       [D_j, K]  at most 4, in x.dtype; at least one weight in all
    returns     [M * sum of N_i and D_j] in x.dtype: [M, N_i] for each, contiguous; sums in fp32
    """
    check_merged(x, packed, scales, zeros, group_size, dense)
    if triton_launches(x) is not None:
        from inductor_moe.ops.merged_linear_cuda import merged_linear_cuda

        return merged_linear_cuda(x, packed, scales, zeros, group_size, dense)
    return merged_linear_plain(x, packed, scales, zeros, group_size, dense)


@merged_linear.register_fake
def _(x: Tensor, packed: Sequence[Tensor], *rest: Any) -> Tensor:
    check_merged(x, packed, *rest)
    return x.new_empty(x.shape[0] * sum(weight.shape[0] for weight in (*packed, *rest[-1])))


def merged_linear_plain(
    x: Tensor,
    packed: Sequence[Tensor],
    scales: Sequence[Tensor],
    zeros: Sequence[Tensor],
    group_size: int,
    dense: Sequence[Tensor],
) -> Tensor:
    """`merged_linear` in aten."""
    parts = [
        quantized_linear_plain(x, w, s, zeros[i] if zeros else None, None, group_size)
        for i, (w, s) in enumerate(zip(packed, scales, strict=True))
    ]
    parts += [F.linear(x, weight) for weight in dense]
    return torch.cat([part.reshape(-1) for part in parts])


def check_merged(
    x: Tensor,
    packed: Sequence[Tensor],
    scales: Sequence[Tensor],
    zeros: Sequence[Tensor],
    group_size: int,
    dense: Sequence[Tensor],
) -> None:
    """Raise if `merged_linear` cannot take these arguments."""
    op = "merged_linear"
    if x.dim() != 2:
        raise ValueError(f"{op}: x must be [M, K] (got {list(x.shape)}).")
    if len(packed) + len(dense) < 1 or max(len(packed), len(dense)) > MEMBERS:
        raise ValueError(
            f"{op}: there are {len(packed)} packed and {len(dense)} dense weights; there must be "
            f"at least one, and at most {MEMBERS} of a kind."
        )
    if len(scales) != len(packed) or len(zeros) not in (0, len(packed)):
        raise ValueError(
            f"{op}: there are {len(scales)} scales and {len(zeros)} zeros for {len(packed)} "
            "packed weights; each needs a scale, and all or none have zeros."
        )
    if len({weight.dtype for weight in packed}) > 1:
        raise TypeError(f"{op}: packed weights of different bits cannot be merged.")
    if len({value.dtype for value in zeros}) > 1:
        raise TypeError(f"{op}: packed weights with zeros of different dtypes cannot be merged.")
    for i, (weight, scale) in enumerate(zip(packed, scales, strict=True)):
        check_linear(x, weight, scale, zeros[i] if zeros else None, None, group_size)
    for weight in dense:
        if weight.dim() != 2 or weight.shape[1] != x.shape[1]:
            raise ValueError(
                f"{op}: a dense weight has shape {list(weight.shape)}; it must be "
                f"[rows, {x.shape[1]}]."
            )
        if weight.dtype != x.dtype or weight.device != x.device:
            raise TypeError(
                f"{op}: a dense weight is {weight.dtype} on {weight.device}; it must be "
                f"{x.dtype} on {x.device} like x."
            )
