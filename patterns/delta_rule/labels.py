"""Running part of a graph in fp64 at sizes other than its own.

Every dim carries a label: None for a dim along which the values do not change (size 1 here), or
factors, each an int of full size or the name of a batch-like dim that is run at another size.
No op may look inside a named dim: one that reduces, slices or orders it is refused. What holds
at one size of the named dims then holds at every size, symbolic ones included.
"""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from inductor_moe.patterns.evaluate import CannotEvaluate
from inductor_moe.patterns.moe.activation import POINTWISE
from inductor_moe.patterns.walk import CASTS, COPIES, SHAPES, aten, is_call, prims, same, sizes

Label = tuple[Any, ...] | None

ELEMENTWISE = POINTWISE | {
    aten.bitwise_and.Tensor,
    aten.bitwise_not.default,
    aten.bitwise_or.Tensor,
    aten.eq.Scalar,
    aten.eq.Tensor,
    aten.logical_and.default,
    aten.logical_not.default,
    aten.logical_or.default,
    aten.masked_fill.Scalar,
    aten.masked_fill.Tensor,
    aten.ne.Scalar,
    aten.ne.Tensor,
    aten.pow.Tensor_Tensor,
    aten.exp2.default,
}
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclasses.dataclass(frozen=True)
class Labelled:
    """A tensor at the sizes it is run at, and one label a dim."""

    tensor: torch.Tensor
    labels: tuple[Label, ...]


class Runner:
    """Runs nodes whose inputs are given.

    given  values of the leaves
    named  the graph's size of each named dim
    run    the size at which each named dim is run
    """

    def __init__(
        self, given: Mapping[fx.Node, Labelled], named: Mapping[str, Any], run: Mapping[str, int]
    ) -> None:
        self.values: dict[fx.Node, Labelled] = dict(given)
        self.named, self.run = named, run

    def compute(self, node: fx.Node) -> None:
        """Run one node whose inputs have been run. Raises CannotEvaluate."""
        if node.op != "call_function":
            raise CannotEvaluate(f"{node.name} is no call")
        try:
            self.values[node] = self._compute(node)
        except (RuntimeError, IndexError, TypeError, ValueError) as error:
            raise CannotEvaluate(f"{node.name}: {error}") from error

    def _compute(self, node: fx.Node) -> Labelled:
        target: Any = node.target
        if target in ELEMENTWISE:
            return self._elementwise(node)
        if target in CASTS:
            return self._cast(node)
        if target in COPIES:
            return self.value(node.args[0])
        if target in SHAPES:
            return self.reshape(self.value(node.args[0]), sizes(node.args[0]), sizes(node))
        rule = RULES.get(target)
        if rule is None:
            raise CannotEvaluate(f"{node.name} calls {target}")
        return rule(self, node)

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

    def _elementwise(self, node: fx.Node) -> Labelled:
        if node.kwargs.get("alpha", 1) != 1 or node.kwargs.get("rounding_mode"):
            raise CannotEvaluate(f"{node.name} has {dict(node.kwargs)}")
        operands = [a for a in node.args if isinstance(a, fx.Node)]
        labels: tuple[Label, ...] = ()
        for operand in operands:
            labels = _merged(labels, self.value(operand).labels)
        args = [self.values[a].tensor if isinstance(a, fx.Node) else a for a in node.args]
        kwargs = {k: v for k, v in node.kwargs.items() if k not in ("dtype", "alpha")}
        target: Any = node.target
        return Labelled(target(*args, **kwargs), labels)

    def _cast(self, node: fx.Node) -> Labelled:
        x, to = self.value(node.args[0]), node.meta["val"].dtype
        if to in FLOATS:
            return Labelled(x.tensor.double(), x.labels)
        if x.tensor.dtype.is_floating_point:
            raise CannotEvaluate(f"{node.name} casts to {to}")
        return Labelled(x.tensor.to(to), x.labels)

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
            label = None if constant or not taken else _joined(taken)
            labels.append(label)
            parts.append(self.size(label))
        if atoms:
            raise CannotEvaluate(f"a view of {list(old)} as {list(new)}")
        return Labelled(x.tensor.reshape(parts), tuple(labels))


