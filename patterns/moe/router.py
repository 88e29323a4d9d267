"""Routers of a known form become one op. A router that is not known stays with Inductor.

The anchor is a top-k whose choices reach a fused expert block. What computes its scores from the
logits, and what follows on the chosen scores, is recognised by evaluation, so that softmax before
top-k with a division by the sum and softmax after top-k are one form.
"""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from inductor_moe.compat import real_tensors
from inductor_moe.ops.moe import moe_experts, moe_up
from inductor_moe.ops.moe_route import MAX_EXPERTS, MAX_TOP_K, moe_route
from inductor_moe.ops.quant import moe_experts_quantized, moe_up_quantized
from inductor_moe.patterns.evaluate import computes, leaves, literals, probe
from inductor_moe.patterns.moe.groups import Groups, read_groups, top_k_arguments
from inductor_moe.patterns.rewrite import Refusal, Rewrite
from inductor_moe.patterns.walk import (
    SHAPES,
    aten,
    call,
    dtype,
    is_call,
    is_getitem,
    last_dim,
    number,
    operands,
    peel_casts,
    plain_binary,
    same_sizes,
    sizes,
    without_ones,
)

CONSUMERS = tuple(
    op._opoverload for op in (moe_experts, moe_up, moe_experts_quantized, moe_up_quantized)
)


@dataclasses.dataclass(frozen=True)
class Weighing:
    """The weights: scale * chosen scores [/ (max(their sum, floor) + epsilon)]."""

    normalise: bool = False
    epsilon: float = 0.0
    floor: float = 0.0
    scale: float = 1.0
    softmax: bool = False

    def formula(self, chosen: torch.Tensor) -> torch.Tensor:
        if self.softmax:
            return torch.softmax(chosen, -1) * self.scale
        if not self.normalise:
            return chosen * self.scale
        total = chosen.sum(-1, keepdim=True)
        total = total.clamp(min=self.floor) if self.floor else total
        return chosen / (total + self.epsilon) * self.scale


