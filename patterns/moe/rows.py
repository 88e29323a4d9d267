"""How tokens, pairs (token, slot) and rows sorted by expert refer to each other."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from inductor_moe.patterns.walk import (
    aten,
    flat_source,
    gather,
    is_call,
    is_float_cast,
    is_getitem,
    is_number,
    is_transparent,
    peel,
    peel_casts,
    prims,
    same,
    same_sizes,
    sizes,
)

SORTS = (aten.sort.default, aten.sort.stable)


def sorts_ascending(sort: fx.Node) -> bool:
    dim, descending = -1, False
    if sort.target is aten.sort.default:
        dim, descending = (*sort.args[1:], *(-1, False)[len(sort.args) - 1 :])
    else:
        dim = sort.kwargs.get("dim", -1)
        descending = sort.kwargs.get("descending", False)
    return dim in (0, -1) and not descending


def same_ids(left: Any, right: Any) -> bool:
    """Whether two lists of expert numbers are flattened from the same node."""
    return flat_source(left) is flat_source(right) and same_sizes(sizes(left), sizes(right))


def floor_divided(node: Any) -> tuple[Any, int] | None:
    """(dividend, K) of a floor division of non-negative numbers."""
    if (
        is_call(node, aten.div.Tensor_mode)
        and node.kwargs.get("rounding_mode")
        in (
            "floor",
            "trunc",
        )
    ) or is_call(node, aten.floor_divide.default):
        divisor = node.args[1]
    else:
        return None
    return (node.args[0], divisor) if isinstance(divisor, int) and divisor > 0 else None


def repeated_rows(node: Any) -> tuple[fx.Node, int] | None:
    """(x, K) where node is x [T, H] with each row repeated K times, [T*K, H]."""
    found = gather(node)
    if found is not None:
        token = floor_divided(peel(found[1]))
        if token is not None and is_count(peel(token[0])):
            return found[0], token[1]
        return None
    expand = flat_source(node)
    if not is_call(expand, aten.expand.default) or len(sizes(expand)) != 3:
        return None
    tokens, top_k, hidden = sizes(expand)
    if not isinstance(top_k, int) or not same_sizes(sizes(node), (tokens * top_k, hidden)):
        return None
    x = expand.args[0]
    if not same_sizes(sizes(x), (tokens, 1, hidden)):
        return None
    while not same_sizes(sizes(x), (tokens, hidden)):
        if not is_transparent(x):
            return None
        x = x.args[0]
    return x, top_k


def is_count(node: Any) -> bool:
    return (
        is_call(node, prims.iota.default)
        and node.kwargs.get("start") == 0
        and node.kwargs.get("step") == 1
    )


def is_inverse(node: Any, perm: Any) -> bool:
    """Whether node is the inverse of a permutation: scattered positions, or its argsort."""
    if is_call(node, aten.index_put.default, aten.index_put_.default):
        indices, values = node.args[1], node.args[2]
        accumulate = node.args[3] if len(node.args) > 3 else False
        return (
            len(indices) == 1
            and peel(indices[0]) is perm
            and is_count(peel(values))
            and not accumulate
            and len(sizes(node)) == 1
        )
    if is_call(node, aten.scatter.src) and node.args[1] in (0, -1):
        return peel(node.args[2]) is perm and is_count(peel(node.args[3]))
    return (
        is_getitem(node, 1, *SORTS)
        and peel(node.args[0].args[0]) is perm
        and sorts_ascending(node.args[0])
    )


def pair_column(factor: Any, order: str, least: torch.dtype) -> fx.Node | None:
    """Routing weights in pair order from a factor [S, 1] ("pairs") or [T, K, 1] ("tokens")."""
    node = peel_casts(factor, least)
    shape = sizes(factor)
    if not shape or not same(shape[-1], 1) or len(shape) != (3 if order == "tokens" else 2):
        return None
    return node if isinstance(node, fx.Node) else None


def non_negative(ids: Any) -> bool:
    """Whether expert numbers come from an op that gives none below zero."""
    node = flat_source(ids)
    if is_getitem(node, 1, aten.topk.default, *SORTS) or is_call(node, aten.argmax.default):
        return True
    if is_call(node, aten.clamp_min.default, aten.clamp.default) and len(node.args) > 1:
        return isinstance(node.args[1], int) and node.args[1] >= 0
    if is_call(node, aten.clamp_max.default):
        return isinstance(node.args[1], int) and node.args[1] >= 0 and non_negative(node.args[0])
    return False


def zeroed(weights: Any) -> fx.Node | None:
    """Which pairs have their routing weight set to zero, in pair order, or None."""
    node = peel(
        weights, lambda n: is_float_cast(n) or is_call(n, aten.view.default, aten.reshape.default)
    )
    if not is_call(node, aten.where.self) or not is_number(node.args[1], 0):
        return None
    return node.args[0] if same_sizes(sizes(node.args[0]), sizes(node)) else None
