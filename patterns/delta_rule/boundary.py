"""What a chain of state updates reads: the nodes that belong to it, and its inputs.

The inputs are the lowest tensors that hold one row a token: above them nothing mixes tokens.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Iterable
from typing import Any

import torch
from torch import fx

from inductor_moe.patterns.delta_rule.chain import Chain, is_scaling, keeps_shape
from inductor_moe.patterns.delta_rule.rules import PIECES, RULES
from inductor_moe.patterns.delta_rule.runner import ELEMENTWISE
from inductor_moe.patterns.walk import (
    CASTS,
    COPIES,
    SHAPES,
    aten,
    is_call,
    is_number,
    plain_binary,
    prims,
    same,
    same_sizes,
    sizes,
    without_ones,
)

CONSTANTS = {aten.full.default, aten.scalar_tensor.default, prims.iota.default}
MIXING = {aten.bmm.default, aten.cumsum.default, aten.linalg_solve_triangular.default}
WALKED = ELEMENTWISE | CASTS | COPIES | SHAPES | RULES.keys()
PARTS = PIECES | {aten.select.int, aten.slice.Tensor}
VIEWS = {aten.view.default, aten.reshape.default, aten._unsafe_view.default}


@dataclasses.dataclass(frozen=True)
class Region:
    """`nodes` in graph order compute the outputs from the state and `inputs`."""

    nodes: tuple[fx.Node, ...]
    inputs: tuple[fx.Node, ...]


def read_region(chain: Chain, outputs: Iterable[fx.Node], order: dict[fx.Node, int]) -> Region:
    """Walk up from the outputs to the state and the inputs."""
    outputs = list(outputs)
    dependent = _descendants(chain.state, max(order[node] for node in outputs), order)
    candidates = _ancestors(outputs, chain.state, dependent)
    constant: set[fx.Node] = set()
    mixing: set[fx.Node] = set()
    for node in sorted(candidates, key=order.__getitem__):
        if is_call(node, *CONSTANTS) or (
            node.all_input_nodes and all(x in constant for x in node.all_input_nodes)
        ):
            constant.add(node)
        elif (
            node in dependent
            or node.target in MIXING
            or _pairs(node)
            or _is_turn(node, chain)
            or any(x in mixing for x in node.all_input_nodes)
        ):
            mixing.add(node)

    within = mixing | constant
    inside: set[fx.Node] = set()
    inputs: dict[fx.Node, None] = {}
    stack = outputs
    while stack:
        node = stack.pop()
        if node in inside or node in inputs or node is chain.state or _is_size(node):
            continue
        onward: list[fx.Node] | None
        onward = node.all_input_nodes if node in within else _per_token(node, chain)
        if onward is None:
            inputs[node] = None
        else:
            inside.add(node)
            stack.extend(onward)
    return Region(tuple(sorted(inside, key=order.__getitem__)), tuple(inputs))


def _is_size(node: fx.Node) -> bool:
    """Whether node is a symbolic size, which the shapes of the tensors tell as well."""
    return isinstance(node.meta.get("val"), (int, torch.SymInt))


def _descendants(start: fx.Node, last: int, order: dict[fx.Node, int]) -> set[fx.Node]:
    found: set[fx.Node] = set()
    stack = list(start.users)
    while stack:
        node = stack.pop()
        if node not in found and order[node] <= last:
            found.add(node)
            stack.extend(node.users)
    return found


def _ancestors(outputs: list[fx.Node], state: fx.Node, dependent: set[fx.Node]) -> set[fx.Node]:
    found: set[fx.Node] = set()
    stack = list(outputs)
    while stack:
        node = stack.pop()
        if node in found or node is state or node.op != "call_function":
            continue
        if node.target not in WALKED:
            continue
        if node.target is aten.mm.default and node not in dependent:
            continue
        found.add(node)
        stack.extend(node.all_input_nodes)
    return found


def _pairs(node: fx.Node) -> bool:
    """Whether an elementwise op broadcasts each of its inputs along a dim of the other."""
    if node.target not in ELEMENTWISE or len(node.all_input_nodes) < 2:
        return False
    shape = sizes(node)
    return not any(same_sizes(sizes(x), shape) for x in node.all_input_nodes)


def _is_turn(node: fx.Node, chain: Chain) -> bool:
    """Whether node takes one step or chunk out of all."""
    if chain.length == 1 or not is_call(node, *PARTS):
        return False
    dim = _part_dim(node)
    shape = sizes(node.args[0])
    if is_call(node, aten.slice.Tensor) and not same(sizes(node)[dim], 1):
        return False
    if is_call(node, aten.split.Tensor) and node.args[1] != 1:
        return False
    return same(shape[dim], chain.length)


def _part_dim(node: fx.Node) -> int:
    position = 2 if is_call(node, aten.split.Tensor) else 1
    dim = node.args[position] if len(node.args) > position else node.kwargs.get("dim", 0)
    return dim % len(sizes(node.args[0]))


def _per_token(node: fx.Node, chain: Chain) -> list[Any] | None:
    """The inputs to go on with from a tensor of one row a token, or None to stop at it."""
    if keeps_shape(node) or is_call(node, aten.exp.default) or _is_padding(node):
        return [node.args[0]]
    if is_call(node, *PARTS):
        return [node.args[0]] if same(sizes(node.args[0])[_part_dim(node)], 1) else None
    if is_call(node, operator.getitem) and is_call(node.args[0], *PIECES):
        pieces = node.args[0]
        return [pieces] if same(sizes(pieces.args[0])[_part_dim(pieces)], 1) else None
    if is_call(node, *VIEWS) and (_folds(node) or _splits_chunks(node, chain)):
        return [node.args[0]]
    if is_scaling(node) and _is_padding(node.args[0]):
        return [node.args[0]]
    if plain_binary(node, aten.mul.Tensor):
        for rows, strength in (node.args, node.args[::-1]):
            if (
                isinstance(rows, fx.Node)
                and isinstance(strength, fx.Node)
                and len(sizes(rows)) == len(sizes(strength))
                and same(sizes(strength)[-1], 1)
                and not same(sizes(rows)[-1], 1)
                and not _norm_of(strength, rows)
            ):
                return [rows, strength]
    return None


def _is_padding(node: Any) -> bool:
    return is_call(node, aten.constant_pad_nd.default) and (
        len(node.args) < 3 or is_number(node.args[2], 0)
    )


def _folds(node: fx.Node) -> bool:
    """Whether a view merges the leading dims into one, as batched products want it."""
    before, after = sizes(node.args[0]), sizes(node)
    if not 3 == len(after) < len(before):
        return False
    kept = without_ones(after[1:])
    return not kept or same_sizes(without_ones(before)[-len(kept) :], kept)


def _splits_chunks(node: fx.Node, chain: Chain) -> bool:
    """Whether a view splits the tokens [.., N * C, ..] into [.., N, C, ..]."""
    before, after = sizes(node.args[0]), sizes(node)
    if not chain.chunked or len(after) != len(before) + 1:
        return False
    for dim, size in enumerate(before):
        if (
            same(after[dim], chain.length)
            and same(after[dim + 1], chain.inner)
            and same(size, chain.length * chain.inner)
            and all(same(x, y) for x, y in zip(before[:dim], after[:dim], strict=True))
            and all(same(x, y) for x, y in zip(before[dim + 1 :], after[dim + 2 :], strict=True))
        ):
            return True
    return False


def _norm_of(factor: fx.Node, rows: fx.Node) -> bool:
    """Whether a factor a row is computed from the rows themselves, as an inverse norm is."""
    sources = {rows}
    node: Any = rows
    while keeps_shape(node):
        node = node.args[0]
        sources.add(node)
    seen: list[fx.Node] = [factor]
    for current in seen:
        if len(seen) > 40:
            break
        if current in sources:
            return True
        seen.extend(x for x in current.all_input_nodes if x not in seen)
    return False
