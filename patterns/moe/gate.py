"""A whole router for a few tokens: the residual and norm before it, its linear, its choice.

Each is a launch that computes next to nothing; together they are one, `moe_router`.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from inductor_moe.ops.moe_route import moe_route
from inductor_moe.ops.moe_router import COUNTERS, MAX_HIDDEN, MAX_READ, MAX_TOKENS, moe_router
from inductor_moe.patterns.norm import RmsNorm, read_rms_norm
from inductor_moe.patterns.rewrite import Refusal, Rewrite
from inductor_moe.patterns.walk import (
    aten,
    call,
    dtype,
    flat_source,
    is_call,
    peel_casts,
    plain_binary,
    same,
    same_sizes,
    sizes,
    tensor,
)


@dataclasses.dataclass(frozen=True)
class GateSite:
    """The router of a few tokens.

    route     the moe_route node
    x         [.., H] what the router's linear reads: the norm's output, if there is a norm
    router    [E, H]
    gate      another matmul of x, with one row [1, H], or None
    norm      the norm before it, or None
    addends   the hidden state and the residual whose sum is normed, or None
    """

    route: fx.Node
    x: fx.Node
    router: fx.Node
    gate: fx.Node | None
    norm: RmsNorm | None
    addends: tuple[fx.Node, fx.Node] | None

    def describe(self) -> str:
        parts = [f"H={sizes(self.router)[1]}"]
        parts += ["residual"] if self.addends else []
        parts += ["norm"] if self.norm else []
        parts += ["shared expert's gate"] if self.gate is not None else []
        return ", ".join(parts)


def anchors(graph: fx.Graph) -> Iterator[fx.Node]:
    """The routers' choices for a few tokens, their number known."""
    for node in graph.nodes:
        if is_call(node, moe_route._opoverload):
            tokens = sizes(node.args[0])[0]
            if isinstance(tokens, int) and tokens <= MAX_TOKENS:
                yield node


def _linear(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """(x, weight [N, H]) of a matmul with a graph's own weight."""
    if not is_call(node, aten.mm.default):
        return None
    x, operand = node.args
    if not is_call(operand, aten.permute.default) or list(operand.args[1]) != [1, 0]:
        return None
    weight = operand.args[0]
    if not _is_given(weight) or not tensor(weight).is_contiguous():
        return None
    return (x, weight) if dtype(x) == dtype(weight) == dtype(node) else None


def _is_given(node: fx.Node) -> bool:
    return node.op in ("placeholder", "get_attr")


def walk(route: fx.Node) -> GateSite:
    """Read the router that ends in a choice."""
    matmul = peel_casts(route.args[0])
    peel_casts(route.args[0], dtype(matmul))
    linear = _linear(matmul)
    if linear is None:
        raise Refusal("the logits are no product with a weight of the model")
    bias = route.args[4] if len(route.args) > 4 else None
    if bias is not None and not _is_given(bias):
        raise Refusal("the bias is computed")
    x, router = flat_source(linear[0]), linear[1]
    hidden = sizes(router)[1]
    if hidden > MAX_HIDDEN or dtype(x) != dtype(router):
        raise Refusal(f"the router reads {hidden} channels of {dtype(x)}")
    tokens = sizes(route.args[0])[0]
    if tokens > 1 and tokens * hidden > MAX_READ:
        raise Refusal(f"{tokens} tokens of {hidden} channels are faster in launches of their own")
    norm = read_rms_norm(x) if same(sizes(x)[-1], hidden) else None
    if norm is not None and not _is_given(norm.weight):
        norm = None
    addends = None
    if norm is not None and plain_binary(norm.x, aten.add.Tensor):
        a, b = norm.x.args
        alike = isinstance(a, fx.Node) and isinstance(b, fx.Node)
        if alike and all(
            same_sizes(sizes(n), sizes(norm.x)) and dtype(n) == dtype(norm.x) for n in (a, b)
        ):
            addends = (a, b)
    return GateSite(route, x, router, _gate(x, matmul), norm, addends)


def _gate(x: fx.Node, matmul: fx.Node) -> fx.Node | None:
    """Another matmul of the same tokens with a single row."""
    for node in matmul.graph.nodes:
        linear = _linear(node)
        if (
            linear is not None
            and node is not matmul
            and sizes(linear[1])[0] == 1
            and flat_source(linear[0]) is x
        ):
            return node
    return None


def replace(graph: fx.Graph, site: GateSite) -> fx.Node:
    """Insert the op before everything that reads what it computes."""
    route, hidden = site.route, sizes(site.router)[1]
    tokens = int(sizes(route.args[0])[0])
    counters, index = _counter(graph, tokens)
    source = site.norm.x if site.norm else site.x
    if site.addends:
        first = source
    else:
        places = {node: place for place, node in enumerate(graph.nodes)}
        first = min(source.users, key=lambda user: places[user])
    x, residual = site.addends or (source, None)
    with graph.inserting_before(first):
        rows = [
            None
            if n is None
            else call(graph, aten.reshape.default, n, [tokens, hidden], like=route)
            for n in (x, residual)
        ]
        weight = site.norm.weight if site.norm else None
        if weight is not None and len(sizes(weight)) != 1:
            weight = call(graph, aten.reshape.default, weight, [hidden], like=route)
        output = call(
            graph, moe_router._opoverload, *rows, weight,
            site.norm.eps if site.norm else 0.0, site.norm.offset if site.norm else 0.0,
            site.router, _gate_weight(site), counters, index, *route.args[1:],
            like=route, **route.kwargs,
        )  # fmt: skip
        total, normed, weights, ids, logit = (_item(graph, output, i) for i in range(5))
        replaced = [(site.x, normed)] if site.norm else []
        replaced += [(source, total)] if site.addends else []
        replaced += [(site.gate, logit)] if site.gate is not None else []
        for old, new in replaced:
            shaped = call(graph, aten.reshape.default, new, list(sizes(old)), like=old)
            old.replace_all_uses_with(shaped)
    for user in list(route.users):
        user.replace_all_uses_with((weights, ids)[user.args[1]])
    return output


def _gate_weight(site: GateSite) -> fx.Node | None:
    return None if site.gate is None else site.gate.args[1].args[0]


def _item(graph: fx.Graph, output: fx.Node, index: int) -> fx.Node:
    item = graph.call_function(operator.getitem, (output, index))
    item.meta["val"] = output.meta["val"][index]
    return item


def _counter(graph: fx.Graph, tokens: int) -> tuple[fx.Node, int]:
    """(the zeros that count programs, once in a graph; the first element of the next op's)."""
    others = [node for node in graph.nodes if is_call(node, moe_router._opoverload)]
    index = max((n.args[8] + int(sizes(n.args[0])[0]) for n in others), default=0)
    if index + tokens > COUNTERS:
        raise Refusal(f"the graph has routers for {index} tokens already")
    if others:
        return others[0].args[7], index
    anchor = next(node for node in graph.nodes if node.op != "placeholder")
    device = tensor(next(n for n in graph.nodes if is_call(n, moe_route._opoverload)).args[0])
    with graph.inserting_before(anchor):
        zeros: Any = call(
            graph, aten.full.default, [COUNTERS], 0, dtype=torch.int32, device=device.device,
            pin_memory=False, like=anchor,
        )  # fmt: skip
    return zeros, index


GATE = Rewrite(
    "moe.router",
    op="moe_route",
    anchors=anchors,
    walk=walk,
    replace=replace,
    describe=GateSite.describe,
    optional=True,
)
