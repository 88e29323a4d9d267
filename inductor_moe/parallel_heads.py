"""Sharding heads of attention and delta-rule layers over the ranks of `parallelize`."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from inductor_moe import compat
from inductor_moe.errors import ParallelError
from inductor_moe.quant.slicing import (
    columns_group,
    keep_packed_columns,
    keep_packed_rows,
    slot_of,
)

# Layers of transformers whose code reads how many heads there are off its tensors and attributes.
ATTENTION = frozenset(
    f"{family}Attention"
    for family in (
        "Glm4Moe", "GptOss", "GraniteMoe", "Mixtral", "Qwen2Moe", "Qwen3Moe", "Qwen3Next",
        "Qwen3_5Moe",
    )
)  # fmt: skip
DELTA = frozenset(("Qwen3NextGatedDeltaNet", "Qwen3_5MoeGatedDeltaNet"))


@dataclasses.dataclass(frozen=True)
class HeadsLayer:
    """A layer whose heads can be shared out.

    heads   query heads of attention, value heads of a delta rule
    keys    key heads; each serves heads // keys neighbouring heads
    shards  into how many parts the heads are cut; if fewer than the ranks, ranks r, r + shards,
            r + 2 * shards, ... keep the same part and only the first of them adds to the result
    """

    name: str
    module: nn.Module
    heads: int
    keys: int
    shards: int

    @property
    def output(self) -> Any:
        """The projection of the heads back to the hidden size."""
        return self.module.o_proj if _is_attention(self.module) else self.module.out_proj


def most_shards(ranks: int, heads: int, keys: int) -> int:
    """Into how many equal parts heads can be cut for `ranks` ranks: a divisor of both.

    Key heads divide too, or each part has one that others have as well.
    """
    return max(
        n
        for n in range(1, min(ranks, heads) + 1)
        if ranks % n == 0 and heads % n == 0 and (keys % n == 0 or n % keys == 0)
    )


def layers_to_share(model: nn.Module, ranks: int) -> list[HeadsLayer]:
    """The layers whose heads more than one rank can share, in the model's order.

    Raises ParallelError for a packed projection that cannot be cut between heads.
    """
    found = []
    for name, module in model.named_modules():
        counted = _heads_of(module)
        if counted is None or (shards := most_shards(ranks, *counted)) == 1:
            continue
        layer = HeadsLayer(name, module, *counted, shards)
        slot = slot_of(layer.output, "weight")
        columns = layer.output.in_features // shards
        if slot is not None and columns_group(slot, columns) is None:
            raise ParallelError(
                f"parallelize: the output projection of {name} is packed in groups of "
                f"{slot.group_size} inputs, which {columns} a rank cut at no multiple of 16; "
                "quantise with another group_size, skip that projection, or pass heads=False"
            )
        found.append(layer)
    return found


def keep_heads(layer: HeadsLayer, rank: int, group: str) -> None:
    """Keep this rank's heads of a layer, in place; add results up over the group of that name."""
    shard_heads(layer, rank % layer.shards)
    output = layer.output
    if rank > 0 and output.bias is not None:  # to be added once
        output.bias = nn.Parameter(torch.zeros_like(output.bias), output.bias.requires_grad)
    output.register_forward_hook(Sum(group, rank < layer.shards))


class Sum:
    """Adds up the results of all ranks; `counts`: whether this rank's own is one to add.

    group  the name of the ranks' process group
    """

    def __init__(self, group: str, counts: bool = True) -> None:
        self.group, self.counts = group, counts

    def __call__(self, _module: nn.Module, _args: tuple[Any, ...], output: Tensor) -> Tensor:
        # One sum over all ranks, not one for each set of parts: its result is the same to the
        # bit everywhere, and so are the choices of the routers after it.
        output = output if self.counts else torch.zeros_like(output)
        return compat.all_reduce(output, self.group)


