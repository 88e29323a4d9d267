"""From the down projection back to the up projections, and forward to the combined output."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from inductor_moe.patterns.moe.activation import is_row_wise
from inductor_moe.patterns.rewrite import Refusal
from inductor_moe.patterns.walk import (
    CASTS,
    SHAPES,
    aten,
    dtype,
    flat_source,
    gather,
    is_call,
    is_float_cast,
    is_number,
    is_transparent,
    only_adds_ones,
    operands,
    peel,
    plain_binary,
    same,
    same_sizes,
    sizes,
    unrounded,
    without_ones,
)


def sole_user(node: fx.Node) -> fx.Node:
    """The one user of an interior node; refuses a node with several."""
    if len(node.users) != 1:
        users = ", ".join(user.name for user in node.users) or "nothing"
        raise Refusal(f"{node.name}, inside the expert block, is used by {users}")
    return next(iter(node.users))


def is_sentinel_mask(node: Any, sorted_ids: Any, experts: int) -> bool:
    """Whether node is [S, 1], true where the sorted expert number is no expert of ours."""
    mask = peel(node)
    return (
        is_call(mask, aten.ge.Scalar)
        and mask.args[0] is sorted_ids
        and is_number(mask.args[1], experts)
    )


def masked(node: Any, sorted_ids: Any, experts: int) -> fx.Node | None:
    """The rows under `where(sentinel, 0, rows)`, or None if node is something else."""
    if not is_call(node, aten.where.self):
        return None
    condition, fill, rows = node.args
    if not is_sentinel_mask(condition, sorted_ids, experts):
        return None
    if not is_number(fill, 0):
        raise Refusal(f"{node.name} fills the rows of sentinels with something else than 0")
    return rows


def clamped(index: Any, ids: Any, experts: int) -> bool:
    """Whether index is `ids`, perhaps clamped to the last expert."""
    if not same_sizes(without_ones(sizes(index)), without_ones(sizes(ids))):
        return False
    node, ids = flat_source(index), flat_source(ids)
    if node is ids:
        return True
    bound = {aten.clamp_max.default: 1, aten.clamp.default: 2}.get(getattr(node, "target", None))
    if bound is not None and len(node.args) > bound and is_number(node.args[bound], experts - 1):
        node = flat_source(node.args[0])
    return node is ids


def finish_projection(
    gemm: fx.Node, experts: int, row_ids: Any, sorted_ids: Any
) -> tuple[fx.Node, fx.Node | None]:
    """Go from a GEMM over its bias and sentinel mask to the node that holds its rows.

    row_ids     the expert number of each row
    sorted_ids  the same before any clamp, or None where rows are in pair order
    returns     (the node that holds the rows, the bias [E, out] or None)
    """
    node, bias = gemm, None
    out = None if is_call(gemm, aten.bmm.default) else sizes(gemm)[-1]
    while len(node.users) == 1:
        user = next(iter(node.users))
        if is_transparent(user) or (is_call(user, aten.select.int) and only_adds_ones(user)):
            node = user
        elif bias is None and plain_binary(user, aten.add.Tensor):
            found = _bias(user, node, experts, row_ids)
            if found is None:
                break
            node, bias = user, found
        elif sorted_ids is not None and masked(user, sorted_ids, experts) is node:
            node = user
        else:
            break
    if bias is not None and out is not None and not same_sizes(sizes(bias), (experts, out)):
        raise Refusal(f"the bias {bias.name} has shape {sizes(bias)}, not [experts, out]")
    return node, bias


def _bias(add: fx.Node, rows: fx.Node, experts: int, row_ids: Any) -> fx.Node | None:
    for left, right in operands(add):
        if left is not rows:
            continue
        found = gather(peel(right))
        if found is not None and len(sizes(found[0])) == 2 and same(sizes(found[0])[0], experts):
            if clamped(found[1], row_ids, experts):
                return found[0]
            raise Refusal(f"the bias {found[0].name} is gathered by other ids than the weight")
    return None


def region_between(ups: list[fx.Node], down: fx.Node) -> list[fx.Node]:
    """The nodes from the up projections' rows to the down projection, in graph order.

    Refuses a region with a node that mixes rows, or that is used outside the block.
    """
    region: set[fx.Node] = set()
    frontier = [user for up in ups for user in up.users]
    while frontier:
        node = frontier.pop()
        if node is down or node in region:
            continue
        if is_float_cast(node):
            unrounded(node, dtype(down))
        if not is_row_wise(node):
            source = next((a for a in node.all_input_nodes if a in region or a in ups), None)
            raise Refusal(
                f"{source and source.name}, between the expert GEMMs, is used by {node.name} "
                f"({node.target}), which is not row-wise"
            )
        region.add(node)
        frontier.extend(node.users)
    inside = region | set(ups)
    for node in region:
        for argument in node.all_input_nodes:
            if argument not in inside and _has_rows(argument, node):
                raise Refusal(
                    f"{node.name}, between the expert GEMMs, reads {argument.name}, which has a "
                    "value for each row"
                )
    position = {node: index for index, node in enumerate(down.graph.nodes)}
    return sorted(region, key=position.__getitem__)


def _has_rows(argument: fx.Node, node: fx.Node) -> bool:
    value = argument.meta.get("val")
    if not hasattr(value, "shape"):
        return False
    shape = tuple(value.shape)
    own = len(sizes(node)) if hasattr(node.meta.get("val"), "shape") else 0
    return len(shape) >= own and own > 0 and not all(same(size, 1) for size in shape[: own - 1])


class Combine:
    """Forward from the down projection's rows to the sum over the experts of each token."""

    def __init__(
        self,
        rows: fx.Node,
        column: Callable[[Any, str], fx.Node | None],
        unsort: Callable[[fx.Node, fx.Node], bool],
        order: str,
        least: torch.dtype,
        width: Any,
    ) -> None:
        """Walk; refuses what is not weight, reorder and sum.

        column  maps a factor and an order ("sorted" or "pairs") to routing weights in pair order
        unsort  whether a gather brings sorted rows back to pair order
        least   the dtype of the GEMM: a cast that rounds more is refused
        width   H
        """
        self.weights: fx.Node | None = None
        self.order, self.least = order, least
        node, shape = rows, sizes(rows)
        if order == "pairs" and len(shape) == 3 and same(shape[-1], width):
            # With one token, or one expert a token, the dim of the slots may be there already.
            self.tokens, self.top_k, self.order = shape[0], shape[1], "tokens"
        while True:
            user = sole_user(node)
            if is_call(user, aten.sum.dim_IntList) and self.order == "tokens":
                self.output = self._sum(user)
                return
            node = self._step(node, user, column, unsort)

    def _step(
        self,
        node: fx.Node,
        user: fx.Node,
        column: Callable[[Any, str], fx.Node | None],
        unsort: Callable[[fx.Node, fx.Node], bool],
    ) -> fx.Node:
        if is_call(user, aten.mul.Tensor):
            factor = next(right for left, right in operands(user) if left is node)
            weights = column(factor, self.order)
            if weights is None:
                raise Refusal(f"{user.name} multiplies the rows by {factor}, no routing weight")
            if self.weights is not None:
                raise Refusal(f"{user.name} applies a second routing weight")
            self.weights = weights
            return user
        if self.order == "sorted" and gather(user) is not None:
            if not unsort(node, user):
                raise Refusal(f"{user.name} does not bring the sorted rows back to their tokens")
            self.order = "pairs"
            return user
        if is_float_cast(user):
            return unrounded(user, self.least)
        if is_call(user, *SHAPES):
            shape, flat = sizes(user), sizes(node)
            if self.order == "pairs" and len(shape) == 3 and same(shape[-1], flat[-1]):
                self.tokens, self.top_k = shape[0], shape[1]
                self.order = "tokens"
                return user
        if is_transparent(user):
            return user
        raise Refusal(f"{user.name} ({user.target}) is no part of combining the experts' rows")

    def _sum(self, node: fx.Node) -> fx.Node:
        keepdim = node.args[2] if len(node.args) > 2 else False
        if list(node.args[1]) not in ([1], [-2]) or keepdim:
            raise Refusal(f"{node.name} does not sum over the experts of a token")
        if not isinstance(self.top_k, int):
            raise Refusal("the number of experts per token is symbolic")
        if len(node.users) == 1:
            user = next(iter(node.users))
            if is_call(user, *CASTS) and is_float_cast(user):
                return user
        return node
