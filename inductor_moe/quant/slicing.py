"""Rows and columns of a packed weight that a module holds, as a packed weight of its own."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from inductor_moe.quant.fit import Packed
from inductor_moe.quant.modules import Slot, buffers_of, replace_parameter, slots_of
from inductor_moe.reference.quant import group_count, pack_int4, unpack_int4


def keep_packed_rows(module: nn.Module, slot: Slot, rows: Tensor) -> None:
    """Keep rows of a packed weight [N, K], in place, in this order."""
    held = buffers_of(module, slot)
    rows = rows.to(held.packed.device)
    zeros = None if held.zeros is None else held.zeros.index_select(0, rows)
    kept = (held.packed.index_select(0, rows), held.scales.index_select(0, rows), zeros)
    replace_parameter(module, slot, Packed(*kept))


def columns_group(slot: Slot, count: int) -> int | None:
    """The group size of a packed weight cut into parts of `count` columns; None: cannot be cut.

    Groups that a cut would split become smaller ones with the same scale, if there are kernels
    for their size.
    """
    if group_count(slot.in_features, slot.group_size) == 1:
        return slot.group_size
    size = math.gcd(slot.group_size, count)
    return size if size in (16, 32) or size % 64 == 0 else None


def keep_packed_columns(module: nn.Module, slot: Slot, part: int, count: int) -> None:
    """Keep columns part * count to (part + 1) * count - 1 of a packed weight [N, K], in place.

    The codes and the values they stand for stay what they are.
    """
    size = columns_group(slot, count)
    if size is None:
        raise ValueError(f"groups of {slot.group_size} cannot be cut into {count} columns")
    held, first = buffers_of(module, slot), part * count
    if slot.bits == 4:
        codes = unpack_int4(held.packed, slot.in_features)
        packed = pack_int4(codes.narrow(-1, first, count))
    else:
        packed = held.packed.narrow(-1, first, count).clone()

    def per_group(values: Tensor) -> Tensor:
        if values.shape[-1] == 1:
            return values.clone()
        groups = torch.arange(first, first + count, size, device=values.device) // slot.group_size
        return values.index_select(-1, groups)

    zeros = None if held.zeros is None else per_group(held.zeros)
    changed = Slot(slot.name, slot.bits, size, count, slot.transposed)
    replace_parameter(module, changed, Packed(packed, per_group(held.scales), zeros))


def slot_of(module: nn.Module, name: str) -> Slot | None:
    """The packed weight of this name, if there is one."""
    return next((slot for slot in slots_of(module) if slot.name == name), None)
