"""Running part of a graph in fp64 at sizes other than its own.

Every dim carries a label: None for a dim along which the values do not change (size 1 here), or
factors, each an int of full size or the name of a batch-like dim that is run at another size.
No op may look inside a named dim: one that reduces, slices or orders it is refused. What holds
at one size of the named dims then holds at every size, symbolic ones included.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx

from inductor_moe.patterns.evaluate import CannotEvaluate
from inductor_moe.patterns.walk import same

Label = tuple[Any, ...] | None

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclasses.dataclass(frozen=True)
class Labelled:
    """A tensor at the sizes it is run at, and one label a dim."""

    tensor: torch.Tensor
    labels: tuple[Label, ...]


class Values:
    """Values of nodes and the sizes at which they are run.

    given  values of the leaves
    named  the graph's size of each named dim
    run    the size at which each named dim is run
    """

    def __init__(
        self, given: Mapping[fx.Node, Labelled], named: Mapping[str, Any], run: Mapping[str, int]
    ) -> None:
        self.values: dict[fx.Node, Labelled] = dict(given)
        self.named, self.run = named, run

    def value(self, argument: Any) -> Labelled:
        """The value of an argument, numbers included."""
        if isinstance(argument, fx.Node):
            return self.values[argument]
        dtype = torch.bool if isinstance(argument, bool) else torch.float64
        return Labelled(torch.tensor(argument, dtype=dtype), ())

    def size(self, label: Label) -> int:
        """The size at which a dim is run."""
        return math.prod(f if isinstance(f, int) else self.run[f] for f in label or ())

    def full(self, x: Labelled, labels: Sequence[Label]) -> torch.Tensor:
        """The tensor with every dim at its size in `labels`."""
        return x.tensor.expand([self.size(label) for label in labels])

    def solid(self, x: Labelled, dim: int, actual: Any) -> Labelled:
        """x with the values along a dim written out, so that they may differ."""
        if x.labels[dim] is not None or same(actual, 1):
            return x
        if not isinstance(actual, int):
            raise CannotEvaluate(f"a dim of size {actual} is needed as a whole")
        labels = list(x.labels)
        labels[dim] = (actual,)
        return Labelled(self.full(x, labels), tuple(labels))

    def reshape(self, x: Labelled, old: Sequence[Any], new: Sequence[Any]) -> Labelled:
        """View with the graph's sizes `old` as `new`."""
        atoms: list[tuple[Any, Any]] = []  # (factor or None, the graph's size)
        for label, actual in zip(x.labels, old, strict=True):
            if label is None:
                if not same(actual, 1):
                    atoms.append((None, actual))
            else:
                atoms.extend((f, f if isinstance(f, int) else self.named[f]) for f in label)
        atoms.reverse()
        parts: list[int] = []
        labels: list[Label] = []
        for wanted in new:
            taken: list[Any] = []
            product: Any = 1
            while not same(product, wanted):
                if not atoms:
                    raise CannotEvaluate(f"a view of {list(old)} as {list(new)}")
                factor, actual = atoms.pop()
                if isinstance(wanted, int) and isinstance(actual, int):
                    rest = wanted // product if isinstance(product, int) else 0
                    if rest and wanted % product == 0 and actual > rest:
                        if isinstance(factor, str) or actual % rest:
                            raise CannotEvaluate(f"a view of {list(old)} as {list(new)}")
                        atoms.append((factor and actual // rest, actual // rest))
                        factor, actual = factor and rest, rest
                taken.append(factor)
                product = product * actual
            constant = [f for f in taken if f is None]
            if constant and len(constant) != len(taken):
                raise CannotEvaluate("a view merges an expanded dim")
            label = None if constant or not taken else join_factors(taken)
            labels.append(label)
            parts.append(self.size(label))
        if atoms:
            raise CannotEvaluate(f"a view of {list(old)} as {list(new)}")
        return Labelled(x.tensor.reshape(parts), tuple(labels))


def join_factors(factors: Sequence[Any]) -> tuple[Any, ...]:
    """A label of these factors in a row; neighbours of full size become one."""
    joined: list[Any] = []
    for factor in factors:
        if joined and isinstance(joined[-1], int) and isinstance(factor, int):
            joined[-1] *= factor
        else:
            joined.append(factor)
    return tuple(joined)


def merge_labels(left: Sequence[Label], right: Sequence[Label]) -> tuple[Label, ...]:
    """The labels of an elementwise op of two tensors, broadcast from the right."""
    rank = max(len(left), len(right))
    left = (None,) * (rank - len(left)) + tuple(left)
    right = (None,) * (rank - len(right)) + tuple(right)
    merged = []
    for one, other in zip(left, right, strict=True):
        if None not in (one, other) and one != other:
            raise CannotEvaluate(f"dims {one} and {other} meet")
        merged.append(one if other is None else other)
    return tuple(merged)


def is_whole(label: Label) -> bool:
    """Whether a dim is run at its full size, so that an op may look inside."""
    return label is None or all(isinstance(f, int) for f in label)
