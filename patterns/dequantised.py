"""Weights that a graph dequantises by hand and no other rewrite reads: reported with advice.

The codes are inputs of the graph. Bringing them into the kernels' layout here would copy them at
every call, so that is left to whoever loads the model: `repack_` and `replace_weight`.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any, NoReturn

import torch
from torch import fx

from inductor_moe.ops.moe import moe_down_combine, moe_experts, moe_up
from inductor_moe.patterns.moe.activation import POINTWISE
from inductor_moe.patterns.rewrite import Refusal, Rewrite
from inductor_moe.patterns.walk import CASTS, COPIES, SHAPES, aten, dtype, is_call, sizes

# The operands of a call that may be weights.
WEIGHTS = {
    aten.mm.default: (1,),
    aten.addmm.default: (2,),
    moe_experts._opoverload: (1, 2),
    moe_up._opoverload: (1,),
    moe_down_combine._opoverload: (1,),
}
BITS = {
    aten.__and__.Scalar,
    aten.__and__.Tensor,
    aten.__rshift__.Scalar,
    aten.__rshift__.Tensor,
    aten.bitwise_and.Scalar,
    aten.bitwise_and.Tensor,
    aten.bitwise_right_shift.Tensor,
    aten.bitwise_right_shift.Tensor_Scalar,
}
LAYOUT = {
    aten.cat.default,
    aten.expand.default,
    aten.index.Tensor,
    aten.permute.default,
    aten.repeat.default,
    aten.select.int,
    aten.slice.Tensor,
    aten.split.Tensor,
    aten.t.default,
    aten.transpose.int,
    aten.unbind.int,
    operator.getitem,
}
INNER = POINTWISE | CASTS | COPIES | SHAPES | BITS | LAYOUT | {aten.bitwise_xor.Scalar}
# Wider integers are positions and numbers of tokens and experts.
WORDS = (torch.uint8, torch.int8, torch.int16, torch.int32)


def codes_behind(weight: Any) -> fx.Node | None:
    """The integers from which a weight is computed by elementwise operations and views alone.

    They are an input of the graph, of two dims at least. Either they are unpacked by shifts or
    masks and scaled by a float input, or they are int8.
    """
    words: list[fx.Node] = []
    unpacked = scaled = False
    seen: set[fx.Node] = set()
    stack = [weight]
    while stack:
        node = stack.pop()
        if node in seen or not isinstance(node, fx.Node):
            continue
        seen.add(node)
        if node.op in ("placeholder", "get_attr"):
            value = node.meta.get("val")
            if not isinstance(value, torch.Tensor):
                return None
            scaled |= value.dtype.is_floating_point
            if value.dtype in WORDS and value.dim() >= 2:
                words.append(node)
        elif is_call(node, *INNER):
            unpacked |= is_call(node, *BITS)
            stack.extend(node.all_input_nodes)
        elif node.all_input_nodes:
            return None  # made from something else than inputs and constants
    codes = max(words, key=lambda node: node.meta["val"].numel(), default=None)
    if codes is None or not ((unpacked and scaled) or dtype(codes) == torch.int8):
        return None
    return codes


def anchors(graph: fx.Graph) -> Iterator[fx.Node]:
    """Matmuls and expert ops with a weight that is made of integers in the graph."""
    for node in graph.nodes:
        if is_call(node, *WEIGHTS) and _source(node) is not None:
            yield node


def _source(node: fx.Node) -> tuple[Any, fx.Node] | None:
    for position in WEIGHTS[node.target]:
        codes = codes_behind(node.args[position])
        if codes is not None:
            return node.args[position], codes
    return None


def walk(node: fx.Node) -> NoReturn:
    """Say what is dequantised from what."""
    found = _source(node)
    if found is None:
        raise Refusal(f"{node.name} reads no weight that is made of integers")
    weight, codes = found
    kind = str(dtype(codes)).removeprefix("torch.")
    raise Refusal(
        f"{node.name} multiplies by {weight.name} {_text(weight)}, which the graph dequantises "
        f"from {codes.name} {_text(codes)} {kind} in every call"
    )


def _text(node: fx.Node) -> str:
    return f"[{', '.join(str(size) for size in sizes(node))}]"


def _never(graph: fx.Graph, site: Any) -> fx.Node:
    raise AssertionError("walk always refuses")


DEQUANTISED = Rewrite(
    "quant.dequantised",
    op="dequantize",
    anchors=anchors,
    walk=walk,
    replace=_never,
    describe=str,
)
