"""An expert block as it was read from a graph, and the ops that replace it."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import fx

from inductor_moe.ops.moe import moe_down_combine, moe_experts, moe_up
from inductor_moe.ops.quant import (
    moe_down_combine_quantized,
    moe_experts_quantized,
    moe_up_quantized,
)
from inductor_moe.patterns.moe.activation import Activation
from inductor_moe.patterns.quant import PackedWeight, read_packed
from inductor_moe.patterns.walk import (
    SHAPES,
    aten,
    call,
    dtype,
    is_call,
    prims,
    same_sizes,
    size_of,
    sizes,
    tensor,
)


@dataclasses.dataclass(frozen=True)
class Projection:
    """One expert GEMM.

    node    the GEMM
    weight  [E, out, in], or [E, in, out] where `transposed`
    bias    [E, out] or None
    value   the node that holds its rows [S, out], bias added and sentinels masked
    """

    node: fx.Node
    weight: fx.Node
    transposed: bool
    bias: fx.Node | None
    value: fx.Node

    @property
    def experts(self) -> int:
        return int(sizes(self.weight)[0])

    @property
    def packed(self) -> PackedWeight | None:
        """The packed weight [E, out, in] that is dequantised here, or None."""
        return read_packed(_untransposed(self.weight) if self.transposed else self.weight)

    @property
    def width_in(self) -> Any:
        return sizes(self.weight)[1 if self.transposed else 2]

    @property
    def width_out(self) -> Any:
        return sizes(self.weight)[2 if self.transposed else 1]


@dataclasses.dataclass(frozen=True)
class ExpertsSite:
    """Everything that the meaning of an expert block depends on.

    x           [T, H]
    ids         T*K expert numbers in pair order (pair = token * K + slot)
    weights     T*K routing weights in pair order
    top_k       K
    ups         the up projections: one, or gate and up apart
    down        the down projection
    activation  what lies between, or None where it has no name and keeps its nodes
    h           the input rows of the down projection [S, I], or with a dim of 1 more
    output      the node that holds the result [T, H]
    wrap_ids    whether negative ids count from the end, as they do in a gather
    skip        true for pairs that need not be computed, T*K in pair order, or None
    """

    x: fx.Node
    ids: fx.Node
    weights: fx.Node
    top_k: int
    ups: tuple[Projection, ...]
    down: Projection
    activation: Activation | None
    h: fx.Node
    output: fx.Node
    weights_on_input: bool
    wrap_ids: bool = False
    skip: fx.Node | None = None

    def describe(self) -> str:
        hidden = sizes(self.x)[-1]
        inner = self.down.width_in
        text = f"E={self.down.experts} K={self.top_k} H={hidden} I={inner} {dtype(self.h)}"
        if self.activation is not None:
            text += f"; {self.activation.describe()}"
        else:
            text += "; the function between the GEMMs has no name and keeps its nodes"
        if self.down.bias is not None or any(up.bias is not None for up in self.ups):
            text += "; biases"
        packed = [p.packed for p in (self.ups[0], self.down)]
        if packed[0] is not None and packed[1] is not None:
            up, down = (p.describe() for p in packed)
            text += f"; {up}" if up == down else f"; up {up}, down {down}"
        return text + ("; weights on the input" if self.weights_on_input else "")


def replace_experts(graph: fx.Graph, site: ExpertsSite) -> fx.Node:
    """Insert the op, or its two halves around an unnamed function, and return the new output."""
    if site.activation is None:
        return _replace_halves(graph, site)
    up, activation = site.ups[0], site.activation
    packed_up, packed_down = up.packed, site.down.packed
    with graph.inserting_before(site.output):
        target = moe_experts
        projections: list[Any] = [_oriented(graph, p, site) for p in (up, site.down)]
        if packed_up is not None and packed_down is not None:
            target = moe_experts_quantized
            projections = [*_packed(packed_up), *_packed(packed_down), packed_down.in_features]
        output = call(
            graph,
            target._opoverload,
            _tokens(graph, site),
            *projections,
            _ids(graph, site),
            _weights(graph, site),
            up.bias,
            site.down.bias,
            activation.activation,
            activation.gate,
            activation.alpha,
            activation.up_offset,
            activation.limit,
            site.weights_on_input,
            dtype(site.output),
            like=site.output,
        )
        return _finish(graph, site, output)


def _replace_halves(graph: fx.Graph, site: ExpertsSite) -> fx.Node:
    """The GEMMs with their data movement; the nodes between stay, and now see pair order."""
    replaced: dict[fx.Node, fx.Node] = {}
    for up in site.ups:
        with graph.inserting_before(up.value):
            target, projection = moe_up, [_oriented(graph, up, site)]
            if up.packed is not None:
                target, projection = moe_up_quantized, _packed(up.packed)
            rows = call(
                graph,
                target._opoverload,
                _tokens(graph, site),
                *projection,
                _ids(graph, site),
                up.bias,
                _weights(graph, site) if site.weights_on_input else None,
                like=up.node,
            )
            rows = _reshape(graph, rows, sizes(up.value), site)
        up.value.replace_all_uses_with(rows)
        replaced[up.value] = rows
    with graph.inserting_before(site.output):
        target, projection = moe_down_combine, [_oriented(graph, site.down, site)]
        if site.down.packed is not None:
            target, projection = moe_down_combine_quantized, _packed(site.down.packed)
        output = call(
            graph,
            target._opoverload,
            _reshape(graph, replaced.get(site.h, site.h), (-1, site.down.width_in), site),
            *projection,
            _ids(graph, site),
            None if site.weights_on_input else _weights(graph, site),
            site.down.bias,
            dtype(site.output),
            like=site.output,
        )
        return _finish(graph, site, output)


def _tokens(graph: fx.Graph, site: ExpertsSite) -> fx.Node:
    """x in the dtype of the weights."""
    wanted = dtype(site.ups[0].weight)
    if dtype(site.x) == wanted:
        return site.x
    return call(graph, prims.convert_element_type.default, site.x, wanted, like=site.output)


def _oriented(graph: fx.Graph, projection: Projection, site: ExpertsSite) -> fx.Node:
    """The weight as a view [E, out, in]."""
    if not projection.transposed:
        return projection.weight
    straight = _untransposed(projection.weight)
    if straight is not None:
        return straight
    return call(graph, aten.permute.default, projection.weight, [0, 2, 1], like=site.output)


def _untransposed(weight: fx.Node) -> fx.Node | None:
    """What weight is the transpose of, or None if it is no transpose."""
    if weight.target is aten.permute.default and list(weight.args[1]) == [0, 2, 1]:
        return weight.args[0]
    return None


def _packed(weight: PackedWeight) -> list[Any]:
    """The buffers and the group size, as the quantised ops take them."""
    return [weight.packed, weight.scales, weight.zeros, weight.group_size]


def _ids(graph: fx.Graph, site: ExpertsSite) -> fx.Node:
    ids = _per_token(graph, site.ids, site)
    if site.wrap_ids:
        negative = call(graph, aten.lt.Scalar, ids, 0, like=site.output)
        wrapped = call(graph, aten.add.Tensor, ids, site.down.experts, like=site.output)
        ids = call(graph, aten.where.self, negative, wrapped, ids, like=site.output)
    if site.skip is not None:
        skip = _per_token(graph, site.skip, site)
        kind = {"dtype": dtype(ids), "device": tensor(ids).device}
        none = call(graph, aten.full.default, [], site.down.experts, like=site.output, **kind)
        ids = call(graph, aten.where.self, skip, none, ids, like=site.output)
    return ids


def _weights(graph: fx.Graph, site: ExpertsSite) -> fx.Node:
    return _per_token(graph, site.weights, site)


def _per_token(graph: fx.Graph, pairs: fx.Node, site: ExpertsSite) -> fx.Node:
    """T*K values in pair order as [T, K], through the views that flattened them if it can."""
    wanted = (sizes(site.x)[0], site.top_k)
    node = pairs
    while True:
        if same_sizes(sizes(node), wanted):
            return node
        if not is_call(node, *SHAPES) or not isinstance(node.args[0], fx.Node):
            break
        node = node.args[0]
    tokens = size_of(graph, site.x, 0, like=site.output)
    return call(graph, aten.reshape.default, pairs, [tokens, site.top_k], like=site.output)


def _reshape(graph: fx.Graph, node: fx.Node, shape: tuple[Any, ...], site: ExpertsSite) -> fx.Node:
    """A reshape to a shape in which at most the number of pairs is symbolic or -1."""
    if same_sizes(sizes(node), shape) or (len(sizes(node)) == len(shape) and shape[0] == -1):
        return node
    shape = tuple(size if isinstance(size, int) else -1 for size in shape)
    return call(graph, aten.reshape.default, node, list(shape), like=site.output)


def _finish(graph: fx.Graph, site: ExpertsSite, output: fx.Node) -> fx.Node:
    if not same_sizes(sizes(output), sizes(site.output)):
        output = _reshape(graph, output, sizes(site.output), site)
    site.output.replace_all_uses_with(output)
    return output
