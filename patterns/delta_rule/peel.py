"""Moving work that the op does itself from the graph into the op: casts, l2 norm and scale."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import torch
from torch import fx

from inductor_moe.patterns.delta_rule.chain import is_scaling, keeps_shape
from inductor_moe.patterns.delta_rule.proof import Layout
from inductor_moe.patterns.evaluate import computes, leaves, literals, probe
from inductor_moe.patterns.rewrite import Refusal
from inductor_moe.patterns.walk import (
    SHAPES,
    aten,
    dtype,
    is_call,
    is_float_cast,
    number,
    plain_binary,
    same,
    sizes,
    unrounded,
)


@dataclasses.dataclass(frozen=True)
class Operand:
    """A node and the letter of each of its dims, None for those of size 1."""

    node: fx.Node
    layout: Layout

    def up(self) -> Operand | None:
        """The input of a node that only moves values, with its layout; None for other nodes."""
        if not isinstance(self.node, fx.Node) or not self.node.all_input_nodes:
            return None
        source = self.node.args[0]
        if is_call(self.node, aten.select.int):
            dim = self.node.args[1] % len(sizes(source))
            if not same(sizes(source)[dim], 1):
                return None
            return Operand(source, (*self.layout[:dim], None, *self.layout[dim:]))
        if not keeps_shape(self.node):
            return None
        if is_call(self.node, aten.permute.default):
            layout: list[str | None] = [None] * len(self.layout)
            for place, dim in enumerate(self.node.args[1]):
                layout[dim] = self.layout[place]
            return Operand(source, tuple(layout))
        if is_call(self.node, *SHAPES):
            letters = iter([x for x in self.layout if x is not None])
            return Operand(
                source, tuple(None if same(s, 1) else next(letters) for s in sizes(source))
            )
        return Operand(source, self.layout)

    def bare(self) -> Operand:
        """Go up through casts, copies and reordered dims."""
        current = self
        while (above := current.up()) is not None:
            current = above
        return current


def without_scale(operand: Operand) -> tuple[Operand, float]:
    """The operand of a multiplication by a number, and the number."""
    current, scale = operand, 1.0
    while True:
        bare = current.bare()
        if not is_scaling(bare.node):
            return (current if scale == 1.0 else bare), scale
        factor = float(number(bare.node.args[1]))
        divides = is_call(bare.node, aten.div.Tensor, aten.div.Scalar)
        scale = scale / factor if divides else scale * factor
        current = Operand(bare.node.args[0], bare.layout)


def without_norm(operand: Operand) -> tuple[Operand, float] | None:
    """(x, eps) where the operand is x / sqrt(sum(x * x) + eps) over its last dim."""
    bare = operand.bare()
    node = bare.node
    if not plain_binary(node, aten.mul.Tensor, aten.div.Tensor) or not node.args:
        return None
    if not bare.layout or bare.layout[-1] != "K":
        return None
    for rows in node.args[:2]:
        if not isinstance(rows, fx.Node) or len(sizes(rows)) != len(sizes(node)):
            continue
        for source in _sources(rows):
            if leaves(node, stop=(source,)) != [source]:
                continue
            width = int(sizes(node)[-1])
            for eps in sorted(x for x in literals(node, stop=(source,)) if 0 < x < 0.1):

                def formula(x: torch.Tensor, eps: float = eps) -> torch.Tensor:
                    return x * torch.rsqrt((x * x).sum(-1, keepdim=True) + eps)

                scales = (1.0, eps**0.5)  # at the second, eps weighs as much as the sum
                if all(
                    computes(node, [source], [probe(7, width, seed=11, scale=s)], formula)
                    for s in scales
                ):
                    return Operand(source, bare.layout), eps
    return None


def _sources(rows: fx.Node) -> list[fx.Node]:
    """rows, and what it is a cast of."""
    found = [rows]
    while is_float_cast(found[-1]):
        found.append(found[-1].args[0])
    return found


def check_dtypes(nodes: Any, state: fx.Node) -> None:
    """Refuse a region that computes in fp64 what the op would compute in fp32."""
    if state.meta["val"].dtype == torch.float64:
        return
    for node in nodes:
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor) and value.dtype == torch.float64:
            raise Refusal(f"{node.name} computes in float64; the op computes in float32")


def check_rounding(nodes: Iterable[fx.Node], ends: Iterable[fx.Node]) -> None:
    """Refuse a region that rounds in between to a dtype that none of its inputs and results has.

    The op leaves casts out; in fp32 that would undo a rounding that the model asks for.
    """
    kinds = {dtype(node) for node in ends}
    for node in nodes:
        if is_float_cast(node) and dtype(node) not in kinds:
            unrounded(node, torch.float32)
