"""Weights as integer codes: unpacked from words, and packed for the kernels."""

from __future__ import annotations

import dataclasses
from typing import Literal

import torch
from torch import Tensor

from inductor_moe.errors import QuantizationError
from inductor_moe.quant.fit import BLOCK, Packed, Scheme, empty
from inductor_moe.reference.quant import pack_int4


@dataclasses.dataclass(frozen=True)
class Codes:
    """A weight [..., N, K] as integers: (codes - zeros) * scales.

    codes       [..., N, K]  0 to 15 for 4 bits, -128 to 127 for 8
    scales      [..., N, G]  in the weight's dtype
    zeros       [..., N, G]  any float, or None: 8 for 4 bits, 0 for 8
    bits        4 or 8
    group_size  inputs that share a scale; 0 is one group a row
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    bits: int
    group_size: int

    def describe(self) -> str:
        scheme = Scheme(self.bits, self.group_size, self.zeros is None, "")
        return scheme.describe().removesuffix(", ")

    def pack(self) -> Packed:
        """In the layout of the kernels. Zero points stay fp32 where the weight's dtype would
        round them."""
        scheme = Scheme(self.bits, self.group_size, self.zeros is None, "")
        out = empty(self.codes.shape, self.scales.dtype, self.codes.device, scheme)
        flat, into = self.codes.flatten(0, -2), out.packed.flatten(0, -2)
        rows = max(1, BLOCK // max(flat.shape[1], 1))
        for start in range(0, flat.shape[0], rows):
            part = flat[start : start + rows]
            into[start : start + rows] = pack_int4(part) if self.bits == 4 else part
        out.scales.copy_(self.scales)
        zeros = self.zeros
        if zeros is not None:
            narrow = zeros.to(self.scales.dtype)
            kept = narrow if torch.equal(narrow.double(), zeros.double()) else zeros.float()
            zeros = kept.detach().clone(memory_format=torch.contiguous_format)
        return Packed(out.packed, out.scales, zeros)


def unpack_codes(words: Tensor, first: Literal["low", "high"] = "low") -> Tensor:
    """4-bit codes that are packed along the last dim, for `replace_weight`.

    words    [..., W]  uint8 or int8 of two codes each, int32 of eight
    first    where in a word the first of its codes is: the low bits or the high bits
    returns  [..., 2 W] or [..., 8 W] uint8 in [0, 15]
    """
    if words.dtype not in (torch.uint8, torch.int8, torch.int32):
        raise QuantizationError(
            f"words has dtype {words.dtype}; it must be uint8, int8 (two codes each) or int32 "
            "(eight)"
        )
    if first not in ("low", "high"):
        raise QuantizationError(f"first is {first!r}; it must be 'low' or 'high'")
    shifts = range(0, 8 * words.element_size(), 4)
    order = shifts if first == "low" else reversed(shifts)
    planes = [((words >> shift) & 15).to(torch.uint8) for shift in order]
    return torch.stack(planes, -1).flatten(-2)
