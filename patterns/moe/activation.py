"""Naming the function between the two expert GEMMs.

The function is not compared with a template: it is evaluated. The pointwise nodes between the up
projection and the down projection run in fp64 on a grid of gate and up values, with the float
casts left out, and the result is compared with each activation the op knows. Every spelling of an
activation gives the same values, and a changed constant gives others.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import operator
from typing import Any

import torch
from torch import fx

from inductor_moe.compat import real_tensors
from inductor_moe.patterns.walk import (
    COPIES,
    SHAPES,
    aten,
    is_call,
    is_float_cast,
    is_transparent,
    last_dim,
    number,
    same,
    same_sizes,
    sizes,
)

POINTWISE = {
    aten.abs.default,
    aten.add.Tensor,
    aten.add.Scalar,
    aten.clamp.default,
    aten.clamp.Tensor,
    aten.clamp_max.default,
    aten.clamp_max.Tensor,
    aten.clamp_min.default,
    aten.clamp_min.Tensor,
    aten.div.Tensor,
    aten.div.Scalar,
    aten.elu.default,
    aten.erf.default,
    aten.exp.default,
    aten.expm1.default,
    aten.gelu.default,
    aten.hardsigmoid.default,
    aten.hardswish.default,
    aten.leaky_relu.default,
    aten.log.default,
    aten.log1p.default,
    aten.maximum.default,
    aten.minimum.default,
    aten.mul.Tensor,
    aten.mul.Scalar,
    aten.neg.default,
    aten.pow.Tensor_Scalar,
    aten.reciprocal.default,
    aten.relu.default,
    aten.rsqrt.default,
    aten.rsub.Scalar,
    aten.sigmoid.default,
    aten.silu.default,
    aten.softplus.default,
    aten.sqrt.default,
    aten.square.default,
    aten.sub.Tensor,
    aten.sub.Scalar,
    aten.tanh.default,
    aten.where.self,
    aten.gt.Scalar,
    aten.ge.Scalar,
    aten.lt.Scalar,
    aten.le.Scalar,
    aten.gt.Tensor,
    aten.ge.Tensor,
    aten.lt.Tensor,
    aten.le.Tensor,
}

SELECTORS = {
    aten.split.Tensor,
    aten.split_with_sizes.default,
    aten.slice.Tensor,
    aten.select.int,
    aten.unbind.int,
    operator.getitem,
}


@dataclasses.dataclass(frozen=True)
class Activation:
    """The function between the GEMMs, in the op's own attributes (see ops.moe.moe_experts)."""

    activation: str
    gate: str
    alpha: float = 1.0
    up_offset: float = 0.0
    limit: float | None = None

    def describe(self) -> str:
        text = f"{self.activation}, gate {self.gate}"
        if self.alpha != 1.0:
            text += f", alpha {self.alpha:g}"
        if self.up_offset != 0.0:
            text += f", up offset {self.up_offset:g}"
        return text if self.limit is None else f"{text}, limit {self.limit:g}"


def is_row_wise(node: fx.Node) -> bool:
    """Whether a node treats every row alike: pointwise, a cast, or a choice along the last dim."""
    if is_call(node, *POINTWISE) or is_float_cast(node) or is_call(node, *COPIES):
        return True
    if is_call(node, *SHAPES):
        return _keeps_rows(node)
    if is_call(node, operator.getitem):
        return is_call(node.args[0], aten.split.Tensor, aten.split_with_sizes.default) or is_call(
            node.args[0], aten.unbind.int
        )
    if is_call(node, aten.split.Tensor, aten.split_with_sizes.default):
        return last_dim(node.args[0], node.args[2] if len(node.args) > 2 else 0)
    if is_call(node, aten.slice.Tensor, aten.select.int, aten.unbind.int):
        dim = node.args[1] if len(node.args) > 1 else 0
        return dim % len(sizes(node.args[0])) > 0
    return False


def _keeps_rows(node: fx.Node) -> bool:
    before, after = sizes(node.args[0]), sizes(node)
    if is_transparent(node):
        return True
    return bool(before) and bool(after) and same(before[0], after[0])


