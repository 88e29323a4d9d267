"""The choices of a few tokens numbered for the experts of this rank, by the router itself.

Models that share their experts out take the number of the rank's first expert off each choice and
mark those of other ranks: a launch, for a few numbers that the router's has in registers.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from inductor_moe import compat
from inductor_moe.ops.moe_router import moe_router
from inductor_moe.ops.shared import moe_experts_shared
from inductor_moe.patterns.evaluate import probe
from inductor_moe.patterns.moe.router import CONSUMERS
from inductor_moe.patterns.rewrite import Refusal, Rewrite
from inductor_moe.patterns.walk import (
    COPIES,
    SHAPES,
    aten,
    dtype,
    is_call,
    is_float_cast,
    is_getitem,
    sizes,
    unrounded,
)

TARGETS = (*CONSUMERS, moe_experts_shared._opoverload)
ROUTER = moe_router._opoverload
ELEMENTWISE = {
    aten.add.Tensor, aten.add.Scalar, aten.sub.Tensor, aten.sub.Scalar,
    aten.lt.Scalar, aten.le.Scalar, aten.gt.Scalar, aten.ge.Scalar, aten.eq.Scalar, aten.ne.Scalar,
    aten.lt.Tensor, aten.le.Tensor, aten.gt.Tensor, aten.ge.Tensor, aten.eq.Tensor, aten.ne.Tensor,
    aten.bitwise_and.Tensor, aten.bitwise_or.Tensor, aten.bitwise_not.default,
    aten.logical_and.default, aten.logical_or.default, aten.logical_not.default,
    aten.where.self, aten.masked_fill.Scalar, aten.masked_fill.Tensor, aten.full.default,
    aten.clamp.default, aten.clamp_min.default, aten.clamp_max.default, aten.mul.Tensor,
    aten.remainder.Scalar,
}  # fmt: skip
NODES = 64  # of a renumbering are a few


@dataclasses.dataclass(frozen=True)
class LocalSite:
    """Experts [first, first + own) of a router's are this rank's.

    ids, weights  where they are among the arguments of `experts`
    """

    router: fx.Node
    experts: fx.Node
    ids: int
    weights: int
    first: int
    own: int

    def describe(self) -> str:
        total = sizes(self.router.args[5])[0]
        return f"experts {self.first} to {self.first + self.own - 1} of {total}"


def anchors(graph: fx.Graph) -> Iterator[fx.Node]:
    """Fused routers whose choices reach fused experts in another form."""
    for node in graph.nodes:
        if is_call(node, ROUTER) and _readers(node):
            yield node


def _readers(router: fx.Node) -> list[fx.Node]:
    """The fused experts whose ids were computed from the router's."""
    return [
        node
        for node in router.graph.nodes
        if is_call(node, *TARGETS)
        and not is_getitem(ids := node.args[_place(node, "ids")], 3, ROUTER)
        and _router_behind(ids) is router
    ]


def _place(node: fx.Node, name: str) -> int:
    return [a.name for a in compat.schema_of(node.target).arguments].index(name)


def _region(end: fx.Node) -> list[fx.Node]:
    """The elementwise nodes behind `end` and what they read, `end` first; none if too many."""
    found, stack = dict[fx.Node, None](), [end]
    while stack and len(found) < NODES:
        node = stack.pop()
        if node not in found:
            found[node] = None
            stack += node.all_input_nodes if _is_inner(node) else []
    return [] if stack else list(found)


def _is_inner(node: fx.Node) -> bool:
    return is_call(node, *ELEMENTWISE, *SHAPES, *COPIES) or is_float_cast(node)


def _router_behind(ids: fx.Node) -> fx.Node | None:
    """The router whose choices alone determine `ids`."""
    read = [node for node in _region(ids) if not _is_inner(node)]
    if len(read) == 1 and is_getitem(read[0], 3, ROUTER):
        return read[0].args[0]  # type: ignore[return-value]
    return None