def shard_heads(layer: HeadsLayer, part: int) -> None:
    """Cut a layer down to part `part` of its heads; its output is then a term of the sum."""
    count, keys = layer.heads // layer.shards, max(layer.keys // layer.shards, 1)
    heads = range(part * count, (part + 1) * count)
    first_key = part * layer.keys // layer.shards
    cut = _cut_attention if _is_attention(layer.module) else _cut_delta
    with torch.no_grad():
        keep_columns(layer.output, part, layer.output.in_features // layer.shards)
        cut(layer, heads, range(first_key, first_key + keys))


def _is_attention(module: nn.Module) -> bool:
    return type(module).__name__ in ATTENTION


def _heads_of(module: Any) -> tuple[int, int] | None:
    """(heads, key heads) of a layer that is known and built as expected."""
    if _is_attention(module):
        width = module.head_dim
        heads, keys = module.o_proj.in_features // width, module.k_proj.out_features // width
        norms = (getattr(module, name, None) for name in ("q_norm", "k_norm"))
        own = all(norm is None or norm.weight.shape == (width,) for norm in norms)
        return (heads, keys) if own and heads == keys * module.num_key_value_groups else None
    if type(module).__name__ in DELTA:
        return module.num_v_heads, module.num_k_heads
    return None


def _cut_attention(layer: HeadsLayer, heads: range, keys: range) -> None:
    module: Any = layer.module
    # Of a gated layer a head's rows are those of its query and then those of its gate.
    keep_rows(module.q_proj, rows_of(heads, module.q_proj.out_features // layer.heads))
    for projection in (module.k_proj, module.v_proj):
        keep_rows(projection, rows_of(keys, module.head_dim))
    if isinstance(getattr(module, "sinks", None), nn.Parameter):
        module.sinks = _parameter(module.sinks, rows_of(heads, 1))
    module.num_key_value_groups = len(heads) // len(keys)


def _cut_delta(layer: HeadsLayer, heads: range, keys: range) -> None:
    module: Any = layer.module
    key, value = module.head_k_dim, module.head_v_dim
    queries_and_keys = [rows_of(keys, key), rows_of(keys, key, module.key_dim)]
    mixed = torch.cat([*queries_and_keys, rows_of(heads, value, 2 * module.key_dim)])
    if hasattr(module, "in_proj_qkvz"):
        keep_rows(module.in_proj_qkvz, _interleaved(layer, heads, keys, [key, key], value))
        keep_rows(module.in_proj_ba, _interleaved(layer, heads, keys, [], 1))
    else:
        keep_rows(module.in_proj_qkv, mixed)
        keep_rows(module.in_proj_z, rows_of(heads, value))
        for projection in (module.in_proj_b, module.in_proj_a):
            keep_rows(projection, rows_of(heads, 1))
    keep_rows(module.conv1d, mixed)
    module.dt_bias = _parameter(module.dt_bias, rows_of(heads, 1))
    module.A_log = _parameter(module.A_log, rows_of(heads, 1))
    module.num_v_heads, module.num_k_heads = len(heads), len(keys)
    module.key_dim, module.value_dim = len(keys) * key, len(heads) * value
    module.conv_dim = module.conv1d.groups = 2 * module.key_dim + module.value_dim


def _interleaved(
    layer: HeadsLayer, heads: range, keys: range, before: list[int], value: int
) -> Tensor:
    """Rows of a projection that holds, key head by key head, two blocks of its value heads.

    before  rows of a key head that come before those blocks, all of which are kept
    value   rows of a value head in either block
    """
    served = layer.heads // layer.keys
    stride = sum(before) + 2 * served * value
    rows = []
    for key in keys:
        own = range(max(heads.start, key * served), min(heads.stop, (key + 1) * served))
        inside = range(own.start - key * served, own.stop - key * served)
        start = key * stride
        rows.append(torch.arange(start, start + sum(before)))
        start += sum(before)
        rows += [rows_of(inside, value, start), rows_of(inside, value, start + served * value)]
    return torch.cat(rows)


def rows_of(heads: range, width: int, first: int = 0) -> Tensor:
    """The rows of heads of `width` rows each, the first head's starting at `first`."""
    return torch.arange(first + heads.start * width, first + heads.stop * width)


def keep_rows(module: Any, rows: Tensor) -> None:
    """Keep rows of a linear layer or of a convolution by channel."""
    slot = slot_of(module, "weight")
    if slot is not None:
        keep_packed_rows(module, slot, rows)
    for name, parameter in module._parameters.items():
        if parameter is not None:
            module._parameters[name] = _parameter(parameter, rows)
    if isinstance(module, nn.Linear):
        module.out_features = len(rows)
    else:
        module.in_channels = module.out_channels = len(rows)


def keep_columns(module: Any, part: int, count: int) -> None:
    slot = slot_of(module, "weight")
    if slot is not None:
        keep_packed_columns(module, slot, part, count)
    else:
        weight = module.weight
        kept = weight.data.narrow(1, part * count, count).clone()
        module.weight = nn.Parameter(kept, requires_grad=weight.requires_grad)
    module.in_features = count


def _parameter(parameter: nn.Parameter, rows: Tensor) -> nn.Parameter:
    kept = parameter.data.index_select(0, rows.to(parameter.device))
    return nn.Parameter(kept, requires_grad=parameter.requires_grad)
