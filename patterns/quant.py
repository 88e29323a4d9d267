"""Packed weights in a graph: reading one, and linear layers on one."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from torch import fx

from inductor_moe.ops.quant import BITS, dequantize, quantized_linear
from inductor_moe.patterns.int8 import read_int8
from inductor_moe.patterns.rewrite import Refusal, Rewrite
from inductor_moe.patterns.walk import (
    COPIES,
    aten,
    call,
    dtype,
    is_call,
    is_number,
    is_transparent,
    peel,
    prims,
    same,
    sizes,
)


@dataclasses.dataclass(frozen=True)
class PackedWeight:
    """The arguments of a `dequantize` node, or of what computes the same by hand.

    node  the node; its value is [..., N, K]
    """

    node: fx.Node
    packed: fx.Node
    scales: fx.Node
    zeros: fx.Node | None
    group_size: int
    in_features: int

    @property
    def bits(self) -> int:
        return BITS[dtype(self.packed)]

    def describe(self) -> str:
        text = f"int{self.bits}"
        if self.group_size:
            text += f" g{self.group_size}"
        return text + (" with zero points" if self.zeros is not None else "")


def read_packed(node: Any) -> PackedWeight | None:
    """The packed weight that node dequantises, by our op or by hand from int8; or None."""
    if is_call(node, dequantize._opoverload):
        return PackedWeight(node, *node.args)
    found = read_int8(node)
    if found is None:
        return None
    inputs = int(sizes(node)[-1])
    return PackedWeight(node, found.codes, found.scales, found.zeros, found.group_size, inputs)


@dataclasses.dataclass(frozen=True)
class LinearSite:
    """x [M, K] times a packed weight [N, K], and a bias [N] or None."""

    matmul: fx.Node
    x: fx.Node
    weight: PackedWeight
    bias: fx.Node | None

    def describe(self) -> str:
        outputs, inputs = sizes(self.weight.node)
        text = f"{inputs} -> {outputs} {self.weight.describe()} {dtype(self.x)}"
        return text + ("; bias" if self.bias is not None else "")


def _packed_source(node: Any) -> fx.Node | None:
    """The dequantised weight behind a matmul's operand, through views, permutes and casts."""
    shapes = (aten.permute.default, aten.t.default, aten.transpose.int, aten.view.default,
              aten.expand.default, prims.convert_element_type.default)  # fmt: skip
    while read_packed(node) is None:
        if not (is_transparent(node) or is_call(node, *shapes)):
            return None
        node = node.args[0]
    return node  # type: ignore[no-any-return]


MATMULS = {aten.mm.default: (0, 1), aten.addmm.default: (1, 2), aten.bmm.default: (0, 1)}


def anchors(graph: fx.Graph) -> Iterator[fx.Node]:
    """Matmuls that read a packed weight."""
    for node in graph.nodes:
        if is_call(node, *MATMULS):
            left, right = MATMULS[node.target]
            if _packed_source(node.args[left]) or _packed_source(node.args[right]):
                yield node


def walk(matmul: fx.Node) -> LinearSite:
    """Read the linear layer that ends in `matmul`."""
    if is_call(matmul, aten.bmm.default):
        raise Refusal(f"{matmul.name} is a batched matmul; a linear layer has two dims")
    left, right = MATMULS[matmul.target]
    x, operand = matmul.args[left], peel(matmul.args[right], lambda n: is_call(n, *COPIES))
    if _packed_source(operand) is None:
        raise Refusal(f"{matmul.name} has the packed weight on the left")
    if not is_call(operand, aten.permute.default) or list(operand.args[1]) != [1, 0]:
        raise Refusal(
            f"{matmul.name} multiplies by {operand.name}, whose inputs are not the packed dim"
        )
    weight = read_packed(peel(operand.args[0], lambda n: is_call(n, *COPIES)))
    if weight is None:
        raise Refusal(f"{operand.args[0].name} is no packed weight as it is, but made from one")
    if len(sizes(weight.node)) != 2:
        raise Refusal(f"{weight.node.name} has shape {sizes(weight.node)}, not [N, K]")
    if dtype(matmul) != dtype(x):
        raise Refusal(f"{matmul.name} has an output dtype of its own, {dtype(matmul)}")
    return LinearSite(matmul, x, weight, _bias(matmul, weight))


def _bias(matmul: fx.Node, weight: PackedWeight) -> fx.Node | None:
    if is_call(matmul, aten.mm.default):
        return None
    for factor in ("beta", "alpha"):
        if not is_number(matmul.kwargs.get(factor, 1), 1):
            raise Refusal(f"{matmul.name} has {factor} = {matmul.kwargs[factor]}")
    bias = matmul.args[0]
    if len(sizes(bias)) != 1 or not same(sizes(bias)[0], sizes(weight.node)[0]):
        raise Refusal(f"{matmul.name} adds {bias.name} of shape {sizes(bias)}, no bias [N]")
    return bias


def replace(graph: fx.Graph, site: LinearSite) -> fx.Node:
    """Insert the op in the place of the matmul."""
    weight = site.weight
    with graph.inserting_before(site.matmul):
        output = call(
            graph,
            quantized_linear._opoverload,
            site.x,
            weight.packed,
            weight.scales,
            weight.zeros,
            site.bias,
            weight.group_size,
            like=site.matmul,
        )
    site.matmul.replace_all_uses_with(output)
    return output


LINEAR = Rewrite(
    "quant.linear",
    op="quantized_linear",
    anchors=anchors,
    walk=walk,
    replace=replace,
    describe=LinearSite.describe,
)
