"""Short causal convolutions of a prompt, channels innermost, become sums of shifted rows.

Models turn [B, T, C] into [B, C, T] for the depthwise convolution before the rule, and back after
it. As a call it costs both turns and the activation as kernels of their own; as W products and a
sum it is one elementwise kernel that reads and writes [B, T, C], in which the rule's kernels then
read queries, keys and values in place. A cache joins the inputs that it kept [B, C, S] before the
prompt's, and cuts their outputs off again: both are then done to rows.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import fx

from inductor_moe.patterns.rewrite import Refusal
from inductor_moe.patterns.walk import CASTS, call, dtype, is_call, same, size_of, sizes, tensor

aten = torch.ops.aten

NAME = "delta_rule.convolution"
TURN = [0, 2, 1]
WIDEST = 8  # taps; past that a kernel for convolutions is the better one


class Site(NamedTuple):
    """A convolution over all of its inputs, and what to compute on [B, T, C] after it."""

    convolution: fx.Node
    output: fx.Node  # [B, C, T], the first T outputs
    region: list[fx.Node]  # elementwise or cuts, on output and each other, in graph order
    exits: list[fx.Node]  # turns of the last of them back to [B, T, C]


def spread_convolutions(graph: fx.Graph) -> int:
    """Rewrite every such convolution in place and return how many there were."""
    found = 0
    for node in list(graph.nodes):
        if is_call(node, aten.convolution.default):
            try:
                site = _read(node)
            except Refusal:
                continue
            _replace(graph, site)
            found += 1
    if found:
        graph.eliminate_dead_code()
    return found


def _read(node: fx.Node) -> Site:
    source, weight, bias, stride, padding, dilation, transposed, _, groups = node.args
    channels, _, width = sizes(weight) if len(sizes(weight)) == 3 else (0, 0, 0)
    if not (
        isinstance(width, int)
        and width <= WIDEST
        and same(sizes(weight)[1], 1)
        and same(groups, channels)
        and (list(stride), list(padding), list(dilation)) == ([1], [width - 1], [1])
        and not transposed
        and dtype(source) == dtype(weight)
        and dtype(source).is_floating_point
        and (bias is None or dtype(bias) == dtype(source))
    ):
        raise Refusal(f"{node.name} is no short causal depthwise convolution")
    parts = _parts(source)
    if not (any(map(_is_turn_of_rows, parts)) and all(len(sizes(part)) == 3 for part in parts)):
        raise Refusal(f"{node.name} does not read rows of channels")
    length = sizes(source)[2]
    if same(length, 1):
        raise Refusal(f"{node.name} is of one token")
    (output,) = _only(node)
    if not (_is_head(output) and same(sizes(output)[2], length)):
        raise Refusal(f"{node.name} is not cut to the length of its input")
    region, exits = _region(output)
    return Site(node, output, region, exits)


def _only(node: fx.Node) -> tuple[fx.Node]:
    if len(node.users) != 1:
        raise Refusal(f"{node.name} has {len(node.users)} users")
    return (next(iter(node.users)),)


def _parts(source: fx.Node) -> list[fx.Node]:
    """What is joined along the tokens of [B, C, T], or the one tensor itself."""
    if is_call(source, aten.cat.default) and _dim(source) in (2, -1):
        return list(source.args[0])
    return [source]


def _dim(node: fx.Node) -> Any:
    return node.args[1] if len(node.args) > 1 else 0


def _is_turn(node: Any) -> bool:
    return is_call(node, aten.permute.default) and list(node.args[1]) == TURN


def _is_turn_of_rows(node: Any) -> bool:
    return _is_turn(node) and same(tensor(node.args[0]).stride(-1), 1)


def _is_cut(node: fx.Node) -> bool:
    """Whether a node takes neighbouring columns of [B, C, T]."""
    return (
        is_call(node, aten.slice.Tensor)
        and _dim(node) in (2, -1)
        and (len(node.args) < 5 or node.args[4] == 1)
    )


def _is_head(node: fx.Node) -> bool:
    """Whether a node takes the first columns of [B, C, T]."""
    return _is_cut(node) and (len(node.args) < 3 or node.args[2] in (0, None))


def _region(output: fx.Node) -> tuple[list[fx.Node], list[fx.Node]]:
    """What is computed of the output, and the turns at its end; refuses what does not turn."""
    region, exits, inside = [], [], {output}
    for node in _after(output):
        if not any(argument in inside for argument in node.all_input_nodes):
            continue
        if _is_turn(node):
            exits.append(node)
        elif _is_cut(node) or (
            _is_elementwise(node) and all(n in inside for n in node.all_input_nodes)
        ):
            region.append(node)
            inside.add(node)
        else:
            raise Refusal(f"{node.name} reads the convolution as it lies")
    if not exits:
        raise Refusal(f"{output.name} is not turned back")
    return region, exits


def _after(node: fx.Node) -> list[fx.Node]:
    nodes = list(node.graph.nodes)
    return nodes[nodes.index(node) + 1 :]


def _is_elementwise(node: fx.Node) -> bool:
    if is_call(node, *CASTS):
        return True
    tags = getattr(node.target, "tags", ())
    return node.op == "call_function" and torch.Tag.pointwise in tags


def _replace(graph: fx.Graph, site: Site) -> None:
    with graph.inserting_before(site.output):
        turned = {site.output: _sum_of_taps(graph, site)}
    for node in site.region:
        with graph.inserting_before(node):
            args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: turned.get(n, n))
            if _is_cut(node):
                args = (args[0], 1, *args[2:])
            turned[node] = call(graph, node.target, *args, like=node, **kwargs)
    for node in site.exits:
        node.replace_all_uses_with(turned[node.args[0]])


def _rows(graph: fx.Graph, source: fx.Node) -> fx.Node:
    """[B, T, C] of a convolution's input, where that is made: its parts may be written later."""
    if _is_turn(source):
        return source.args[0]
    with graph.inserting_before(source):
        emit = functools.partial(call, graph, like=source)
        parts = [
            part.args[0] if _is_turn(part) else emit(aten.permute.default, part, TURN)
            for part in _parts(source)
        ]
        return emit(aten.cat.default, parts, 1)


def _sum_of_taps(graph: fx.Graph, site: Site) -> fx.Node:
    source, weight, bias, *_ = site.convolution.args
    emit = functools.partial(call, graph, like=site.convolution)
    kind = dtype(source)
    cast = torch.ops.prims.convert_element_type.default
    wide = torch.promote_types(kind, torch.float32)

    def widened(node: fx.Node) -> fx.Node:
        return node if kind == wide else emit(cast, node, wide)

    joined = _rows(graph, source)
    width = sizes(weight)[2]
    length = size_of(graph, joined, 1, like=site.convolution)
    total = None if bias is None else widened(bias)
    for tap in range(width):
        rows = joined
        if tap < width - 1:
            padded = emit(aten.constant_pad_nd.default, rows, [0, 0, width - 1 - tap, 0], 0.0)
            rows = emit(aten.slice.Tensor, padded, 1, 0, length)
        column = emit(aten.select.int, emit(aten.select.int, weight, 1, 0), 1, tap)
        term = emit(aten.mul.Tensor, widened(rows), widened(column))
        total = term if total is None else emit(aten.add.Tensor, total, term)
    assert total is not None
    return (
        total if kind == wide else emit(torch.ops.prims.convert_element_type.default, total, kind)
    )