def name_activation(region: list[fx.Node], up: fx.Node, h: fx.Node) -> Activation | None:
    """The activation that the region computes from `up` [.., N] to `h` [.., I], or None.

    region  the nodes between up and h in graph order, h included, up left out
    """
    width = sizes(up)[-1]
    inner = sizes(h)[-1]
    if not isinstance(width, int) or not isinstance(inner, int):
        return None
    gated = width == 2 * inner
    if not gated and width != inner:
        return None
    rows = sizes(up)[:-1]
    with real_tensors():
        try:
            reading = _Reading(up, rows, width, gated)
            for node in region:
                reading.evaluate(node)
            value = reading.values[h]
        except _NotPointwise:
            return None
        if isinstance(value, _Halves):
            if gated:
                return None
            value = value.first
        return _identify(value, reading)


class _NotPointwise(Exception):
    """The region holds a node that the evaluation does not know."""


@dataclasses.dataclass(frozen=True)
class _Halves:
    """A value of the full width: what it is on the gate columns and on the up columns."""

    first: torch.Tensor
    second: torch.Tensor
    axis: str | None = None  # "half" for [.., 2, I], "parity" for [.., I, 2]


class _Reading:
    def __init__(self, up: fx.Node, rows: tuple[Any, ...], width: int, gated: bool) -> None:
        gate, up_half = probes()
        self.rows, self.width, self.gated = rows, width, gated
        self.layout: str | None = None
        self.values: dict[fx.Node, Any] = {up: _Halves(gate, up_half)}
        self.literals: set[float] = set()

    def choose(self, value: _Halves, layout: str, index: int) -> torch.Tensor:
        if self.layout not in (None, layout):
            raise _NotPointwise
        self.layout = layout
        return value.first if index == 0 else value.second

    def evaluate(self, node: fx.Node) -> None:
        source = node.args[0]
        value = self.values.get(source) if isinstance(source, fx.Node) else None
        if is_float_cast(node) or is_call(node, *COPIES):
            self.values[node] = value
        elif is_call(node, *SHAPES):
            self.values[node] = self.reshape(node, value)
        elif is_call(node, *SELECTORS):
            self.values[node] = self.select(node, value)
        elif is_call(node, *POINTWISE):
            self.values[node] = self.pointwise(node)
        else:
            raise _NotPointwise

    def reshape(self, node: fx.Node, value: Any) -> Any:
        if is_transparent(node):
            return value
        if not isinstance(value, _Halves) or value.axis is not None:
            raise _NotPointwise
        half = self.width // 2
        if self.gated and same_sizes(sizes(node), (*self.rows, 2, half)) and half != 2:
            return dataclasses.replace(value, axis="half")
        if self.gated and same_sizes(sizes(node), (*self.rows, half, 2)) and half != 2:
            return dataclasses.replace(value, axis="parity")
        raise _NotPointwise

    def select(self, node: fx.Node, value: Any) -> Any:
        if is_call(node, operator.getitem):
            halves, layout = value
            return self.choose(halves, layout, node.args[1])
        if not isinstance(value, _Halves) or not self.gated:
            raise _NotPointwise
        if is_call(node, aten.split.Tensor, aten.split_with_sizes.default):
            return self.split(node, value)
        if is_call(node, aten.slice.Tensor):
            return self.slice(node, value)
        layout = {"half": "chunked", "parity": "interleaved"}.get(value.axis or "")
        dim = node.args[1] % len(sizes(node.args[0]))
        leading = len(self.rows)
        if layout is None or dim != (leading if value.axis == "half" else leading + 1):
            raise _NotPointwise
        if is_call(node, aten.unbind.int):
            return dataclasses.replace(value, axis=None), layout
        return self.choose(value, layout, node.args[2] % 2)

    def split(self, node: fx.Node, value: _Halves) -> Any:
        half = self.width // 2
        if value.axis is not None or node.args[1] not in (half, [half, half], (half, half)):
            raise _NotPointwise
        return value, "chunked"

    def slice(self, node: fx.Node, value: _Halves) -> torch.Tensor:
        _, dim, start, end, step = (*node.args, *(0, 0, None, 1)[len(node.args) - 1 :])
        half = self.width // 2
        if value.axis is not None or not last_dim(node.args[0], dim):
            raise _NotPointwise
        start = start or 0
        end = self.width if end is None else min(end, self.width)
        start, end = (index + self.width if index < 0 else index for index in (start, end))
        if step == 2 and start in (0, 1) and end >= self.width - 1 + start:
            return self.choose(value, "interleaved", start)
        if step == 1 and (start, end) in ((0, half), (half, self.width)):
            return self.choose(value, "chunked", 0 if start == 0 else 1)
        raise _NotPointwise

    def pointwise(self, node: fx.Node) -> Any:
        halves = [
            value
            for value in (self.values.get(a) for a in node.args if isinstance(a, fx.Node))
            if isinstance(value, _Halves)
        ]
        if not halves:
            return self.apply(node, None)
        if len({value.axis for value in halves}) > 1:
            raise _NotPointwise
        return dataclasses.replace(
            halves[0], first=self.apply(node, "first"), second=self.apply(node, "second")
        )

    def apply(self, node: fx.Node, side: str | None) -> Any:
        def operand(argument: Any) -> Any:
            if not isinstance(argument, fx.Node):
                return argument
            if argument in self.values:
                value = self.values[argument]
                if isinstance(value, _Halves):
                    return getattr(value, side) if side else value
                if side is not None:
                    raise _NotPointwise
                return value
            constant = number(argument)
            if constant is None:
                raise _NotPointwise
            return torch.tensor(float(constant), dtype=torch.float64)

        args = [operand(argument) for argument in node.args]
        kwargs = {key: operand(argument) for key, argument in node.kwargs.items()}
        for argument in (*node.args, *node.kwargs.values()):
            literal = number(argument)
            if literal is not None:
                self.literals.add(abs(float(literal)))
        result = node.target(*args, **kwargs)
        if not isinstance(result, torch.Tensor):
            raise _NotPointwise
        return result