def _joined(factors: Sequence[Any]) -> tuple[Any, ...]:
    joined: list[Any] = []
    for factor in factors:
        if joined and isinstance(joined[-1], int) and isinstance(factor, int):
            joined[-1] *= factor
        else:
            joined.append(factor)
    return tuple(joined)


def _merged(left: Sequence[Label], right: Sequence[Label]) -> tuple[Label, ...]:
    rank = max(len(left), len(right))
    left = (None,) * (rank - len(left)) + tuple(left)
    right = (None,) * (rank - len(right)) + tuple(right)
    merged = []
    for one, other in zip(left, right, strict=True):
        if None not in (one, other) and one != other:
            raise CannotEvaluate(f"dims {one} and {other} meet")
        merged.append(one if other is None else other)
    return tuple(merged)


def _whole(label: Label) -> bool:
    return label is None or all(isinstance(f, int) for f in label)


def _dim(node: fx.Node, dim: int) -> int:
    return dim % len(sizes(node))


def _argument(node: fx.Node, position: int, name: str, default: Any) -> Any:
    if len(node.args) > position:
        return node.args[position]
    return node.kwargs.get(name, default)


def _permute(run: Runner, node: fx.Node) -> Labelled:
    x, dims = run.value(node.args[0]), node.args[1]
    dims = [_dim(node.args[0], d) for d in dims]
    return Labelled(x.tensor.permute(dims), tuple(x.labels[d] for d in dims))


def _expand(run: Runner, node: fx.Node) -> Labelled:
    x = run.value(node.args[0])
    extra = len(sizes(node)) - len(x.labels)
    return Labelled(x.tensor[(None,) * extra], (None,) * extra + x.labels)


def _sum(run: Runner, node: fx.Node) -> Labelled:
    x, source = run.value(node.args[0]), node.args[0]
    dims = [_dim(source, d) for d in (node.args[1] or range(len(x.labels)))]
    for dim in dims:
        if not _whole(x.labels[dim]):
            raise CannotEvaluate(f"{node.name} sums a batch-like dim")
        x = run.solid(x, dim, sizes(source)[dim])
    keep = bool(_argument(node, 2, "keepdim", False))
    labels = [None if d in dims else label for d, label in enumerate(x.labels)]
    if not keep:
        labels = [label for d, label in enumerate(labels) if d not in dims]
    return Labelled(x.tensor.sum(dims, keepdim=keep), tuple(labels))


def _ordered(run: Runner, node: fx.Node, dim: int) -> Labelled:
    """The first input with the values along a dim written out; a named dim is refused."""
    x = run.value(node.args[0])
    if not _whole(x.labels[dim]):
        raise CannotEvaluate(f"{node.name} looks inside a batch-like dim")
    return run.solid(x, dim, sizes(node.args[0])[dim])


def _cumsum(run: Runner, node: fx.Node) -> Labelled:
    dim = _dim(node.args[0], node.args[1])
    x = _ordered(run, node, dim)
    return Labelled(x.tensor.cumsum(dim), x.labels)


def _flip(run: Runner, node: fx.Node) -> Labelled:
    dims = [_dim(node.args[0], d) for d in node.args[1]]
    for dim in dims:
        _ordered(run, node, dim)
    x = run.value(node.args[0])
    return Labelled(x.tensor.flip(dims), x.labels)


def _select(run: Runner, node: fx.Node) -> Labelled:
    dim = _dim(node.args[0], node.args[1])
    x = _ordered(run, node, dim)
    return Labelled(x.tensor.select(dim, node.args[2]), x.labels[:dim] + x.labels[dim + 1 :])


def _pieces(run: Runner, node: fx.Node) -> Labelled:
    """unbind and split: the whole; the piece is taken by the getitem that follows."""
    return run.value(node.args[0])


def _piece(run: Runner, node: fx.Node) -> Labelled:
    pieces, index = node.args
    if pieces.target not in PIECES:
        raise CannotEvaluate(f"{node.name} is a part of {pieces.name}")
    source = pieces.args[0]
    unbound = pieces.target is aten.unbind.int
    dim = _dim(source, _argument(pieces, 1 if unbound else 2, "dim", 0))
    x = run.value(pieces)
    if not _whole(x.labels[dim]):
        raise CannotEvaluate(f"{node.name} looks inside a batch-like dim")
    x = run.solid(x, dim, sizes(source)[dim])
    if unbound:
        return Labelled(x.tensor.select(dim, index), x.labels[:dim] + x.labels[dim + 1 :])
    out = x.tensor.split(pieces.args[1], dim)[index]
    return Labelled(out, _relabelled(x.labels, dim, out.shape[dim]))