@dataclasses.dataclass(frozen=True)
class RouterSite:
    """logits [T, E]; `weights` is the node that holds the routing weights [T, K]."""

    logits: fx.Node
    top_k: int
    scoring: str
    weighing: Weighing
    bias: fx.Node | None
    groups: Groups
    weights: fx.Node
    ids: fx.Node

    def describe(self) -> str:
        text = f"E={sizes(self.logits)[1]} K={self.top_k} {self.scoring}"
        text += ", bias" if self.bias is not None else ""
        if self.groups.count > 1:
            text += f", {self.groups.kept} of {self.groups.count} groups"
        text += ", normalised" if self.weighing.normalise else ""
        return text + (f", x {self.weighing.scale:g}" if self.weighing.scale != 1 else "")


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
    masked, top_k, dim, largest, _ = top_k_arguments(topk)
    if len(sizes(masked)) != 2 or not last_dim(masked, dim) or not largest:
        raise Refusal("the top-k is not over the experts of each token")
    experts = sizes(masked)[1]
    if not isinstance(experts, int) or experts > MAX_EXPERTS or top_k > MAX_TOP_K:
        raise Refusal(f"there are {experts} experts and {top_k} per token")
    if dtype(masked) == torch.float64:
        raise Refusal("the router computes in float64")
    ids = next((u for u in topk.users if is_getitem(u, 1, aten.topk.default)), None)
    if ids is None:
        raise Refusal("the chosen experts are not used")
    choice, groups = read_groups(masked)
    if groups.kept * (experts // groups.count) < top_k:
        raise Refusal(f"{groups.kept} groups hold fewer than {top_k} experts")
    chosen, scores = _read_chosen(topk, ids, choice)
    bias = _read_bias(choice, scores)
    logits, scoring = _read_scores(scores)
    gathered = is_call(chosen, aten.gather.default)
    if groups.by_zero and (gathered or scoring == "logits"):
        raise Refusal("a group masked with 0 may hold the best scores")
    weights, weighing = _read_weights(chosen, top_k, scoring)
    if weighing.softmax:
        if scoring != "logits":
            raise Refusal("the chosen scores go through a second softmax")
        if bias is not None or groups.count > 1:
            raise Refusal("the chosen scores are no known function of the choice")
        scoring = "softmax"
    return RouterSite(logits, top_k, scoring, weighing, bias, groups, weights, ids)


def _read_chosen(topk: fx.Node, ids: fx.Node, choice: fx.Node) -> tuple[fx.Node, fx.Node]:
    """(the chosen scores [T, K], the scores [T, E] that they are taken from)."""
    for user in topk.users:
        if is_getitem(user, 0, aten.topk.default) and user.users:
            return user, choice
    gathers = [
        user
        for user in ids.users
        if is_call(user, aten.gather.default)
        and user.args[1] in (1, -1)
        and user.args[2] is ids
        and same_sizes(sizes(user.args[0]), sizes(choice))
    ]
    if len(gathers) != 1:
        raise Refusal("the chosen scores are not used, or in several ways")
    return gathers[0], gathers[0].args[0]


def _read_bias(choice: fx.Node, scores: fx.Node) -> fx.Node | None:
    """The bias [E] by which the choice differs from the scores."""
    target = peel_casts(scores, torch.float32)
    added = peel_casts(choice, torch.float32)
    if added is target:
        return None
    if plain_binary(added, aten.add.Tensor) and dtype(added) == torch.float32:
        for part, bias in operands(added):
            if (
                peel_casts(part, torch.float32) is target
                and isinstance(bias, fx.Node)
                and dtype(bias) in (torch.float32, torch.bfloat16, torch.float16)
                and same_sizes(without_ones(sizes(bias)), sizes(scores)[1:])
            ):
                return bias
    raise Refusal("the experts are chosen by no known function of the scores")


SCORES = {"softmax": lambda x: torch.softmax(x, -1), "sigmoid": torch.sigmoid}


def _read_scores(scores: fx.Node) -> tuple[fx.Node, str]:
    """(logits, scoring); scores of no known formula, or rounded ones, are logits themselves."""
    values = probe(7, sizes(scores)[1], seed=11, scale=3.0)
    for logits in _behind(scores):
        if not _is_fp32(scores, logits):
            continue
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


def _is_fp32(scores: fx.Node, logits: fx.Node) -> bool:
    """Whether no value between the two is rounded to less, which could change a close choice."""
    stack, seen = [scores], {logits}
    while stack:
        node = stack.pop()
        if node in seen or number(node) is not None:
            continue
        seen.add(node)
        if dtype(node) != torch.float32:
            return False
        stack.extend(node.all_input_nodes)
    return dtype(logits) != torch.float64


def _has_shape(node: fx.Node, shape: Any) -> bool:
    return isinstance(node.meta.get("val"), torch.Tensor) and same_sizes(sizes(node), shape)


def _read_weights(chosen: fx.Node, top_k: int, scoring: str) -> tuple[fx.Node, Weighing]:
    """(the node that holds the weights, what it computes from the chosen scores)."""
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
    # Small sums tell an epsilon from none, and from a least sum.
    values = probe(9, top_k, seed=12, positive=scoring != "logits")
    with real_tensors():
        powers = torch.tensor([0, 0, 1, 3, 6, 9, 12, 20, 25], dtype=torch.float64)
        values = values * 10.0 ** -powers[:, None]
    for weighing in _weighings(literals(node, (chosen,))):
        if computes(node, [chosen], [values], weighing.formula):
            return node, weighing
    raise Refusal("the weights are no known function of the chosen scores")


def _weighings(numbers: set[float]) -> Iterator[Weighing]:
    """What the weights may be, given the numbers in their computation."""
    small = [x for x in sorted(numbers) if 0 < x < 0.1]
    for scale in (1.0, *sorted(x for x in numbers if x != 1 and math.isfinite(x))):
        yield Weighing(scale=scale)
        yield Weighing(True, scale=scale)
        yield Weighing(True, scale=scale, softmax=True)
        for constant in small:
            yield Weighing(True, epsilon=constant, scale=scale)
            yield Weighing(True, floor=constant, scale=scale)


def replace(graph: fx.Graph, site: RouterSite) -> fx.Node:
    """Insert the op where the experts were chosen."""
    experts, weighing, groups = sizes(site.logits)[1], site.weighing, site.groups
    with graph.inserting_before(site.ids.args[0]):
        bias = site.bias
        if bias is not None and len(sizes(bias)) != 1:
            bias = call(graph, aten.reshape.default, bias, [experts], like=bias)
        both = call(
            graph, moe_route._opoverload, site.logits, site.top_k, site.scoring,
            weighing.normalise, bias, weighing.epsilon, weighing.floor, weighing.scale,
            groups.count, groups.kept, groups.top,
            weights_dtype=dtype(site.weights), like=site.ids,
        )  # fmt: skip
        weights = graph.call_function(operator.getitem, (both, 0))
        ids = graph.call_function(operator.getitem, (both, 1))
        weights.meta["val"], ids.meta["val"] = both.meta["val"]
    site.weights.replace_all_uses_with(weights)
    site.ids.replace_all_uses_with(ids)
    _drop_clamps(ids, experts)
    return both


def _drop_clamps(ids: fx.Node, experts: int) -> None:
    """Pass by clamps to the range of expert numbers, which the op's own never leave."""
    stack = [ids]
    while stack:
        node = stack.pop()
        for user in list(node.users):
            if _keeps_range(user, experts):
                user.replace_all_uses_with(node)
                stack.append(node)
            elif is_call(user, *SHAPES):
                stack.append(user)


def _keeps_range(node: fx.Node, experts: int) -> bool:
    if not is_call(node, aten.clamp.default, aten.clamp_min.default, aten.clamp_max.default):
        return False
    bounds = list(node.args[1:])
    least, most = {
        aten.clamp.default: [*bounds, None, None][:2],
        aten.clamp_min.default: [*bounds, None],
        aten.clamp_max.default: [None, *bounds],
    }[node.target]
    numbers = all(bound is None or number(bound) is not None for bound in (least, most))
    return (
        bool(node.users)
        and not node.kwargs
        and numbers
        and (least is None or least <= 0)
        and (most is None or most >= experts - 1)
    )


ROUTER = Rewrite(
    "moe.route",
    op="moe_route",
    anchors=anchors,
    walk=walk,
    replace=replace,
    describe=RouterSite.describe,
    optional=True,
)
