"""Group-limited routing: experts outside the best groups of a token are masked before top-k."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import fx

from inductor_moe.patterns.moe.rows import is_count
from inductor_moe.patterns.rewrite import Refusal
from inductor_moe.patterns.walk import (
    aten,
    dtype,
    flat_source,
    is_call,
    is_float_cast,
    is_getitem,
    is_number,
    last_dim,
    number,
    operands,
    peel,
    peel_casts,
    prims,
    same_sizes,
    sizes,
    unrounded,
)


@dataclasses.dataclass(frozen=True)
class Groups:
    """`kept` of `count` groups stay, by the sum of the `top` best choices of each.

    by_zero  the others' choices become 0, not -inf
    """

    count: int = 1
    kept: int = 1
    top: int = 1
    by_zero: bool = False


def read_groups(choice: fx.Node) -> tuple[fx.Node, Groups]:
    """(the choice [T, E] before groups are masked, the groups); refuses any other mask."""
    where = peel_casts(choice, torch.float32)
    if not is_call(where, aten.where.self):
        return choice, Groups()
    mask, chosen, other = where.args
    mask, negated = _mask(mask)
    if negated:
        chosen, other = other, chosen
    fill = number(other)
    if fill not in (0, -math.inf) or not isinstance(chosen, fx.Node):
        raise Refusal(f"{where.name} does not mask the choices with 0 or -inf")
    tokens, experts = sizes(choice)
    count, kept, quality = _kept_groups(mask, tokens, experts)
    grouped, top = _quality(quality)
    if not same_sizes(sizes(grouped), (tokens, count, experts // count)):
        raise Refusal(f"{quality.name} is not computed from the experts of each group")
    if _source(grouped) is not _source(chosen) or not same_sizes(sizes(chosen), sizes(choice)):
        raise Refusal(f"{quality.name} judges the groups by other scores than their experts")
    if dtype(quality) != torch.float32:
        raise Refusal(f"{quality.name} rounds the groups' scores to {dtype(quality)}")
    return chosen, Groups() if kept == count else Groups(count, kept, top, fill == 0)


def _mask(node: Any) -> tuple[Any, bool]:
    """(what decides, whether negated) of a mask [T, E]."""
    negated = False
    while True:
        node = flat_source(node)
        if is_call(node, aten.bitwise_not.default, aten.logical_not.default):
            if dtype(node.args[0]) != torch.bool:
                raise Refusal(f"{node.name} is the complement of a number")
            node, negated = node.args[0], not negated
        elif is_call(node, prims.convert_element_type.default) and dtype(node) == torch.bool:
            node = node.args[0]
        else:
            return node, negated


def _kept_groups(mask: Any, tokens: Any, experts: int) -> tuple[int, int, fx.Node]:
    """(groups, groups kept, their scores) of ones scattered to the best groups of a top-k."""
    if not is_call(mask, aten.expand.default) or len(sizes(mask)) != 3:
        raise Refusal(f"{mask} does not repeat a choice of groups for their experts")
    count = sizes(mask)[1]
    if not isinstance(count, int) or not same_sizes(
        sizes(mask), (tokens, count, experts // count)
    ):
        raise Refusal(f"{mask.name} has shape {sizes(mask)}, not [tokens, groups, experts]")
    if not same_sizes(sizes(mask.args[0]), (tokens, count, 1)):
        raise Refusal(f"{mask.name} does not repeat a choice of groups for their experts")
    ids = _marked(mask.args[0], tokens, count)
    if not is_getitem(ids, 1, aten.topk.default):
        raise Refusal(f"{ids} are not the best groups of a top-k")
    quality, kept, axis, largest, _ = top_k_arguments(ids.args[0])
    if (
        not largest
        or not last_dim(quality, axis)
        or not same_sizes(sizes(quality), (tokens, count))
    ):
        raise Refusal(f"{ids.name} are not the best groups of each token")
    return count, kept, quality


def _marked(node: fx.Node, tokens: Any, count: int) -> Any:
    """The group numbers [T, kept] at which node holds ones among zeros."""
    casts = prims.convert_element_type.default
    marks = peel(node, lambda n: is_call(n, casts) and dtype(n.args[0]) != torch.bool)
    if is_call(marks, aten.scatter.value) and same_sizes(sizes(marks), (tokens, count)):
        base, dim, ids, value = marks.args
        zeros = is_call(base, aten.full.default) and is_number(base.args[1], 0)
        if zeros and is_number(value, 1) and dim in (1, -1):
            return ids
    # So Inductor spells the scatter of a single group for each token.
    if is_call(marks, aten.where.self) and is_call(marks.args[0], aten.eq.Tensor):
        equal, one, zero = marks.args
        for numbers, groups in operands(equal):
            ids = peel(numbers, lambda n: is_call(n, aten.expand.default))
            if (
                is_number(one, 1)
                and is_number(zero, 0)
                and is_count(peel(groups))
                and same_sizes(sizes(groups), (1, count))
                and same_sizes(sizes(ids), (tokens, 1))
            ):
                return ids
    raise Refusal(f"{marks} does not mark the groups kept with 1 among zeros")


def _quality(node: fx.Node) -> tuple[fx.Node, int]:
    """(choices [T, G, E // G], how many of the best are added up) of the groups' scores [T, G]."""
    if is_call(node, aten.sum.dim_IntList) and len(node.args) == 2:
        best, dims = node.args
        if is_getitem(best, 0, aten.topk.default) and list(dims) in ([-1], [2]):
            grouped, top, axis, largest, _ = top_k_arguments(best.args[0])
            if largest and last_dim(grouped, axis):
                return grouped, top
    if is_call(node, aten.amax.default) and len(node.args) == 2 and list(node.args[1]) in (
        [-1], [2],
    ):  # fmt: skip
        return node.args[0], 1
    if is_getitem(node, 0, aten.max.dim):
        arguments = node.args[0].args
        if len(arguments) == 2 and arguments[1] in (-1, 2):
            return arguments[0], 1
    raise Refusal(f"{node.name} is not the sum of the best choices of each group")


def top_k_arguments(topk: fx.Node) -> tuple[Any, ...]:
    """(values, k, dim, largest, sorted) of a top-k."""
    return (*topk.args, *(-1, True, True)[len(topk.args) - 2 :])


def _source(node: Any) -> Any:
    """Go up through views and through casts that do not round."""
    return peel(
        node,
        lambda n: (
            is_call(n, aten.view.default, aten.reshape.default)
            or (is_float_cast(n) and unrounded(n, torch.float32) is n)
        ),
    )