def _relabelled(labels: Sequence[Label], dim: int, size: int) -> tuple[Label, ...]:
    return (*labels[:dim], None if size == 1 else (size,), *labels[dim + 1 :])


def _slice(run: Runner, node: fx.Node) -> Labelled:
    dim = _dim(node.args[0], _argument(node, 1, "dim", 0))
    if same(sizes(node)[dim], sizes(node.args[0])[dim]):
        if _argument(node, 4, "step", 1) != 1:
            raise CannotEvaluate(f"{node.name} has a step")
        return run.value(node.args[0])
    x = _ordered(run, node, dim)
    start, end, step = (_argument(node, i, "", v) for i, v in ((2, 0), (3, None), (4, 1)))
    out = x.tensor[(slice(None),) * dim + (slice(start, end, step),)]
    return Labelled(out, _relabelled(x.labels, dim, out.shape[dim]))


def _cat(run: Runner, node: fx.Node) -> Labelled:
    parts, dim = node.args[0], _dim(node, _argument(node, 1, "dim", 0))
    values = [run.value(part) for part in parts]
    labels: tuple[Label, ...] = (None,) * len(sizes(node))
    for value in values:
        labels = _merged(labels, (*value.labels[:dim], None, *value.labels[dim + 1 :]))
    joined = {value.labels[dim] for value in values}
    if all(map(_whole, joined)):
        lengths = [sizes(part)[dim] for part in parts]
        if not all(isinstance(length, int) for length in lengths):
            raise CannotEvaluate(f"{node.name} joins dims of symbolic size")
    elif len(joined) == 1:  # a stack whose new dim is merged with the next
        label = next(iter(joined))
        lengths = [run.size(label)] * len(parts)
        label = _joined((len(parts), *(label or ())))
    else:
        raise CannotEvaluate(f"{node.name} joins a batch-like dim")
    pieces = [
        value.tensor.expand(
            *(run.size(other) if d != dim else length for d, other in enumerate(labels))
        )
        for length, value in zip(lengths, values, strict=True)
    ]
    out = torch.cat(pieces, dim)
    if all(map(_whole, joined)):
        return Labelled(out, _relabelled(labels, dim, out.shape[dim]))
    return Labelled(out, (*labels[:dim], label, *labels[dim + 1 :]))


def _scatter(run: Runner, node: fx.Node) -> Labelled:
    """select_scatter and slice_scatter."""
    source = run.value(node.args[1])
    dim = _dim(node.args[0], _argument(node, 2, "dim", 0))
    into = _ordered(run, node, dim)
    selected = is_call(node, aten.select_scatter.default)
    rest = source.labels if selected else (*source.labels[:dim], *source.labels[dim + 1 :])
    if not selected and not _whole(source.labels[dim]):
        raise CannotEvaluate(f"{node.name} writes a batch-like dim")
    rest = _merged(rest, (*into.labels[:dim], *into.labels[dim + 1 :]))
    labels = (*rest[:dim], into.labels[dim], *rest[dim:])
    out = run.full(into, labels).clone()
    if selected:
        out.select(dim, node.args[3]).copy_(source.tensor)
    else:
        start, end, step = (_argument(node, i, "", v) for i, v in ((3, 0), (4, None), (5, 1)))
        out[(slice(None),) * dim + (slice(start, end, step),)] = source.tensor
    return Labelled(out, labels)


def _copy(run: Runner, node: fx.Node) -> Labelled:
    source = run.value(node.args[1])
    extra = len(sizes(node)) - len(source.labels)
    return Labelled(source.tensor[(None,) * extra], (None,) * extra + source.labels)


