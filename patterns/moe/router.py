"""Routers of a known form become one op. A router that is not known stays with Inductor.

The anchor is a top-k whose choices reach a fused expert block. What computes its scores from the
logits, and what follows on the chosen scores, is recognised by evaluation, so that softmax before
top-k with a division by the sum and softmax after top-k are one form.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from inductor_moe.ops.moe import moe_experts, moe_up
from inductor_moe.ops.moe_route import MAX_EXPERTS, MAX_TOP_K, moe_route
from inductor_moe.patterns.evaluate import computes, leaves, probe
from inductor_moe.patterns.rewrite import Refusal, Rewrite
from inductor_moe.patterns.walk import (
    aten,
    call,
    dtype,
    is_call,
    is_getitem,
    last_dim,
    prims,
    same_sizes,
    sizes,
)

CONSUMERS = (moe_experts._opoverload, moe_up._opoverload)


@dataclasses.dataclass(frozen=True)
class RouterSite:
    """logits [T, E]; `weights` is the node that holds the routing weights [T, K]."""

    logits: fx.Node
    top_k: int
    scoring: str
    normalise: bool
    weights: fx.Node
    ids: fx.Node

    def describe(self) -> str:
        text = f"E={sizes(self.logits)[1]} K={self.top_k} {self.scoring}"
        return text + (", normalised" if self.normalise else "")


def anchors(graph: fx.Graph) -> Iterator[fx.Node]:
    """Top-k nodes whose choices are expert numbers of a fused block."""
    for node in graph.nodes:
        if is_call(node, aten.topk.default) and any(
            is_getitem(user, 1, aten.topk.default) and _reaches_experts(user)
            for user in node.users
        ):
            yield node


def _reaches_experts(ids: fx.Node) -> bool:
    stack, seen = [ids], set[fx.Node]()
    while stack and len(seen) < 32:
        node = stack.pop()
        if is_call(node, *CONSUMERS):
            return True
        if node not in seen:
            seen.add(node)
            stack.extend(node.users)
    return False


def walk(topk: fx.Node) -> RouterSite:
    """Read the router around a top-k."""
    scores, top_k, dim, largest, _ = (*topk.args, *(-1, True, True)[len(topk.args) - 2 :])
    if len(sizes(scores)) != 2 or not last_dim(scores, dim) or not largest:
        raise Refusal("the top-k is not over the experts of each token")
    experts = sizes(scores)[1]
    if not isinstance(experts, int) or experts > MAX_EXPERTS or top_k > MAX_TOP_K:
        raise Refusal(f"there are {experts} experts and {top_k} per token")
    chosen = next((u for u in topk.users if is_getitem(u, 0, aten.topk.default)), None)
    ids = next((u for u in topk.users if is_getitem(u, 1, aten.topk.default)), None)
    if chosen is None or ids is None:
        raise Refusal("the chosen scores are not used")
    logits, scoring = _read_scores(scores)
    weights, after = _read_weights(chosen, top_k)
    if after == "softmax":
        if scoring != "logits":
            raise Refusal("the chosen scores go through a second softmax")
        scoring = "softmax"
    return RouterSite(logits, top_k, scoring, after != "as they are", weights, ids)


SCORES = {"softmax": lambda x: torch.softmax(x, -1), "sigmoid": torch.sigmoid}


def _read_scores(scores: fx.Node) -> tuple[fx.Node, str]:
    """(logits, scoring); scores of no known formula are logits themselves."""
    values = probe(7, sizes(scores)[1], seed=11, scale=3.0)
    for logits in _behind(scores):
        for name, formula in SCORES.items():
            if computes(scores, [logits], [values], formula):
                return logits, name
    return scores, "logits"


def _behind(scores: fx.Node) -> list[fx.Node]:
    """The nodes of the scores' shape that alone determine them, the farthest first."""
    found, frontier = [], [scores]
    while frontier:
        node = frontier.pop(0)
        for source in node.all_input_nodes:
            if source not in found and _has_shape(source, sizes(scores)):
                found.append(source)
                if source not in leaves(scores):
                    frontier.append(source)
    return [node for node in reversed(found) if leaves(scores, stop=(node,)) == [node]]


def _has_shape(node: fx.Node, shape: Any) -> bool:
    return isinstance(node.meta.get("val"), torch.Tensor) and same_sizes(sizes(node), shape)


def _read_weights(chosen: fx.Node, top_k: int) -> tuple[fx.Node, str]:
    """(the node that holds the weights, what it computes from the chosen scores)."""
    values = probe(7, top_k, seed=12, positive=True)
    node: Any = chosen
    formulas = {
        "normalised": lambda x: x / x.sum(-1, keepdim=True),
        "softmax": lambda x: torch.softmax(x, -1),
    }
    reachable, frontier = {chosen}, [chosen]
    while frontier:
        for user in frontier.pop().users:
            if user not in reachable and leaves(user, stop=(chosen,)) == [chosen]:
                reachable.add(user)
                frontier.append(user)
    outside = [n for n in reachable if any(user not in reachable for user in n.users)]
    if len(outside) != 1:
        raise Refusal("the chosen scores are used in several ways")
    node = outside[0]
    if not same_sizes(sizes(node), sizes(chosen)):
        raise Refusal("the weights have another shape than the choices")
    if computes(node, [chosen], [values], lambda x: x):
        return node, "as they are"
    for name, formula in formulas.items():
        if computes(node, [chosen], [values], formula):
            return node, name
    raise Refusal("the weights are no known function of the chosen scores")


def replace(graph: fx.Graph, site: RouterSite) -> fx.Node:
    """Insert the op right behind the logits."""
    with graph.inserting_before(site.logits.next):
        both = call(
            graph, moe_route._opoverload, site.logits, site.top_k, site.scoring, site.normalise,
            like=site.ids,
        )  # fmt: skip
        weights = graph.call_function(operator.getitem, (both, 0))
        ids = graph.call_function(operator.getitem, (both, 1))
        weights.meta["val"], ids.meta["val"] = both.meta["val"]
        if dtype(site.weights) != torch.float32:
            weights = call(
                graph, prims.convert_element_type.default, weights, dtype(site.weights),
                like=site.weights,
            )  # fmt: skip
    site.weights.replace_all_uses_with(weights)
    site.ids.replace_all_uses_with(ids)
    return both


ROUTER = Rewrite(
    "moe.route",
    op="moe_route",
    anchors=anchors,
    walk=walk,
    replace=replace,
    describe=RouterSite.describe,
    optional=True,
)