def walk(router: fx.Node) -> LocalSite:
    """Read which of the router's experts are kept, by what becomes of each number."""
    experts, *others = _readers(router)
    if others:
        raise Refusal(f"{experts.name} and {others[0].name} read one router's choices")
    places = [_place(experts, name) for name in ("ids", "weights")]
    ids, weights = (experts.args[place] for place in places)
    if router.kwargs.get("own"):
        raise Refusal("the router's choices are numbered already")
    regions = {*_region(ids), *_region(weights)}
    chosen = [node for node in router.users if node.args[1] in (2, 3)]
    if not regions >= set(chosen):
        raise Refusal("not every choice reaches the experts")
    for node in regions:
        if not _is_inner(node) and node not in chosen:
            raise Refusal(f"{node.name} changes the choices")
        outside = [u for u in node.users if u not in regions and u is not experts]
        if outside and (node in chosen or any(c in _region(node) for c in chosen)):
            raise Refusal(f"{node.name} is used by {outside[0].name} too")
        if is_float_cast(node):
            unrounded(node, dtype(router.args[0]))
    if not {node for node in experts.all_input_nodes if node in regions} <= {ids, weights}:
        raise Refusal("the experts read the choices in another way")
    total, held = sizes(router.args[5])[0], _held(experts)
    first, own = _read(ids, weights, chosen, total, held)
    return LocalSite(router, experts, places[0], places[1], first, own)


def _held(experts: fx.Node) -> int:
    """How many experts the op's weights are of; ids from there on are skipped."""
    names = [a.name for a in compat.schema_of(experts.target).arguments]
    for name in ("w_up", "up_packed", "routed"):
        if name in names:
            weight = experts.args[names.index(name)]
            return int(sizes(weight[0] if isinstance(weight, (list, tuple)) else weight)[0])
    raise Refusal(f"{experts.name} has no weights of experts")


def _read(
    ids: fx.Node, weights: fx.Node, chosen: list[fx.Node], total: int, held: int
) -> tuple[int, int]:
    """(the first expert that is kept, how many are)."""
    shape = [int(size) for size in sizes(ids)]
    width = math.prod(shape)
    with compat.real_tensors():
        numbers = torch.arange(-(-total // width) * width) % total
        local, share = [], []
        expected = probe(len(numbers), seed=31, positive=True)
        for part, value in zip(numbers.split(width), expected.split(width), strict=True):
            given = {n: (part if n.args[1] == 3 else value).view(shape) for n in chosen}
            local.append(_evaluate(ids, given).reshape(-1))
            share.append(_evaluate(weights, given).reshape(-1))
        found = torch.cat(local)
        kept = (found >= 0) & (found < held)
        mine = numbers[kept]
        if bool((found < 0).any()) or not len(mine):
            raise Refusal("the choices are numbered in no known way")
        first, own = int(mine.min()), len(mine.unique())
        inside = (numbers >= first) & (numbers < first + own)
        if not torch.equal(inside, kept) or not torch.equal(found[kept], mine - first):
            raise Refusal("the choices are numbered in no known way")
        if not torch.equal(torch.cat(share)[kept], expected[kept]):
            raise Refusal("the weights of this rank's experts are not the router's")
    return first, own


def _evaluate(end: fx.Node, given: dict[fx.Node, torch.Tensor]) -> torch.Tensor:
    memo: dict[fx.Node, Any] = dict(given)

    def value(argument: Any) -> Any:
        return compute(argument) if isinstance(argument, fx.Node) else argument

    def compute(node: fx.Node) -> Any:
        if node not in memo:
            if is_float_cast(node) or is_call(node, *COPIES):
                memo[node] = value(node.args[0])
            else:
                args, kwargs = fx.map_arg((node.args, node.kwargs), value)
                memo[node] = node.target(*args, **_on_cpu(kwargs))  # type: ignore[operator]
        return memo[node]

    result = compute(end)
    assert isinstance(result, torch.Tensor)
    return result


def _on_cpu(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {k: torch.device("cpu") if k == "device" else v for k, v in kwargs.items()}


def replace(graph: fx.Graph, site: LocalSite) -> fx.Node:
    """Have the router number its choices, and the experts read them as they come."""
    router, experts = site.router, site.experts
    router.kwargs = {**router.kwargs, "first": site.first, "own": site.own}
    args = list(experts.args)
    args[site.weights], args[site.ids] = (_item(router, index) for index in (2, 3))
    experts.args = tuple(args)
    return router


def _item(router: fx.Node, index: int) -> fx.Node:
    return next(user for user in router.users if user.args[1] == index)


LOCAL = Rewrite(
    "moe.local_choices",
    op="moe_route",
    anchors=anchors,
    walk=walk,
    replace=replace,
    describe=LocalSite.describe,
    optional=True,
)
