"""Argument checks of the ops on packed weights."""

from __future__ import annotations

import torch
from torch import Tensor

from inductor_moe.reference.quant import BITS, INT8_GROUPS, group_count, packed_width


def check_packed(
    op: str,
    prefix: str,
    packed: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    group_size: int,
    in_features: int,
    int8_activations: bool = False,
) -> None:
    """Raise if the buffers are no packed weight [..., N, in_features].

    int8_activations  whether it is multiplied with int8 activations, as not every one can be
    """
    if packed.dtype not in BITS:
        raise TypeError(
            f"{op}: {prefix}packed has dtype {_dtype(packed)}; it must be int16 (4-bit codes) or "
            "int8."
        )
    if group_size != 0 and group_size not in (16, 32) and (group_size < 0 or group_size % 64):
        raise ValueError(
            f"{op}: {prefix}group_size must be 0, 16, 32 or a multiple of 64 (got {group_size})."
        )
    if int8_activations and (BITS[packed.dtype] != 4 or group_size not in INT8_GROUPS):
        raise ValueError(
            f"{op}: int8_activations needs {prefix}packed of 4-bit codes in groups of 32, 64 or "
            f"128 (got {BITS[packed.dtype]} bits, {prefix}group_size {group_size})."
        )
    if packed.dim() < 2:
        raise ValueError(f"{op}: {prefix}packed must be [..., N, words] (got {_shape(packed)}).")
    width = packed_width(in_features, BITS[packed.dtype])
    if packed.shape[-1] != width:
        raise ValueError(
            f"{op}: {prefix}packed has shape {_shape(packed)}; for {in_features} inputs its last "
            f"dim must be {width}."
        )
    expected = (*packed.shape[:-1], group_count(in_features, group_size))
    for name, value in (("scales", scales), ("zeros", zeros)):
        if value is None:
            continue
        if not value.dtype.is_floating_point or value.dtype not in (scales.dtype, torch.float32):
            raise TypeError(
                f"{op}: {prefix}{name} has dtype {_dtype(value)}; it must be "
                + (
                    "a float."
                    if value is scales
                    else f"{_dtype(scales)}, that of {prefix}scales, or float32."
                )
            )
        if tuple(value.shape) != expected:
            raise ValueError(
                f"{op}: {prefix}{name} has shape {_shape(value)}; it must be {list(expected)}: a "
                f"value for each group of {group_size or in_features} of {in_features} inputs."
            )
        if value.device != packed.device:
            raise ValueError(
                f"{op}: {prefix}{name} is on {value.device}; it must be on {packed.device}."
            )


def check_linear(
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    group_size: int,
    int8_activations: bool = False,
) -> None:
    """Raise if `quantized_linear` cannot take these arguments."""
    op = "quantized_linear"
    if x.dim() != 2:
        raise ValueError(f"{op}: x must be [M, K] (got {_shape(x)}).")
    if x.dtype != scales.dtype:
        raise TypeError(
            f"{op}: x has dtype {_dtype(x)}; it must be that of scales, {_dtype(scales)}."
        )
    if packed.dim() != 2:
        raise ValueError(f"{op}: packed must be [N, words] (got {_shape(packed)}).")
    if packed.device != x.device:
        raise ValueError(f"{op}: packed is on {packed.device}; it must be on {x.device}.")
    check_packed(op, "", packed, scales, zeros, group_size, x.shape[1], int8_activations)
    if bias is not None and (bias.dim() != 1 or bias.shape[0] != packed.shape[0]):
        raise ValueError(f"{op}: bias has shape {_shape(bias)}; it must be [{packed.shape[0]}].")


def _shape(tensor: Tensor) -> str:
    return f"[{', '.join(str(n) for n in tensor.shape)}]"


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
