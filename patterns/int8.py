"""Weights dequantised from int8 by hand: the codes already lie as the kernels read them."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import fx

from inductor_moe.patterns.walk import (
    CASTS,
    COPIES,
    SHAPES,
    aten,
    dtype,
    is_call,
    is_transparent,
    same_sizes,
    sizes,
    tensor,
)


@dataclasses.dataclass(frozen=True)
class Int8Weight:
    """The parts of (codes - zeros) * scales.

    codes       [..., N, K] int8, a contiguous input of the graph
    scales      [..., N, G] in the dtype of the weight
    zeros       like scales, or None
    group_size  inputs that share a scale; 0 is one group a row
    """

    codes: fx.Node
    scales: fx.Node
    zeros: fx.Node | None
    group_size: int


def read_int8(weight: Any) -> Int8Weight | None:
    """The parts of a weight [..., N, K] that is computed from int8 codes; None if it is not."""
    product = weight
    if is_call(weight, *SHAPES) and len(_shape(weight.args[0])) == len(_shape(weight)) + 1:
        product = weight.args[0]  # computed as [..., N, G, group]
    if not is_call(product, aten.mul.Tensor):
        return None
    for integers, scales in (product.args, reversed(product.args)):
        found = _parts(weight, product, integers, scales)
        if found is not None:
            return found
    return None


def _parts(weight: fx.Node, product: fx.Node, integers: Any, scales: Any) -> Int8Weight | None:
    zeros = None
    if is_call(integers, aten.sub.Tensor) and not integers.kwargs:
        integers, zeros = integers.args
        if not isinstance(zeros, fx.Node):
            return None
    codes = _codes(integers)
    if codes is None or not isinstance(scales, fx.Node):
        return None
    # Views keep the order of elements: codes that begin and end as the weight does are its own.
    if not same_sizes(sizes(codes), sizes(weight)) or _shape(integers) != _shape(product):
        return None
    groups = [_per_group(n, weight, product) for n in (scales, zeros) if n is not None]
    (scale, size), zero = groups[0] or (None, 0), (groups[1:] or [None])[0]
    if scale is None or (zeros is not None and (zero is None or zero[1] != size)):
        return None
    found = Int8Weight(codes, scale, None if zero is None else zero[0], size)
    kinds = {dtype(node) for node in (integers, found.scales, found.zeros) if node is not None}
    return found if kinds == {dtype(weight)} else None


def _codes(node: Any) -> fx.Node | None:
    """The int8 input behind a cast to float and views."""
    cast = False
    while is_call(node, *CASTS, *SHAPES, *COPIES):
        cast |= is_call(node, *CASTS)
        node = node.args[0]
    if not (cast and isinstance(node, fx.Node) and node.op in ("placeholder", "get_attr")):
        return None
    value = node.meta.get("val")
    fits = isinstance(value, torch.Tensor) and value.dtype == torch.int8 and value.dim() in (2, 3)
    return node if fits and tensor(node).is_contiguous() else None


def _per_group(node: fx.Node, weight: fx.Node, product: fx.Node) -> tuple[fx.Node, int] | None:
    """(values [..., N, G], group size) of what the product broadcasts over a row or its groups."""
    *rows, inputs = _shape(weight)
    if product is weight and is_call(node, *SHAPES) and same_sizes(_shape(node), _shape(weight)):
        # repeat_interleave: [..., N, G, 1] is expanded, copied and flattened.
        expanded = node.args[0]
        while is_call(expanded, *COPIES):
            expanded = expanded.args[0]
        if not is_call(expanded, aten.expand.default):
            return None
        return _of_groups(expanded.args[0], rows, inputs)
    if is_call(node, aten.expand.default) and same_sizes(_shape(node), _shape(product)):
        node = node.args[0]
    if product is not weight:
        return _of_groups(node, rows, inputs)
    return (node, 0) if same_sizes(_shape(node), (*rows, 1)) else None


def _of_groups(node: Any, rows: list[Any], inputs: Any) -> tuple[fx.Node, int] | None:
    """(values [..., N, G], group size) behind [..., N, G, 1]."""
    found = _shape(node)
    if len(found) != len(rows) + 2 or not same_sizes(found[:-2], rows) or found[-1] != 1:
        return None
    groups = found[-2]
    if not (isinstance(groups, int) and isinstance(inputs, int)) or inputs % groups:
        return None
    group = inputs // groups
    if group not in (16, 32) and group % 64:
        return None
    while not same_sizes(_shape(node), (*rows, groups)):
        if not is_transparent(node):
            return None
        node = node.args[0]
    return node, group


def _shape(node: Any) -> tuple[Any, ...]:
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return tuple(value.shape) if isinstance(value, torch.Tensor) else ()
