"""Shared experts of `parallelize`: each rank keeps a part of their channels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from inductor_moe.parallel_heads import keep_columns, keep_rows, rows_of
from inductor_moe.quant.slicing import columns_group, slot_of

# Blocks of transformers that return the sum of their routed experts and this one, each a sum of
# terms that ranks can have a part of.
BLOCKS = {
    "Qwen2MoeSparseMoeBlock": "shared_expert",
    "Qwen3NextSparseMoeBlock": "shared_expert",
    "Qwen3_5MoeSparseMoeBlock": "shared_expert",
    "DeepseekV2Moe": "shared_experts",
    "DeepseekV3MoE": "shared_experts",
    "Glm4MoeMoE": "shared_experts",
}
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


def shared_expert_to_cut(block: nn.Module, ranks: int) -> nn.Module | None:
    """The shared expert of a block if its channels divide by the ranks, as they are packed too."""
    shared = getattr(block, BLOCKS.get(type(block).__name__, ""), None)
    if not isinstance(shared, nn.Module):
        return None
    linears: list[Any] = [getattr(shared, name, None) for name in PROJECTIONS]
    tensors = [*shared.parameters(), *shared.buffers()]
    if not all(isinstance(each, nn.Linear) and each.bias is None for each in linears) or not all(
        type(tensor.data) is Tensor for tensor in tensors
    ):
        return None
    down = linears[2]
    slot, count = slot_of(down, "weight"), down.in_features // ranks
    if down.in_features % ranks or not all(
        x.out_features == down.in_features for x in linears[:2]
    ):
        return None
    # With smaller groups than the routed experts' it would no longer be computed along with them.
    if slot is not None and columns_group(slot, count) != slot.group_size:
        return None
    return shared


def keep_channels(shared: Any, rank: int, ranks: int) -> None:
    """Cut a shared expert down to a rank's part, in place; its output is a term of the sum."""
    count = shared.down_proj.in_features // ranks
    with torch.no_grad():
        keep_columns(shared.down_proj, rank, count)
        for projection in (shared.gate_proj, shared.up_proj):
            keep_rows(projection, rows_of(range(rank * count, (rank + 1) * count), 1))