def _pad(run: Runner, node: fx.Node) -> Labelled:
    x, pads = run.value(node.args[0]), list(node.args[1])
    rank = len(x.labels)
    for i in range(0, len(pads), 2):
        dim = rank - 1 - i // 2
        if pads[i] or pads[i + 1]:
            if not _whole(x.labels[dim]):
                raise CannotEvaluate(f"{node.name} pads a batch-like dim")
            x = run.solid(x, dim, sizes(node.args[0])[dim])
    out = torch.nn.functional.pad(x.tensor, pads, value=_argument(node, 2, "value", 0.0))
    labels = x.labels
    for i in range(0, len(pads), 2):
        dim = rank - 1 - i // 2
        if pads[i] or pads[i + 1]:
            labels = _relabelled(labels, dim, out.shape[dim])
    return Labelled(out, labels)


def _matmul(run: Runner, node: fx.Node) -> Labelled:
    left, right = (run.value(a) for a in node.args[:2])
    inner = sizes(node.args[0])[-1]
    if not _whole(left.labels[-1]) or not _whole(right.labels[-2]):
        raise CannotEvaluate(f"{node.name} sums a batch-like dim")
    left = run.solid(left, len(left.labels) - 1, inner)
    right = run.solid(right, len(right.labels) - 2, inner)
    if left.labels[-1] != right.labels[-2]:
        raise CannotEvaluate(f"{node.name} sums dims that do not agree")
    batch = _merged(left.labels[:-2], right.labels[:-2])
    out = torch.matmul(left.tensor, right.tensor)
    return Labelled(out, (*batch, left.labels[-2], right.labels[-1]))


def _solve(run: Runner, node: fx.Node) -> Labelled:
    a, b = (run.value(x) for x in node.args[:2])
    options = dict(node.kwargs)
    size = sizes(node.args[0])[-1]
    for dim in (-2, -1):
        if a.labels[dim] not in ((size,), None) or not isinstance(size, int):
            raise CannotEvaluate(f"{node.name} solves over a batch-like dim")
    for dim in (len(a.labels) - 2, len(a.labels) - 1):
        a = run.solid(a, dim, size)
    solved = len(b.labels) - (2 if options.get("left", True) else 1)
    if not _whole(b.labels[solved]):
        raise CannotEvaluate(f"{node.name} solves over a batch-like dim")
    b = run.solid(b, solved, sizes(node.args[1])[solved])
    batch = _merged(a.labels[:-2], b.labels[:-2])
    out = torch.linalg.solve_triangular(a.tensor, b.tensor, **options)
    return Labelled(out, (*batch, *b.labels[-2:]))


def _full(run: Runner, node: fx.Node) -> Labelled:
    value = node.args[1] if is_call(node, aten.full.default) else node.args[0]
    rank = len(sizes(node))
    kind = node.meta["val"].dtype
    filled = torch.full((1,) * rank, value, dtype=torch.float64 if kind in FLOATS else kind)
    return Labelled(filled, (None,) * rank)


def _iota(run: Runner, node: fx.Node) -> Labelled:
    length = node.args[0]
    if not isinstance(length, int):
        raise CannotEvaluate(f"{node.name} counts to {length}")
    first, step = node.kwargs["start"], node.kwargs["step"]
    out = first + step * torch.arange(length, dtype=torch.int64)
    return Labelled(out, (None if length == 1 else (length,),))


PIECES = {aten.unbind.int, aten.split.Tensor}
RULES: dict[Any, Callable[[Runner, fx.Node], Labelled]] = {
    aten.permute.default: _permute,
    aten.expand.default: _expand,
    aten.sum.dim_IntList: _sum,
    aten.cumsum.default: _cumsum,
    aten.flip.default: _flip,
    aten.select.int: _select,
    aten.slice.Tensor: _slice,
    aten.unbind.int: _pieces,
    aten.split.Tensor: _pieces,
    operator.getitem: _piece,
    aten.cat.default: _cat,
    aten.select_scatter.default: _scatter,
    aten.slice_scatter.default: _scatter,
    aten.copy.default: _copy,
    aten.constant_pad_nd.default: _pad,
    aten.bmm.default: _matmul,
    aten.mm.default: _matmul,
    aten.linalg_solve_triangular.default: _solve,
    aten.full.default: _full,
    aten.scalar_tensor.default: _full,
    prims.iota.default: _iota,
}
