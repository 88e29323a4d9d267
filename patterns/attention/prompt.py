"""Attention of a prompt under a bool mask: what the mask hides is skipped, no head is repeated.

PyTorch's attention computes with all of a static cache, whatever its mask hides, and with both
halves of a causal mask that reaches it as a tensor.
"""

from __future__ import annotations

import torch
from torch import fx

from inductor_moe.ops.attention_prompt import PROMPT_DTYPES, attention_prompt
from inductor_moe.patterns.attention.read import (
    Attention,
    anchors,
    mask_of_four_dims,
    read_attention,
)
from inductor_moe.patterns.rewrite import Refusal, Rewrite
from inductor_moe.patterns.walk import call, dtype, sizes

# The rows of the smallest block; fewer queries are left to PyTorch.
LEAST_QUERIES = 16


def walk(anchor: fx.Node) -> Attention:
    """Read the attention that `anchor` computes."""
    site = read_attention(anchor)
    queries = sizes(site.q)[2]
    if isinstance(queries, int) and queries < LEAST_QUERIES:
        raise Refusal(f"there are {queries} query positions")
    if dtype(site.q) not in PROMPT_DTYPES:
        raise Refusal(f"the dtype is {dtype(site.q)}")
    if site.mask is None or dtype(site.mask) != torch.bool:
        raise Refusal("there is no bool mask")
    if not site.scale > 0:
        raise Refusal(f"the scale is {site.scale}")
    return site


def replace(graph: fx.Graph, site: Attention) -> fx.Node:
    """Insert the op in the place of the attention."""
    with graph.inserting_before(site.anchor):
        mask = mask_of_four_dims(graph, site)
        op = attention_prompt._opoverload
        out = call(graph, op, site.q, site.k, site.v, mask, site.scale, like=site.anchor)
    site.output.replace_all_uses_with(out)
    return out


PROMPT = Rewrite(
    "attention.prompt",
    op="attention_prompt",
    anchors=anchors,
    walk=walk,
    replace=replace,
    describe=Attention.describe,
    optional=True,
)
