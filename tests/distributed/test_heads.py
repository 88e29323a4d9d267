"""Heads of attention and delta-rule layers shared by ranks, all of them in this process."""

from __future__ import annotations

import copy
import dataclasses
import math

import pytest
import torch
import zoo
from torch import nn

import inductor_moe
from inductor_moe import compat
from inductor_moe.errors import ParallelError
from inductor_moe.parallel_heads import keep_heads, layers_to_share, most_shards
from inductor_moe.quant.modules import slots_of
from inductor_moe.testing import relative_error

HEADS = {
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
FAMILIES = ("glm4_moe", "gpt_oss", "granitemoe", "mixtral", "qwen2_moe", "qwen3_moe",
            "qwen3_next", "qwen3_5_moe_text")  # fmt: skip


def build(name, **sizes):
    family = next(family for family in zoo.MOE if family.name == name)
    sizes = {key: value for key, value in {**HEADS, **sizes}.items()
             if not key.startswith("linear") or family.delta_layers}  # fmt: skip
    return zoo.Family(name, {**family.overrides, **sizes}).build()


@pytest.fixture
def no_sums(monkeypatch):
    """Each rank returns what it would have added."""
    monkeypatch.setattr(compat, "all_reduce", lambda tensor, group: tensor)


def ranks_of(layer, ranks):
    """A copy of a layer for each rank, which keeps its heads."""
    found = []
    for rank in range(ranks):
        own = dataclasses.replace(layer, module=copy.deepcopy(layer.module))
        keep_heads(own, rank, None)
        found.append(own.module)
    return found


class Ranks(nn.Module):
    """All ranks of a layer in its place, their outputs added up."""

    def __init__(self, ranks):
        super().__init__()
        self.ranks = nn.ModuleList(ranks)
        for name in ("layer_type", "layer_idx"):
            if hasattr(ranks[0], name):
                setattr(self, name, getattr(ranks[0], name))

    def forward(self, *args, **kwargs):
        found = [rank(*args, **kwargs) for rank in self.ranks]
        if isinstance(found[0], tuple):
            return sum(output for output, _ in found), None
        return sum(found)


def replaced(model, ranks):
    """Put all ranks in the place of every layer that can be shared; these layers."""
    layers = layers_to_share(model, ranks)
    for layer in layers:
        parent, _, leaf = layer.name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, Ranks(ranks_of(layer, ranks)))
    return layers


@pytest.mark.parametrize(
    "family, packed, ranks",
    [
        *((family, False, 4) for family in FAMILIES),  # two ranks for a key head
        *((family, True, 2) for family in ("gpt_oss", "qwen3_next", "qwen3_5_moe_text")),
        ("gpt_oss", False, 8),  # two ranks for a part
        ("qwen3_5_moe_text", True, 6),  # three
    ],
)
def test_ranks_add_up(no_sums, family, packed, ranks):
    model = build(family)
    if packed:
        inductor_moe.quantize_(model, "int4", group_size=16, verbose=False)
    prompt = zoo.prompt(model, 6, seed=1)
    with torch.no_grad():
        whole = model(prompt, use_cache=False).logits
        layers = replaced(model, ranks)
        assert len(layers) == 2 and {layer.shards for layer in layers} == {math.gcd(ranks, 4)}
        found = model(prompt, use_cache=False).logits
    assert relative_error(found, whole) < 2e-6


@pytest.mark.parametrize(
    "ranks, heads, keys, shards",
    [
        (2, 16, 2, 2),
        (4, 16, 2, 4),  # two ranks for each key head
        (64, 16, 2, 16),  # four ranks for each part
        (1, 16, 2, 1),
        (3, 16, 2, 1),
        (6, 16, 2, 2),
        (4, 24, 6, 2),  # in four parts, six heads would be of one and a half key heads
        (32, 32, 16, 32),
        (1024, 32, 16, 32),
    ],
)
def test_parts_divide_ranks_and_heads(ranks, heads, keys, shards):
    assert most_shards(ranks, heads, keys) == shards


def test_norms_over_all_heads_leave_a_layer_whole():
    model = build("qwen3_moe")
    model.model.layers[0].self_attn.q_norm.weight = nn.Parameter(torch.ones(64))
    assert [layer.name for layer in layers_to_share(model, 2)] == ["model.layers.1.self_attn"]


@pytest.mark.parametrize(
    "dtype, group_size, symmetric, after",
    [
        ("int4", 128, True, 32),
        ("int4", 16, False, 16),
        ("int8", 0, True, 0),
        ("int8", 64, False, 32),
    ],
)
def test_columns_of_packed_weights_keep_their_values(no_sums, dtype, group_size, symmetric, after):
    """A group that a cut splits becomes smaller ones: 192 inputs, of which each rank has 96."""
    model = build("qwen3_moe", num_attention_heads=12, num_key_value_heads=2)
    inductor_moe.quantize_(model, dtype, group_size=group_size, symmetric=symmetric, verbose=False)
    layer = layers_to_share(model, 2)[0]
    whole = layer.output.weight
    parts = [part.o_proj for part in ranks_of(layer, 2)]
    assert torch.equal(torch.cat([part.weight for part in parts], dim=1), whole)
    assert [slots_of(part)[0].group_size for part in parts] == [after] * 2
    assert [part.in_features for part in parts] == [96, 96]


def test_groups_that_heads_cannot_cut_are_refused():
    model = build("qwen3_moe", head_dim=12)
    inductor_moe.quantize_(model, "int4", group_size=16, verbose=False)
    with pytest.raises(ParallelError, match="groups of 16 inputs, which 24 a rank cut"):
        layers_to_share(model, 2)
