"""Following named axes through views and permutations, for any sizes, symbolic ones included."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import fx

from inductor_moe.patterns.rewrite import Refusal
from inductor_moe.patterns.walk import COPIES, SHAPES, aten, is_call, same, sizes

# An axis is a name and a size; a dim holds the axes that were flattened into it, none if it is 1.
Axis = tuple[str, Any]
Dims = tuple[tuple[Axis, ...], ...]


def moves(node: Any) -> bool:
    """Whether node only moves data: a copy, a view or a permutation."""
    return is_call(node, aten.permute.default, *SHAPES, *COPIES)


def source_of(
    node: Any, stop: Callable[[fx.Node], bool] = lambda _: False
) -> tuple[fx.Node, list[fx.Node]]:
    """(where the data comes from, the moves from there to node in order)."""
    path: list[fx.Node] = []
    while moves(node) and not stop(node):
        path.append(node)
        node = node.args[0]
    return node, path[::-1]


def named(node: fx.Node, names: str) -> Dims:
    """One axis for each dim of a node."""
    shape = sizes(node)
    if len(shape) != len(names):
        raise Refusal(f"{node.name} has shape {shape}, not one dim for each of {', '.join(names)}")
    return tuple(_dim((name, size)) for name, size in zip(names, shape, strict=True))


def _dim(*axes: Axis) -> tuple[Axis, ...]:
    return tuple(axis for axis in axes if not same(axis[1], 1))


def moved(dims: Dims, path: Sequence[fx.Node]) -> Dims:
    """The dims after a series of moves; refuses a view that cuts through an axis."""
    for node in path:
        if is_call(node, aten.permute.default):
            dims = tuple(dims[dim] for dim in node.args[1])
        elif is_call(node, *SHAPES):
            dims = _viewed(dims, node)
    return dims


def _viewed(dims: Dims, node: fx.Node) -> Dims:
    rest = [axis for dim in dims for axis in dim]
    found = []
    for size in sizes(node):
        taken: list[Axis] = []
        count: Any = 1
        while not same(count, size):
            if not rest:
                raise Refusal(f"{node.name} cuts through an axis")
            taken.append(rest.pop(0))
            count = count * taken[-1][1]
        found.append(tuple(taken))
    if rest:
        raise Refusal(f"{node.name} cuts through an axis")
    return tuple(found)


def names_of(dims: Dims) -> tuple[str, ...]:
    """The names in each dim, "" for a dim of size 1."""
    return tuple("".join(name for name, _ in dim) for dim in dims)
