"""PyTorch's own packed weights."""

from __future__ import annotations

import torch
from torch import Tensor

ROWS = 1024


def int4_cpu_codes(packed: Tensor, in_features: int, group_size: int) -> Tensor:
    """[N, K] uint8 codes behind what `_convert_weight_to_int4pack_for_cpu` packed.

    Its layout depends on the CPU and the shape, so the product that reads it is asked: a unit
    vector times codes of scale 1 and offset 8 is a column of codes, exactly.
    """
    outputs, groups = packed.shape[0], in_features // group_size
    ones = torch.tensor([1.0, 8.0]).expand(groups, outputs, 2).contiguous()
    columns = []
    for start in range(0, in_features, ROWS):
        count = min(ROWS, in_features - start)
        unit = torch.zeros(count, in_features)
        unit[torch.arange(count), torch.arange(start, start + count)] = 1
        found = torch.ops.aten._weight_int4pack_mm_for_cpu(unit, packed, group_size, ones)
        columns.append(found.to(torch.uint8))
    return torch.cat(columns).mT.contiguous()
