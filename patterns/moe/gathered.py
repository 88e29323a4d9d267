"""Experts as einsums over gathered weights: W[ids] is [T, K, out, in], tokens are not repeated.

The einsums arrive as batched matmuls between views and permutations, differently for every
spelling and size. Axes are followed through them by name.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from torch import fx

from inductor_moe.patterns.moe.activation import name_activation
from inductor_moe.patterns.moe.axes import Dims, moved, moves, named, names_of, source_of
from inductor_moe.patterns.moe.region import Combine, region_between, sole_user
from inductor_moe.patterns.moe.rows import non_negative, pair_column
from inductor_moe.patterns.moe.site import ExpertsSite, Projection, replace_experts
from inductor_moe.patterns.rewrite import Refusal, Rewrite
from inductor_moe.patterns.walk import (
    aten,
    dtype,
    gather,
    is_call,
    is_float_cast,
    is_transparent,
    peel,
    same,
    same_sizes,
    sizes,
)


@dataclasses.dataclass(frozen=True)
class _Product:
    """A bmm of gathered weights [T, K, ., .] and something else.

    weight, ids  what is gathered, and by what ids [T, K]
    transposed   the contracted axis is the weight's second
    other        the other operand
    dims         the axes of the result: t, k and those of `other` and the weight
    """

    node: fx.Node
    weight: fx.Node
    ids: fx.Node
    transposed: bool
    other: fx.Node
    value: fx.Node
    dims: Dims

    def projection(self) -> Projection:
        return Projection(self.node, self.weight, self.transposed, None, self.value)


def _gathered(node: Any) -> tuple[fx.Node, fx.Node, list[fx.Node]] | None:
    """(weight [E, ., .], ids [T, K], moves) of a bmm operand."""
    base, path = source_of(node)
    found = gather(base)
    if found is None or len(sizes(found[0])) != 3 or len(sizes(found[1])) != 2:
        return None
    return (*found, path)


def _weight_side(node: Any) -> int | None:
    if not is_call(node, aten.bmm.default) or len(node.args) != 2 or node.kwargs:
        return None
    return next((i for i, operand in enumerate(node.args) if _gathered(operand)), None)


def anchors(graph: fx.Graph) -> Iterator[fx.Node]:
    """The last of the products with weights gathered by the same ids."""
    last: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        side = _weight_side(node)
        if side is not None:
            gathered = _gathered(node.args[side])
            assert gathered is not None
            last[gathered[1]] = node
    yield from last.values()


def walk(node: fx.Node) -> ExpertsSite:
    """Read the block that ends in the product `node`."""
    h, path = source_of(node.args[1 - (_weight_side(node) or 0)])
    down = _product(node, h, "tki")
    ups = [_product(up, _tokens(up), "th") for up in _ups(h, down)]
    experts = sizes(down.weight)[0]
    tokens, top_k = sizes(down.ids)
    if not isinstance(top_k, int) or not isinstance(experts, int):
        raise Refusal("the number of experts, or of experts per token, is symbolic")
    for up in ups:
        if up.other is not ups[0].other or not same(sizes(up.weight)[0], experts):
            raise Refusal("the up projections have different inputs or numbers of experts")
    x = ups[0].other
    block = region_between([up.value for up in ups], path[0] if path else node)
    activation = None
    if len(ups) == 1:
        activation = name_activation(block, ups[0].value, h)
    if activation is None:
        _check_rows(block, ups[0].value, h)
    weights, output = _combined(down, tokens, top_k)
    if not same_sizes(sizes(output), (tokens, sizes(x)[1])):
        raise Refusal(f"{output.name} has shape {sizes(output)}, not that of the tokens")
    return ExpertsSite(
        x=x,
        ids=down.ids,
        weights=weights,
        top_k=top_k,
        ups=tuple(up.projection() for up in ups),
        down=down.projection(),
        activation=activation,
        h=h,
        output=output,
        weights_on_input=False,
        wrap_ids=not non_negative(down.ids),
    )


def _tokens(up: fx.Node) -> fx.Node:
    """x [T, H] behind the other operand of an up projection."""
    operand = up.args[1 - (_weight_side(up) or 0)]
    return source_of(operand, stop=lambda n: len(sizes(n)) == 2)[0]


def _ups(h: fx.Node, down: _Product) -> list[fx.Node]:
    found, stack, seen = [], [h], set[fx.Node]()
    while stack:
        node = stack.pop()
        if node in seen or len(seen) > 512:
            continue
        seen.add(node)
        side = _weight_side(node)
        gathered = None if side is None else _gathered(node.args[side])
        if gathered is not None and gathered[1] is down.ids:
            found.append(node)
        else:
            stack.extend(node.all_input_nodes)
    if not found:
        raise Refusal(f"no second product with the same experts feeds {down.node.name}")
    position = {node: index for index, node in enumerate(down.node.graph.nodes)}
    return sorted(found, key=position.__getitem__)


def _product(node: fx.Node, other: fx.Node, names: str) -> _Product:
    """Read a bmm as x[t, h] or h[t, k, i] times W[ids][t, k, a, b]."""
    side = _weight_side(node)
    assert side is not None
    gathered = _gathered(node.args[side])
    assert gathered is not None
    weight, ids, path = gathered
    source = path[0].args[0] if path else node.args[side]
    weights = moved(named(source, "tkab"), path)
    base, other_path = source_of(node.args[1 - side], stop=lambda n: n is other)
    if base is not other:
        raise Refusal(f"{base.name} is not {other.name}")
    others = moved(named(other, names), other_path)
    left, right = (weights, others) if side == 0 else (others, weights)
    contracted = names_of((weights[2 if side == 0 else 1], others[1 if side == 0 else 2]))
    if contracted not in (("a", names[-1]), ("b", names[-1])):
        raise Refusal(f"{node.name} does not contract one axis of the weights with the tokens'")
    batch, expected = names_of((left[0], right[0])), names_of(named(other, names)[:-1])
    if batch[0] != batch[1] or batch[0] != "".join(expected):
        raise Refusal(f"{node.name} does not pair each token with its own weights")
    dims = (left[0], left[1], right[2])
    value = node
    while len(value.users) == 1 and moves(next(iter(value.users))):
        value = next(iter(value.users))
        dims = moved(dims, [value])
        if _is_rows(dims, ids, contracted[0]):
            break
    if not _is_rows(dims, ids, contracted[0]):
        raise Refusal(f"{value.name} is not [tokens, experts per token, width]")
    return _Product(node, weight, ids, contracted[0] == "a", other, value, dims)


def _is_rows(dims: Dims, ids: fx.Node, contracted: str) -> bool:
    tokens, top_k = names_of(named(ids, "tk"))
    return names_of(dims) == (tokens, top_k, "b" if contracted == "a" else "a")


def _check_rows(block: list[fx.Node], value: fx.Node, h: fx.Node) -> None:
    """Refuses an unnamed function that does not treat every row of [T, K, width] alike."""
    leading = sizes(value)[:2]
    for node in (*block, h):
        if is_call(node, aten.split.Tensor, aten.split_with_sizes.default, aten.unbind.int):
            continue  # their outputs are checked
        dim = node.args[1] if is_call(node, aten.slice.Tensor, aten.select.int) else 2
        if dim % (len(sizes(node)) + 1) < 2 or not same_sizes(sizes(node)[:2], leading):
            raise Refusal(f"{node.name} ({node.target}) mixes the rows of a token")
    if not same_sizes(sizes(h)[:2], leading) or len(sizes(h)) != 3:
        raise Refusal(f"{h.name} has shape {sizes(h)}, not one row for each pair")


def _combined(down: _Product, tokens: Any, top_k: int) -> tuple[fx.Node, fx.Node]:
    """(routing weights, the result [T, H]) of what follows the down projection."""
    least = dtype(down.node)
    end = down.value
    while len(end.users) == 1 and moves(next(iter(end.users))):
        end = next(iter(end.users))
    last = next(iter(end.users)) if len(end.users) == 1 else None
    if is_call(last, aten.bmm.default):
        return _combined_by_product(down, last)
    if top_k == 1 and is_call(last, aten.mul.Tensor) and not _is_summed(last):
        return _combined_by_scaling(down, last)

    def column(factor: Any, order: str) -> fx.Node | None:
        return pair_column(factor, order, least)

    width = sizes(down.value)[2]
    combine = Combine(down.value, column, lambda *_: False, "pairs", least, width)
    if combine.weights is None:
        raise Refusal("no routing weights are applied")
    if combine.top_k != top_k or not same(combine.tokens, tokens):
        raise Refusal("the sum is not over the experts of each token")
    if not same_sizes(_squeezed(sizes(combine.weights)), _squeezed((tokens, top_k))):
        raise Refusal(f"the routing weights {combine.weights.name} are not one for each pair")
    return combine.weights, combine.output


def _squeezed(shape: Any) -> tuple[Any, ...]:
    return tuple(size for size in shape if not same(size, 1))


def _is_summed(node: fx.Node) -> bool:
    while len(node.users) == 1:
        node = next(iter(node.users))
        if is_call(node, aten.sum.dim_IntList):
            return True
        if not moves(node) and not is_float_cast(node):
            return False
    return False


def _factors(down: _Product, node: fx.Node) -> tuple[Dims, Dims, fx.Node, int]:
    """(dims of the rows, dims of the routing weights, those, the rows' side) of a product."""
    sides = [source_of(operand, stop=lambda n: n is down.value)[0] for operand in node.args[:2]]
    if sides.count(down.value) != 1 or len(node.args) != 2 or node.kwargs:
        raise Refusal(f"{node.name} does not sum the rows of each token")
    side = sides.index(down.value)
    rows = moved(
        named(down.value, "tkw"), source_of(node.args[side], lambda n: n is down.value)[1]
    )

    def is_pairs(item: fx.Node) -> bool:
        return same_sizes(sizes(item), sizes(down.ids))

    weights, path = source_of(node.args[1 - side], stop=is_pairs)
    if not isinstance(weights, fx.Node) or not is_pairs(weights):
        raise Refusal(f"{weights} are not routing weights, one for each pair")
    return rows, moved(named(weights, "tk"), path), weights, side


def _combined_by_product(down: _Product, node: fx.Node) -> tuple[fx.Node, fx.Node]:
    """The same where a matmul applies the routing weights and sums."""
    rows, column, weights, side = _factors(down, node)
    left, right = (rows, column) if side == 0 else (column, rows)
    tokens, top_k = names_of(named(down.ids, "tk"))
    if names_of((left[0], right[0])) != (tokens, tokens) or names_of((left[2], right[1])) != (
        top_k,
        top_k,
    ):
        raise Refusal(f"{node.name} does not sum over the experts of each token")
    dims: Dims = (left[0], left[1], right[2])
    return peel(weights, is_transparent), _tokens_of(node, dims, tokens)


def _combined_by_scaling(down: _Product, node: fx.Node) -> tuple[fx.Node, fx.Node]:
    """The same where a token has one expert: there is nothing to sum."""
    rows, column, weights, _ = _factors(down, node)
    dims = names_of(rows)
    if len(rows) != len(column) or any(
        name not in ("", own) for name, own in zip(names_of(column), dims, strict=True)
    ):
        raise Refusal(f"{node.name} does not scale each row by the weight of its token")
    tokens, _ = names_of(named(down.ids, "tk"))
    return peel(weights, is_transparent), _tokens_of(node, rows, tokens)


def _tokens_of(output: fx.Node, dims: Dims, tokens: str) -> fx.Node:
    """Forward over moves to the node that is [T, H]."""
    while names_of(dims) != (tokens, "w") or len(sizes(output)) != 2:
        output = sole_user(output)
        if not moves(output):
            raise Refusal(f"{output.name} is not [tokens, width]")
        dims = moved(dims, [output])
    return output


EINSUM = Rewrite(
    "moe.experts.einsum",
    op="moe_experts",
    anchors=anchors,
    walk=walk,
    replace=replace_experts,
    describe=ExpertsSite.describe,
)