@functools.cache
def probes() -> tuple[torch.Tensor, torch.Tensor]:
    """Gate and up values: both signs, magnitudes 1e-6 to 1e4, every pair of them, in fp64.

    The steps are irrational multiples, so that a breakpoint of the function never falls on all
    neighbouring points, and dense between 0.01 and 100, where activations differ.
    """
    magnitude = torch.cat(
        [
            torch.logspace(-6, 4, 23, dtype=torch.float64),
            torch.logspace(-2, 2, 60, dtype=torch.float64) * 1.0123456789,
        ]
    )
    line = torch.cat([-magnitude, torch.zeros(1, dtype=torch.float64), magnitude])
    gate, up = torch.meshgrid(line, line * 0.98765432109, indexing="ij")
    return gate.reshape(-1), up.reshape(-1)


_FUNCTIONS = {
    "silu": torch.nn.functional.silu,
    "gelu": torch.nn.functional.gelu,
    "gelu_tanh": functools.partial(torch.nn.functional.gelu, approximate="tanh"),
    "relu": torch.relu,
    "relu2": lambda x: torch.relu(x).square(),
}


def _identify(value: torch.Tensor, reading: _Reading) -> Activation | None:
    gate, up = probes()
    if value.shape != gate.shape or value.dtype != torch.float64:
        return None
    layout = (reading.layout or "none") if reading.gated else "none"
    if reading.gated and layout == "none":
        return None
    literals = sorted(reading.literals)
    limits = [None, *(x for x in literals if x > 0)]
    offsets = [0.0, *(x for x in literals if x != 0)] if reading.gated else [0.0]
    for name, limit, offset in itertools.product(_FUNCTIONS, limits, offsets):
        alphas = [1.0, *(x for x in literals if x not in (0.0, 1.0))] if name == "silu" else [1.0]
        for alpha in alphas:
            candidate = Activation(name, layout, alpha, offset, limit)
            if _equal(value, _compute(candidate, gate, up), gate, up):
                return candidate
    return None


def equal_on_probes(value: torch.Tensor, activation: Activation) -> bool:
    """Whether `value` is what a (gated) activation is on the probes; its layout has no part."""
    gate, up = probes()
    if value.shape != gate.shape or value.dtype != torch.float64:
        return False
    with real_tensors():
        return _equal(value, _compute(activation, gate, up), gate, up)


def _compute(candidate: Activation, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    if candidate.limit is not None:
        gate = gate.clamp(max=candidate.limit)
        up = up.clamp(-candidate.limit, candidate.limit)
    if candidate.activation == "silu":
        activated = gate * torch.sigmoid(candidate.alpha * gate)
    else:
        activated = _FUNCTIONS[candidate.activation](gate)
    return activated if candidate.gate == "none" else activated * (up + candidate.up_offset)


def _equal(left: torch.Tensor, right: torch.Tensor, gate: torch.Tensor, up: torch.Tensor) -> bool:
    """Equal up to fp64 rounding; the absolute term covers cancellation in tails, as 1 + erf(x)."""
    slack = 1e-9 * right.abs() + 1e-14 * (1 + gate.abs()) * (1 + up.abs())
    return bool(((left - right).abs() <= slack).all())
