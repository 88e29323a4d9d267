"""Packed weights in plain torch: the layout of 4-bit codes, and what a packed weight means.

4 bits: int16 words in chunks of 64 codes. Word i of a chunk holds the codes 16 j + i in its
nibbles j = 0..3, so that one nibble of 16 neighbouring words is 16 neighbouring codes: a K = 16
step of the tensor cores, unpacked two codes at a time without moving any bit across words.
8 bits: the int8 codes themselves.
"""

from __future__ import annotations

import torch
from torch import Tensor

CHUNK = 64  # codes in 16 words of 4 nibbles
WORDS = 16
CENTER = 8  # the 4-bit code of zero where there are no zero points
BITS = {torch.int16: 4, torch.int8: 8}
INT8_GROUPS = (32, 64, 128)  # groups of 4-bit codes that are multiplied with int8 activations


def packed_width(in_features: int, bits: int) -> int:
    """Elements of a packed row of `in_features` codes."""
    return -(-in_features // CHUNK) * WORDS if bits == 4 else in_features


def group_count(in_features: int, group_size: int) -> int:
    """Groups in a row; the last may be short. group_size 0 is one group, the whole row."""
    return -(-in_features // group_size) if group_size else 1


def pack_int4(codes: Tensor) -> Tensor:
    """[..., N, K] integers in [0, 15] -> [..., N, ceil(K / 64) * 16] int16; padding is code 8."""
    short = -codes.shape[-1] % CHUNK
    codes = torch.nn.functional.pad(codes.to(torch.int32), (0, short), value=CENTER)
    planes: Tensor = codes.unflatten(-1, (-1, 4, WORDS))
    shifts = torch.arange(0, 16, 4, dtype=torch.int32, device=codes.device)[:, None]
    # Nibbles do not overlap: their sum is their union. Above 2^15 int16 wraps, as it should.
    words: Tensor = (planes << shifts).sum(-2, dtype=torch.int32).to(torch.int16)
    return words.flatten(-2)


def unpack_int4(packed: Tensor, in_features: int) -> Tensor:
    """The inverse of `pack_int4`: [..., N, K] int16 codes in [0, 15]."""
    words = packed.unflatten(-1, (packed.shape[-1] // WORDS, WORDS)).unsqueeze(-2)
    planes: Tensor = torch.cat([(words >> shift) & 15 for shift in (0, 4, 8, 12)], dim=-2)
    codes: Tensor = planes.flatten(-3).narrow(-1, 0, in_features)
    return codes


def dequantize_reference(
    packed: Tensor, scales: Tensor, zeros: Tensor | None, group_size: int, in_features: int
) -> Tensor:
    """(code - zero) * scale in fp32 (fp64 for fp64 scales), rounded to scales.dtype.

    packed   [..., N, ceil(K / 64) * 16] int16 for 4 bits, [..., N, K] int8 for 8
    scales   [..., N, G]  G groups of group_size inputs; one group if group_size is 0
    zeros    [..., N, G]  or None: 8 for 4 bits, 0 for 8
    returns  [..., N, K]
    """
    wide = torch.promote_types(scales.dtype, torch.float32)
    if packed.dtype == torch.int16:
        codes = unpack_int4(packed, in_features).to(wide)
        center = float(CENTER)
    else:
        codes, center = packed.to(wide), 0.0
    zero = center if zeros is None else _per_input(zeros, group_size, in_features).to(wide)
    scale = _per_input(scales, group_size, in_features).to(wide)
    return ((codes - zero) * scale).to(scales.dtype)


def round_activations(x: Tensor, group_size: int) -> Tensor:
    """x in steps of int8 codes, symmetric for each row and group: what W4A8 multiplies by.

    The step is the largest of the group over 127; no value moves by more than half of it.

    x        [..., K]
    returns  [..., K]  fp32 (fp64 for fp64)
    """
    inputs = x.shape[-1]
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    grouped = torch.nn.functional.pad(wide, (0, -inputs % group_size)).unflatten(
        -1, (group_count(inputs, group_size), group_size)
    )
    largest = grouped.abs().amax(-1, keepdim=True)
    codes = (grouped * 127 / torch.where(largest == 0, 1.0, largest)).round()
    rounded: Tensor = (codes * (largest / 127)).flatten(-2).narrow(-1, 0, inputs)
    return rounded


def _per_input(values: Tensor, group_size: int, in_features: int) -> Tensor:
    """[..., G] -> a value for each input, [..., K] or [..., 1]."""
    if values.shape[-1] == 1:
        return values
    group = torch.arange(in_features, device=values.device) // group_size
    return values.index_select(-1, group)
