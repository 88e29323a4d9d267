"""How each op that moves, joins, sums or multiplies values is run on labelled values."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from inductor_moe.patterns.delta_rule.labels import (
    FLOATS,
    Label,
    Labelled,
    Values,
    is_whole,
    join_factors,
    merge_labels,
)
from inductor_moe.patterns.evaluate import CannotEvaluate
from inductor_moe.patterns.walk import aten, is_call, prims, same, sizes


def _dim(node: fx.Node, dim: int) -> int:
    return dim % len(sizes(node))


def _argument(node: fx.Node, position: int, name: str, default: Any) -> Any:
    if len(node.args) > position:
        return node.args[position]
    return node.kwargs.get(name, default)


def _permute(run: Values, node: fx.Node) -> Labelled:
    x, dims = run.value(node.args[0]), node.args[1]
    dims = [_dim(node.args[0], d) for d in dims]
    return Labelled(x.tensor.permute(dims), tuple(x.labels[d] for d in dims))


def _expand(run: Values, node: fx.Node) -> Labelled:
    x = run.value(node.args[0])
    extra = len(sizes(node)) - len(x.labels)
    return Labelled(x.tensor[(None,) * extra], (None,) * extra + x.labels)


def _sum(run: Values, node: fx.Node) -> Labelled:
    x, source = run.value(node.args[0]), node.args[0]
    dims = [_dim(source, d) for d in (node.args[1] or range(len(x.labels)))]
    for dim in dims:
        if not is_whole(x.labels[dim]):
            raise CannotEvaluate(f"{node.name} sums a batch-like dim")
        x = run.solid(x, dim, sizes(source)[dim])
    keep = bool(_argument(node, 2, "keepdim", False))
    labels = [None if d in dims else label for d, label in enumerate(x.labels)]
    if not keep:
        labels = [label for d, label in enumerate(labels) if d not in dims]
    return Labelled(x.tensor.sum(dims, keepdim=keep), tuple(labels))


def _ordered(run: Values, node: fx.Node, dim: int) -> Labelled:
    """The first input with the values along a dim written out; a named dim is refused."""
    x = run.value(node.args[0])
    if not is_whole(x.labels[dim]):
        raise CannotEvaluate(f"{node.name} looks inside a batch-like dim")
    return run.solid(x, dim, sizes(node.args[0])[dim])


def _cumsum(run: Values, node: fx.Node) -> Labelled:
    dim = _dim(node.args[0], node.args[1])
    x = _ordered(run, node, dim)
    return Labelled(x.tensor.cumsum(dim), x.labels)


def _flip(run: Values, node: fx.Node) -> Labelled:
    dims = [_dim(node.args[0], d) for d in node.args[1]]
    for dim in dims:
        _ordered(run, node, dim)
    x = run.value(node.args[0])
    return Labelled(x.tensor.flip(dims), x.labels)


def _select(run: Values, node: fx.Node) -> Labelled:
    dim = _dim(node.args[0], node.args[1])
    x = _ordered(run, node, dim)
    return Labelled(x.tensor.select(dim, node.args[2]), x.labels[:dim] + x.labels[dim + 1 :])


def _pieces(run: Values, node: fx.Node) -> Labelled:
    """unbind and split: the whole; the piece is taken by the getitem that follows."""
    return run.value(node.args[0])


def _piece(run: Values, node: fx.Node) -> Labelled:
    pieces, index = node.args
    if pieces.target not in PIECES:
        raise CannotEvaluate(f"{node.name} is a part of {pieces.name}")
    source = pieces.args[0]
    unbound = pieces.target is aten.unbind.int
    dim = _dim(source, _argument(pieces, 1 if unbound else 2, "dim", 0))
    x = run.value(pieces)
    if not is_whole(x.labels[dim]):
        raise CannotEvaluate(f"{node.name} looks inside a batch-like dim")
    x = run.solid(x, dim, sizes(source)[dim])
    if unbound:
        return Labelled(x.tensor.select(dim, index), x.labels[:dim] + x.labels[dim + 1 :])
    out = x.tensor.split(pieces.args[1], dim)[index]
    return Labelled(out, _relabelled(x.labels, dim, out.shape[dim]))


def _relabelled(labels: Sequence[Label], dim: int, size: int) -> tuple[Label, ...]:
    return (*labels[:dim], None if size == 1 else (size,), *labels[dim + 1 :])


def _slice(run: Values, node: fx.Node) -> Labelled:
    dim = _dim(node.args[0], _argument(node, 1, "dim", 0))
    if same(sizes(node)[dim], sizes(node.args[0])[dim]):
        if _argument(node, 4, "step", 1) != 1:
            raise CannotEvaluate(f"{node.name} has a step")
        return run.value(node.args[0])
    x = _ordered(run, node, dim)
    start, end, step = (_argument(node, i, "", v) for i, v in ((2, 0), (3, None), (4, 1)))
    out = x.tensor[(slice(None),) * dim + (slice(start, end, step),)]
    return Labelled(out, _relabelled(x.labels, dim, out.shape[dim]))


def _cat(run: Values, node: fx.Node) -> Labelled:
    parts, dim = node.args[0], _dim(node, _argument(node, 1, "dim", 0))
    values = [run.value(part) for part in parts]
    labels: tuple[Label, ...] = (None,) * len(sizes(node))
    for value in values:
        labels = merge_labels(labels, (*value.labels[:dim], None, *value.labels[dim + 1 :]))
    along = {value.labels[dim] for value in values}
    if all(map(is_whole, along)):
        lengths = [sizes(part)[dim] for part in parts]
        if not all(isinstance(length, int) for length in lengths):
            raise CannotEvaluate(f"{node.name} joins dims of symbolic size")
    elif len(along) == 1:  # a stack whose new dim is merged with the next
        label = next(iter(along))
        lengths = [run.size(label)] * len(parts)
        label = join_factors((len(parts), *(label or ())))
    else:
        raise CannotEvaluate(f"{node.name} joins a batch-like dim")
    pieces = [
        value.tensor.expand(
            *(run.size(other) if d != dim else length for d, other in enumerate(labels))
        )
        for length, value in zip(lengths, values, strict=True)
    ]
    out = torch.cat(pieces, dim)
    if all(map(is_whole, along)):
        return Labelled(out, _relabelled(labels, dim, out.shape[dim]))
    return Labelled(out, (*labels[:dim], label, *labels[dim + 1 :]))


def _scatter(run: Values, node: fx.Node) -> Labelled:
    """select_scatter and slice_scatter."""
    source = run.value(node.args[1])
    dim = _dim(node.args[0], _argument(node, 2, "dim", 0))
    into = _ordered(run, node, dim)
    selected = is_call(node, aten.select_scatter.default)
    rest = source.labels if selected else (*source.labels[:dim], *source.labels[dim + 1 :])
    if not selected and not is_whole(source.labels[dim]):
        raise CannotEvaluate(f"{node.name} writes a batch-like dim")
    rest = merge_labels(rest, (*into.labels[:dim], *into.labels[dim + 1 :]))
    labels = (*rest[:dim], into.labels[dim], *rest[dim:])
    out = run.full(into, labels).clone()
    if selected:
        out.select(dim, node.args[3]).copy_(source.tensor)
    else:
        start, end, step = (_argument(node, i, "", v) for i, v in ((3, 0), (4, None), (5, 1)))
        out[(slice(None),) * dim + (slice(start, end, step),)] = source.tensor
    return Labelled(out, labels)


def _copy(run: Values, node: fx.Node) -> Labelled:
    source = run.value(node.args[1])
    extra = len(sizes(node)) - len(source.labels)
    return Labelled(source.tensor[(None,) * extra], (None,) * extra + source.labels)


def _pad(run: Values, node: fx.Node) -> Labelled:
    x, pads = run.value(node.args[0]), list(node.args[1])
    rank = len(x.labels)
    for i in range(0, len(pads), 2):
        dim = rank - 1 - i // 2
        if pads[i] or pads[i + 1]:
            if not is_whole(x.labels[dim]):
                raise CannotEvaluate(f"{node.name} pads a batch-like dim")
            x = run.solid(x, dim, sizes(node.args[0])[dim])
    out = torch.nn.functional.pad(x.tensor, pads, value=_argument(node, 2, "value", 0.0))
    labels = x.labels
    for i in range(0, len(pads), 2):
        dim = rank - 1 - i // 2
        if pads[i] or pads[i + 1]:
            labels = _relabelled(labels, dim, out.shape[dim])
    return Labelled(out, labels)


def _matmul(run: Values, node: fx.Node) -> Labelled:
    left, right = (run.value(a) for a in node.args[:2])
    inner = sizes(node.args[0])[-1]
    if not is_whole(left.labels[-1]) or not is_whole(right.labels[-2]):
        raise CannotEvaluate(f"{node.name} sums a batch-like dim")
    left = run.solid(left, len(left.labels) - 1, inner)
    right = run.solid(right, len(right.labels) - 2, inner)
    if left.labels[-1] != right.labels[-2]:
        raise CannotEvaluate(f"{node.name} sums dims that do not agree")
    batch = merge_labels(left.labels[:-2], right.labels[:-2])
    out = torch.matmul(left.tensor, right.tensor)
    return Labelled(out, (*batch, left.labels[-2], right.labels[-1]))


def _solve(run: Values, node: fx.Node) -> Labelled:
    a, b = (run.value(x) for x in node.args[:2])
    options = dict(node.kwargs)
    size = sizes(node.args[0])[-1]
    for dim in (-2, -1):
        if a.labels[dim] not in ((size,), None) or not isinstance(size, int):
            raise CannotEvaluate(f"{node.name} solves over a batch-like dim")
    for dim in (len(a.labels) - 2, len(a.labels) - 1):
        a = run.solid(a, dim, size)
    solved = len(b.labels) - (2 if options.get("left", True) else 1)
    if not is_whole(b.labels[solved]):
        raise CannotEvaluate(f"{node.name} solves over a batch-like dim")
    b = run.solid(b, solved, sizes(node.args[1])[solved])
    batch = merge_labels(a.labels[:-2], b.labels[:-2])
    out = torch.linalg.solve_triangular(a.tensor, b.tensor, **options)
    return Labelled(out, (*batch, *b.labels[-2:]))


def _full(run: Values, node: fx.Node) -> Labelled:
    value = node.args[1] if is_call(node, aten.full.default) else node.args[0]
    rank = len(sizes(node))
    kind = node.meta["val"].dtype
    filled = torch.full((1,) * rank, value, dtype=torch.float64 if kind in FLOATS else kind)
    return Labelled(filled, (None,) * rank)


def _iota(run: Values, node: fx.Node) -> Labelled:
    length = node.args[0]
    if not isinstance(length, int):
        raise CannotEvaluate(f"{node.name} counts to {length}")
    first, step = node.kwargs["start"], node.kwargs["step"]
    out = first + step * torch.arange(length, dtype=torch.int64)
    return Labelled(out, (None if length == 1 else (length,),))


PIECES = {aten.unbind.int, aten.split.Tensor}
RULES: dict[Any, Callable[[Values, fx.Node], Labelled]] = {
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
