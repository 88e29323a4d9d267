"""Attention of one query position: the repeated heads of the cache are never written out.

Keys and values that were repeated for groups of query heads are read from where they lie. A
sigmoid gate on the output becomes part of the op.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import fx

from inductor_moe.compat import writes
from inductor_moe.ops.attention import attention_decode
from inductor_moe.patterns.attention.read import (
    Attention,
    anchors,
    mask_of_four_dims,
    read_attention,
)
from inductor_moe.patterns.rewrite import Refusal, Rewrite
from inductor_moe.patterns.walk import (
    aten,
    call,
    dtype,
    is_call,
    keeps_order,
    operands,
    peel,
    plain_binary,
    same,
    same_sizes,
    size_of,
    sizes,
)


@dataclasses.dataclass(frozen=True)
class DecodeSite(Attention):
    """Attention with T = 1, whose output may be a gate's.

    output  B * Hq * DV in order
    gate    the output is multiplied by its sigmoid; B * Hq * DV in order, or None
    """

    gate: fx.Node | None

    def describe(self) -> str:
        return super().describe() + ("; gate" if self.gate else "")


def walk(anchor: fx.Node) -> DecodeSite:
    """Read the attention that `anchor` computes."""
    site = read_attention(anchor)
    batch, _, queries, _ = sizes(site.q)
    if not same(queries, 1):
        raise Refusal(f"there are {queries} query positions")
    output, gate = _gated(anchor, site.output, batch)
    found = {field.name: getattr(site, field.name) for field in dataclasses.fields(site)}
    return DecodeSite(**{**found, "output": output, "gate": gate})


def _gated(anchor: fx.Node, output: fx.Node, batch: Any) -> tuple[fx.Node, fx.Node | None]:
    """(output * sigmoid(gate), gate) where that is its only use, else (output, None)."""
    node = output
    while len(node.users) == 1:
        (user,) = node.users
        if not keeps_order(user):
            break
        node = user
    if len(node.users) != 1 or not plain_binary(user, aten.mul.Tensor):
        return output, None
    for value, factor in operands(user):
        gated = value is node and is_call(factor, aten.sigmoid.default)
        if not gated or not same_sizes(sizes(value), sizes(factor)):
            continue
        known = all(isinstance(size, int) or same(size, batch) for size in sizes(user))
        alike = dtype(user) == dtype(factor.args[0]) == dtype(output)
        if known and alike and _untouched(anchor, user):
            return user, peel(factor.args[0], keeps_order)
    return output, None


def _untouched(first: fx.Node, last: fx.Node) -> bool:
    """Whether nothing between the two nodes of a graph writes anything."""
    node = first
    while node is not last:
        node = node.next
        if writes(node.target):
            return False
    return True


def replace(graph: fx.Graph, site: DecodeSite) -> fx.Node:
    """Insert the op in the place of the attention, or of its gate."""
    with graph.inserting_before(site.output if site.gate else site.anchor):
        q = call(graph, aten.squeeze.dim, site.q, 2, like=site.anchor)
        mask = mask_of_four_dims(graph, site)
        gate = _heads(graph, site) if site.gate else None
        op = attention_decode._opoverload
        out = call(graph, op, q, site.k, site.v, mask, site.scale, gate, like=site.anchor)
        if site.gate:
            rows = size_of(graph, site.q, 0, site.anchor)
            shape = [size if isinstance(size, int) else rows for size in sizes(site.output)]
            shaped = call(graph, aten.reshape.default, out, shape, like=site.anchor)
        else:
            shaped = call(graph, aten.unsqueeze.default, out, 2, like=site.anchor)
    site.output.replace_all_uses_with(shaped)
    return out


def _heads(graph: fx.Graph, site: DecodeSite) -> fx.Node:
    """The gate [B, Hq, DV], where it lies if it has no other dims but one of size 1."""
    gate = site.gate
    assert gate is not None
    batch, heads = sizes(site.q)[:2]
    shape = (batch, heads, sizes(site.v)[3])
    for dim in (1, 2):
        if same_sizes(sizes(gate), (*shape[:dim], 1, *shape[dim:])):
            return call(graph, aten.squeeze.dim, gate, dim, like=gate)
    rows = size_of(graph, site.q, 0, site.q)
    return call(graph, aten.reshape.default, gate, [rows, *shape[1:]], like=gate)


DECODE = Rewrite(
    "attention.decode",
    op="attention_decode",
    anchors=anchors,
    walk=walk,
    replace=replace,
    describe=DecodeSite.describe,
    optional=True,
)
