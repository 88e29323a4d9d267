"""One thing to time: a layer's own code, inputs, and what it must compute."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from inductor_moe.compat import tree_leaves


@dataclass(frozen=True)
class Case:
    """A call at one size.

    op        a name in `run.OPS`
    model     a name in `shapes.MODELS`
    size      what varies: {"tokens": M} or {"batch": B}
    call      the unmodified code; takes one entry of `inputs`
    inputs    enough independent ones that they do not all fit in the GPU's cache
    expected  takes an entry of `inputs`; the outputs, and what the call leaves in its inputs, in
              float64, as `outcome` gives them
    rows      how many leading rows of dim 0 of every output `expected` covers; None for all
    bytes     that a call has to move, weights, inputs, states and outputs, each once
    flops     that a call has to do
    pieces    the same as call a piece at a time, where whole it would not fit the GPU's memory
    peers     provider -> a callable of its own for the same inputs and outputs
    absent    provider -> why it is not asked
    """

    op: str
    model: str
    size: dict[str, int]
    call: Callable[..., Any]
    inputs: list[tuple[Any, ...]]
    expected: Callable[[tuple[Any, ...]], list[Tensor]]
    bytes: float
    flops: float
    rows: int | None = None
    pieces: Callable[..., Any] | None = None
    peers: dict[str, Callable[[], Callable[..., Any]]] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)

    def label(self) -> str:
        return " ".join(f"{name[0].upper()}={value}" for name, value in self.size.items())


@dataclass(frozen=True)
class Op:
    """A kind of case. `sizes`: what it is timed at; `cases(model, device, sizes)` yields them."""

    name: str
    dimension: str
    sizes: tuple[int, ...]
    cases: Callable[[str, str, list[int]], Iterator[Case]]


def outcome(
    call: Callable[..., Any], arguments: tuple[Any, ...], rows: int | None
) -> list[Tensor]:
    """The outputs of a call on a copy of the arguments, then the tensors it may have written.

    Only a plain tensor argument stays out: the layers timed here write to caches alone.
    """
    given = copy.deepcopy(arguments)
    outputs = [leaf for leaf in tree_leaves(call(*given)) if isinstance(leaf, Tensor)]
    outputs = [leaf if rows is None else leaf[:rows] for leaf in outputs]
    written = [t for argument in given for t in states_of(argument)]
    return [tensor.clone() for tensor in (*outputs, *written)]


def states_of(argument: Any) -> list[Tensor]:
    """The convolution and recurrent states that a cache of transformers holds."""
    layers = getattr(argument, "layers", ())
    return [
        state
        for layer in layers
        for state in (*layer.conv_states.values(), *layer.recurrent_states.values())
    ]


def relative_error(found: list[Tensor], expected: list[Tensor]) -> float:
    """The largest relative error of any tensor in the L2 norm; NaN and infinity stay."""
    errors = [
        float((a.double() - b).norm() / b.norm().clamp_min(1e-30))
        for a, b in zip(found, expected, strict=True)
    ]
    return max(errors, key=lambda e: (e != e, e))


def draws(bytes_per_call: float, device: str) -> int:
    """How many inputs or weights to rotate: 256 MB or more in all, at least two."""
    return 2 if device == "cpu" else int(min(24, max(2, 256e6 // bytes_per_call)))


def randn(*shape: int, device: str, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(shape, device=device).to(dtype)
