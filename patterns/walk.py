"""Reading FX graphs: shapes, transparent nodes, scalars, and checked steps along edges."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import fx

from inductor_moe.compat import graph_fake_mode, statically_true
from inductor_moe.patterns.rewrite import Refusal

aten = torch.ops.aten
prims = torch.ops.prims

CASTS = {prims.convert_element_type.default, aten._to_copy.default}
COPIES = {aten.clone.default, aten.alias.default, aten.contiguous.default}
SHAPES = {
    aten.view.default,
    aten.reshape.default,
    aten._unsafe_view.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.squeeze.default,
    aten.unsqueeze.default,
}


def is_call(node: Any, *targets: Any) -> bool:
    """Whether node is a call of one of the targets."""
    return isinstance(node, fx.Node) and node.op == "call_function" and node.target in targets


def tensor(node: Any) -> torch.Tensor:
    """The fake tensor of a node; refuses a node that has none."""
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    if not isinstance(value, torch.Tensor):
        raise Refusal(f"{node} is not a tensor with known shape")
    return value


def sizes(node: Any) -> tuple[Any, ...]:
    """The sizes of a node's tensor, SymInts included."""
    return tuple(tensor(node).shape)


def dtype(node: Any) -> torch.dtype:
    """The dtype of a node's tensor."""
    return tensor(node).dtype


def same(left: Any, right: Any) -> bool:
    """Whether two sizes are equal for every value of the symbols."""
    return statically_true(left == right)


def same_sizes(left: Sequence[Any], right: Sequence[Any]) -> bool:
    """Whether two shapes are equal for every value of the symbols."""
    return len(left) == len(right) and all(map(same, left, right))


def without_ones(shape: Iterable[Any]) -> tuple[Any, ...]:
    """A shape with the dims that are always 1 dropped."""
    return tuple(size for size in shape if not same(size, 1))


def only_adds_ones(node: fx.Node) -> bool:
    """Whether a shape node keeps every dim but those of size 1."""
    source = node.args[0]
    return same_sizes(without_ones(sizes(node)), without_ones(sizes(source)))


def is_float_cast(node: Any) -> bool:
    """Whether node casts a float tensor to another float dtype."""
    return (
        is_call(node, *CASTS)
        and dtype(node).is_floating_point
        and dtype(node.args[0]).is_floating_point
    )


def unrounded(node: fx.Node, least: torch.dtype) -> fx.Node:
    """The float cast `node`; refuses one to a dtype that does not hold every value of `least`.

    A rewrite leaves casts out: that may keep digits the model's own dtype would have lost, but
    must not undo a rounding that the model asks for.
    """
    kept, needed = torch.finfo(dtype(node)), torch.finfo(least)
    if kept.eps > needed.eps or kept.max < needed.max or kept.tiny > needed.tiny:
        raise Refusal(f"{node.name} rounds {least} values to {dtype(node)}")
    return node


def is_transparent(node: Any) -> bool:
    """Whether node only copies, or adds and drops dims of size 1."""
    if is_call(node, *COPIES):
        return True
    return is_call(node, *SHAPES) and only_adds_ones(node)


def moves_only_ones(node: Any) -> bool:
    """Whether node permutes, and no dim but those of size 1 changes its place."""
    if not is_call(node, aten.permute.default):
        return False
    shape = sizes(node.args[0])
    kept = [dim % len(shape) for dim in node.args[1] if not same(shape[dim], 1)]
    return kept == sorted(kept)


def keeps_order(node: Any) -> bool:
    """Whether node only copies or views, and its elements are in the order of its argument's."""
    return is_call(node, *COPIES, *SHAPES) or moves_only_ones(node)


def peel(node: Any, also: Callable[[Any], bool] = lambda _: False) -> Any:
    """Go up through transparent nodes, and through those that `also` accepts."""
    while is_transparent(node) or also(node):
        node = node.args[0]
    return node


def peel_casts(node: Any, least: torch.dtype | None = None) -> Any:
    """Go up through transparent nodes and float casts; refuses a cast that rounds `least`."""
    if least is None:
        return peel(node, is_float_cast)
    return peel(node, lambda n: is_float_cast(n) and unrounded(n, least) is n)


def flat_source(node: Any) -> Any:
    """Go up through transparent nodes and flattening views, which keep the order of elements."""
    return peel(node, lambda n: is_call(n, aten.view.default, aten.reshape.default))


def number(value: Any) -> float | int | None:
    """A Python number, or the value of a 0-d constant tensor node; None for anything else."""
    if isinstance(value, (bool, int, float)):
        return value
    if is_call(value, *CASTS) and dtype(value).is_floating_point:
        return number(value.args[0])
    if is_call(value, aten.full.default) and not value.args[0]:
        return number(value.args[1])
    if is_call(value, aten.scalar_tensor.default):
        return number(value.args[0])
    return None


def is_number(value: Any, expected: float) -> bool:
    """Whether value is the constant `expected`."""
    found = number(value)
    return found is not None and found == expected


def last_dim(node: fx.Node, dim: int) -> bool:
    """Whether dim is the last dim of node's tensor."""
    return dim in (-1, len(sizes(node)) - 1)


def operands(node: fx.Node) -> tuple[tuple[Any, Any], ...]:
    """Both orders of a commutative binary node's operands."""
    left, right = node.args[0], node.args[1]
    return ((left, right), (right, left))


def plain_binary(node: Any, *targets: Any) -> bool:
    """Whether node is one of the binary targets without an alpha other than 1."""
    return is_call(node, *targets) and node.kwargs.get("alpha", 1) == 1 and len(node.args) == 2


def is_getitem(node: Any, index: int, *producers: Any) -> bool:
    """Whether node is output `index` of a call of one of the producers."""
    return (
        is_call(node, operator.getitem)
        and node.args[1] == index
        and is_call(node.args[0], *producers)
    )


def gather(node: Any) -> tuple[fx.Node, fx.Node] | None:
    """(source, index) of a gather of whole rows along dim 0, in either spelling."""
    if is_call(node, aten.index.Tensor):
        indices = node.args[1]
        if len(indices) == 1 and isinstance(indices[0], fx.Node):
            return node.args[0], indices[0]
    if is_call(node, aten.index_select.default) and node.args[1] == 0:
        return node.args[0], node.args[2]
    return None


def call(graph: fx.Graph, target: Any, *args: Any, like: fx.Node, **kwargs: Any) -> fx.Node:
    """Insert a call with its fake value computed and the provenance of `like`."""
    node = graph.call_function(target, args, kwargs)
    for key in ("stack_trace", "nn_module_stack", "source_fn_stack", "original_aten"):
        if key in like.meta:
            node.meta[key] = like.meta[key]
    values, named = fx.map_arg((args, kwargs), lambda n: n.meta["val"])
    with graph_fake_mode(graph):
        node.meta["val"] = target(*values, **named)
    return node


def size_of(graph: fx.Graph, node: fx.Node, dim: int, like: fx.Node) -> Any:
    """A size as a graph value: an int, or a sym_size node where it is symbolic."""
    size = sizes(node)[dim]
    return size if isinstance(size, int) else call(graph, aten.sym_size.int, node, dim, like=like)
