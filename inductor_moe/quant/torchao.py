"""torchao's weight tensors as integer codes; torchao itself is never imported.

Where torchao keeps zero points in units of the weight, w = (code - 8) * scale + offset, ours are
8 - offset / scale in fp32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from inductor_moe import compat
from inductor_moe.quant.codes import Codes, unpack_codes
from inductor_moe.reference.quant import CENTER

LANES = 32  # of a warp, in torchao's tiles


class Unreadable(Exception):
    """Why a weight cannot be read as codes. The text is shown to the user."""


def is_torchao(value: Any) -> bool:
    """Whether value is a tensor of one of torchao's classes."""
    packages = {kind.__module__.split(".")[0] for kind in type(value).__mro__}
    return isinstance(value, Tensor) and "torchao" in packages


def read(weight: Tensor) -> Codes:
    """The codes of one of torchao's weights, exactly. Raises Unreadable."""
    name = type(weight).__name__
    if name not in READERS:
        raise Unreadable(f"a {name} of torchao; {', '.join(READERS)} are read")
    try:
        found = READERS[name](weight)
        if getattr(weight, "act_pre_scale", None) is not None:
            raise Unreadable(f"its {name} scales the activations too (act_pre_scale)")
    except AttributeError as error:
        raise Unreadable(f"a {name} of another version of torchao: {error}") from error
    group = found.group_size
    if group not in (0, 16, 32) and group % 64:
        raise Unreadable(f"groups of {group}; the kernels read 16, 32 and multiples of 64")
    return found


def _int4_plain(weight: Any) -> Codes:
    """Int4Tensor: two signed codes a byte along K, the first in the low bits; scales [.., G, N]"""
    if weight.activation_dtype != torch.bfloat16:
        raise Unreadable(f"its activations are quantised to {weight.activation_dtype}")
    codes = unpack_codes(weight.qdata) ^ CENTER  # 4-bit two's complement, 8 added
    return _with_offsets(weight, codes, weight.scale.mT, weight.zero_point.mT)


def _int4_tiles(weight: Any) -> Codes:
    """Int4TilePackedTo4dTensor: [.., N / 8, K / (16 I), 32 lanes, I / 2] words of int32, I = 8.

    Lane t holds output t // 4. From the low end the nibbles of a word are the inputs 0, 8, 16,
    24, 1, 9, 17, 25 behind 2 (t % 4), and a lane's words are 32 inputs apart. N and K are padded.
    """
    if torch.version.hip is not None:
        raise Unreadable("tiles for a GPU of AMD")
    data, (rows, inputs) = weight.qdata, weight.shape[-2:]
    parts = [untile(part) for part in (data if data.dim() == 5 else data[None])]
    codes = torch.stack(parts) if data.dim() == 5 else parts[0]
    groups = -(-inputs // weight.block_size[-1])
    scales, offsets = (v.mT[..., :rows, :groups] for v in weight.scale_and_zero.unbind(-1))
    return _with_offsets(weight, codes[..., :rows, :inputs], scales, offsets)


def untile(words: Tensor) -> Tensor:
    """[N / 8, K / (16 I), 32, I / 2] int32 words of `_int4_tiles` -> [N, K] uint8 codes."""
    if words.dtype != torch.int32 or words.dim() != 4 or words.shape[2] != LANES:
        raise Unreadable(f"tiles of shape {list(words.shape)} and dtype {words.dtype}")
    n, k, _, w = words.shape
    shifts = torch.arange(0, 32, 4, dtype=torch.int32, device=words.device)
    nibbles = ((words[..., None] >> shifts) & 15).to(torch.uint8)
    parts = nibbles.view(n, k, 8, 4, w, 2, 2, 2)  # output, pair, word, odd, 16s, 8s
    return parts.permute(0, 2, 1, 4, 6, 7, 3, 5).reshape(8 * n, -1)


def _int4_opaque(weight: Any) -> Codes:
    """Int4OpaqueTensor: what the CPU's own product reads; scales and offsets [G, N, 2]"""
    if weight.act_mapping_type is not None:
        raise Unreadable("its activations are quantised to int8")
    codes = compat.int4_cpu_codes(weight.qdata, weight.shape[-1], weight.block_size[-1])
    scales, offsets = (value.mT for value in weight.scale_and_zero.unbind(-1))
    return _with_offsets(weight, codes, scales, offsets)


def _int8(weight: Any) -> Codes:
    """Int8Tensor: codes [..., N, K]; scales fp32 for rows, groups or the whole weight"""
    if weight.act_quant_kwargs is not None:
        raise Unreadable("its activations are quantised to int8")
    return _with_zeros(weight, weight.qdata, 8)


def _intx(weight: Any) -> Codes:
    """IntxUnpackedToInt8Tensor: signed codes of 1 to 8 bits in int8."""
    if weight.activation_quantization is not None:
        raise Unreadable("its activations are quantised to int8")
    bits = int(str(weight.target_dtype).removeprefix("torch.int"))
    return _with_zeros(weight, weight.qdata, 4 if bits <= 4 else 8)


def _with_offsets(weight: Any, codes: Tensor, scales: Tensor, offsets: Tensor) -> Codes:
    """w = (code - 8) * scale + offset, with codes in [0, 15]."""
    scale, offset = scales.double(), offsets.double()
    zeros = None
    if offset.any():
        if bool(((scale == 0) & (offset != 0)).any()):
            raise Unreadable("a group has the scale 0 and an offset")
        zeros = (CENTER - offset / torch.where(scale == 0, 1.0, scale)).float()
    return Codes(codes, scales, zeros, 4, _group_size(weight))


def _with_zeros(weight: Any, signed: Tensor, bits: int) -> Codes:
    """w = (code - zero) * scale, with signed codes."""
    *lead, inputs = signed.shape
    group = _group_size(weight)
    shape = [*lead, inputs // group if group else 1]
    center = CENTER if bits == 4 else 0
    zeros = weight.zero_point
    if zeros is not None:
        zeros = zeros.expand(shape).float() + center if zeros.any() else None
    scales = weight.scale.expand(shape).to(weight.dtype)
    codes = (signed + center).to(torch.uint8) if bits == 4 else signed
    return Codes(codes, scales, zeros, bits, group)


def _group_size(weight: Any) -> int:
    """The inputs of a block that is part of one row, or of blocks of whole rows: 0."""
    *outer, inner = (int(size) for size in weight.block_size)
    *lead, inputs = weight.shape
    if inner == inputs and all(b in (1, size) for b, size in zip(outer, lead, strict=True)):
        return 0
    if any(size != 1 for size in outer):
        raise Unreadable(f"blocks of {[*outer, inner]}; a group must lie in one row")
    return inner


READERS = {
    "Int4Tensor": _int4_plain,
    "Int4TilePackedTo4dTensor": _int4_tiles,
    "Int4OpaqueTensor": _int4_opaque,
    "Int8Tensor": _int8,
    "IntxUnpackedToInt8Tensor": _intx,
}
