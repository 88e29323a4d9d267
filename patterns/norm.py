"""Reading RMS norms: any spelling, recognised by what it computes."""

from __future__ import annotations

import dataclasses

import torch
from torch import fx

from inductor_moe.patterns.evaluate import computes, leaves, literals, probe
from inductor_moe.patterns.walk import dtype, flat_source, same_sizes, sizes, without_ones


@dataclasses.dataclass(frozen=True)
class RmsNorm:
    """x * rsqrt(mean(x^2) + eps) * (weight + offset) over the last dim, weight [H]."""

    x: fx.Node
    weight: fx.Node
    eps: float
    offset: float


def read_rms_norm(node: fx.Node) -> RmsNorm | None:
    """The norm whose value, in the dtype of its input, is node; None if it is none."""
    shape = sizes(node)
    width = shape[-1]
    if not isinstance(width, int):
        return None
    for x in _inputs(node):
        rest = [leaf for leaf in leaves(node, stop=(x,)) if leaf is not x]
        if len(rest) != 1 or not same_sizes(without_ones(sizes(rest[0])), (width,)):
            continue
        weight = rest[0]
        if flat_source(weight) is flat_source(x):
            continue
        probes = [probe(5, width, seed=21), probe(width, seed=22)]
        for eps in sorted(number for number in literals(node, (x,)) if 0 < number < 0.1):
            for offset in (0.0, 1.0):
                norm = RmsNorm(x, weight, eps, offset)
                if computes(node, [x, weight], probes, norm_formula(eps, offset)):
                    return norm
    return None


def norm_formula(eps: float, offset: float):  # type: ignore[no-untyped-def]
    """The norm as a function of x [rows, H] and the weight [H]."""

    def formula(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * (weight + offset)

    return formula


def _inputs(node: fx.Node) -> list[fx.Node]:
    """Nodes behind `node` of its shape and dtype, the nearest first."""
    found: list[fx.Node] = []
    frontier, seen = [node], {node}
    while frontier and len(seen) < 64:
        for source in frontier.pop(0).all_input_nodes:
            if source in seen or not isinstance(source.meta.get("val"), torch.Tensor):
                continue
            seen.add(source)
            frontier.append(source)
            if same_sizes(sizes(source), sizes(node)) and dtype(source) == dtype(node):
                found.append(source)
    return found
