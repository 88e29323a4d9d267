"""Recognising a small computation by what it computes: run its nodes in fp64 on probe values.

Casts between float dtypes are left out, so that every spelling of a formula gives the same
values; a changed constant gives others. Used where a formula has many spellings.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from inductor_moe.compat import real_tensors
from inductor_moe.patterns.moe.activation import POINTWISE
from inductor_moe.patterns.walk import aten, is_call, is_float_cast, is_transparent, number

REDUCTIONS = {aten.mean.dim, aten.sum.dim_IntList, aten.amax.default}


class CannotEvaluate(Exception):
    """The computation holds a node that is not evaluated here."""


def leaves(node: fx.Node, stop: Sequence[fx.Node] = ()) -> list[fx.Node]:
    """The inputs of the computation behind node, in the order found.

    A leaf is in `stop`, or is no pointwise node, cast, copy, reduction over the last dim or
    constant.
    """
    found: list[fx.Node] = []
    seen: set[fx.Node] = set()
    stack = [node]
    while stack:
        current = stack.pop()
        if current in seen:
            continue
        seen.add(current)
        if current in stop or not _is_inner(current):
            if number(current) is None:
                found.append(current)
            continue
        stack.extend(reversed(current.all_input_nodes))
    return found


def _is_inner(node: fx.Node) -> bool:
    return (
        is_call(node, *POINTWISE)
        or is_float_cast(node)
        or is_transparent(node)
        or _is_row_reduction(node)
    )


def _is_row_reduction(node: fx.Node) -> bool:
    if not is_call(node, *REDUCTIONS):
        return False
    dims = len(node.args[0].meta["val"].shape)
    keepdim = len(node.args) > 2 and node.args[2] is True
    return list(node.args[1]) in ([-1], [dims - 1]) and keepdim


def evaluate(node: fx.Node, values: dict[fx.Node, torch.Tensor]) -> torch.Tensor:
    """The value of node given values of its leaves, in fp64. Raises CannotEvaluate."""
    memo: dict[fx.Node, Any] = dict(values)

    def value(argument: Any) -> Any:
        if not isinstance(argument, fx.Node):
            return argument
        if argument not in memo:
            memo[argument] = compute(argument)
        return memo[argument]

    def compute(current: fx.Node) -> Any:
        constant = number(current)
        if constant is not None:
            return torch.tensor(float(constant), dtype=torch.float64)
        if not _is_inner(current):
            raise CannotEvaluate(current.name)
        if is_float_cast(current) or is_transparent(current):
            return value(current.args[0])
        args = [value(argument) for argument in current.args]
        if _is_row_reduction(current):
            args[1] = [-1]
        kwargs = {key: value(argument) for key, argument in current.kwargs.items()}
        kwargs.pop("dtype", None)
        return current.target(*args, **kwargs)

    with real_tensors():
        result = value(node)
    if not isinstance(result, torch.Tensor):
        raise CannotEvaluate(node.name)
    return result


def computes(
    node: fx.Node,
    inputs: Sequence[fx.Node],
    probes: Sequence[torch.Tensor],
    formula: Callable[..., torch.Tensor],
) -> bool:
    """Whether node, as a function of `inputs`, is the formula, on the probes in fp64."""
    try:
        found = evaluate(node, dict(zip(inputs, probes, strict=True)))
    except CannotEvaluate:
        return False
    with real_tensors():
        expected = formula(*probes)
        return found.shape == expected.shape and torch.allclose(
            found, expected, rtol=1e-9, atol=1e-12
        )


def literals(node: fx.Node, stop: Sequence[fx.Node]) -> set[float]:
    """The numbers in the computation behind node."""
    found: set[float] = set()
    seen: set[fx.Node] = set()
    stack = [node]
    while stack:
        current = stack.pop()
        if current in seen or current in stop or not _is_inner(current):
            continue
        seen.add(current)
        for argument in (*current.args, *current.kwargs.values()):
            constant = number(argument)
            if constant is not None:
                found.add(float(constant))
        stack.extend(current.all_input_nodes)
    return found


def probe(*shape: int, seed: int, scale: float = 2.0, positive: bool = False) -> torch.Tensor:
    """Random fp64 values, the same every time; at least 0.01 if positive."""
    with real_tensors():
        generator = torch.Generator().manual_seed(seed)
        values = scale * torch.randn(shape, generator=generator, dtype=torch.float64)
        return values.abs() + 0.01 if positive else values
