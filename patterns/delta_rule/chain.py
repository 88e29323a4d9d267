"""Finding the delta rule in written-out code: state updates chained to one another.

An update is `state * decay + product`, where the product depends on the state, too: an outer
product for one token, a matrix product for a chunk of them. One update is a decode step, n of
them are an unrolled loop.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from torch import fx

from inductor_moe.patterns.rewrite import Refusal
from inductor_moe.patterns.walk import (
    COPIES,
    SHAPES,
    aten,
    is_call,
    is_float_cast,
    is_transparent,
    number,
    plain_binary,
    same,
    same_sizes,
    sizes,
)

PRODUCTS = {aten.bmm.default, aten.mm.default}
MERGES = {aten.cat.default, aten.select_scatter.default, aten.slice_scatter.default}
REACH = 160  # nodes looked at to see that a product depends on the state


@dataclasses.dataclass(frozen=True)
class Update:
    """node = previous * decay + product over `inner` tokens."""

    node: fx.Node
    previous: fx.Node
    inner: int


@dataclasses.dataclass(frozen=True)
class Chain:
    """Updates in order; `state` precedes the first.

    output     the read of the last step or chunk
    finished   whether the last update belongs to the last step or chunk; if not, the state that
               follows it is never computed
    """

    updates: tuple[fx.Node, ...]
    state: fx.Node
    inner: int
    output: fx.Node
    finished: bool

    @property
    def length(self) -> int:
        """How many steps or chunks there are."""
        return len(self.updates) + (not self.finished)

    @property
    def chunked(self) -> bool:
        """Whether an update is by more than one token."""
        return self.inner > 1


def moves(node: Any) -> bool:
    """Whether node only moves, copies or casts values, without broadcasting."""
    return (
        is_call(node, *COPIES, *SHAPES, aten.permute.default)
        or is_float_cast(node)
        or (is_call(node, aten.expand.default) and same_sizes(sizes(node), sizes(node.args[0])))
    )


def _peeled(node: Any) -> Any:
    while moves(node) or is_call(node, aten.expand.default):
        node = node.args[0]
    return node


def keeps_shape(node: Any) -> bool:
    """Whether node moves values and keeps its dims, but for their order and those of size 1."""
    return moves(node) and (not is_call(node, *SHAPES) or is_transparent(node))


def _inner_size(node: Any, depth: int = 3) -> int | None:
    """Over how many tokens a product of keys and values sums, or None if node is no product."""
    node = _peeled(node)
    if is_call(node, *PRODUCTS):
        inner = sizes(node.args[0])[-1]
        return inner if isinstance(inner, int) else None
    if not plain_binary(node, aten.mul.Tensor) or not depth:
        return None
    left, right = node.args
    if not isinstance(left, fx.Node) or not isinstance(right, fx.Node):
        return None
    for one, other in ((left, right), (right, left)):
        row, column = sizes(one), sizes(other)
        if len(row) > 1 and len(column) > 1 and same(row[-1], 1) and same(column[-2], 1):
            return 1
    for one in (left, right):
        if same_sizes(sizes(one), sizes(node)):
            found = _inner_size(one, depth - 1)
            if found is not None:
                return found
    return None


def _decayed(node: Any) -> Any:
    """The state in `state * decay`, decay broadcast over a dim of the state; or node itself."""
    while keeps_shape(node):
        node = node.args[0]
    if plain_binary(node, aten.mul.Tensor):
        for one, other in ((node.args[0], node.args[1]), (node.args[1], node.args[0])):
            if not isinstance(one, fx.Node) or not isinstance(other, fx.Node):
                continue
            while is_call(other, aten.expand.default):
                other = other.args[0]
            narrow = sizes(other)
            broadcast = len(narrow) < 2 or same(narrow[-1], 1) or same(narrow[-2], 1)
            if broadcast and same_sizes(sizes(one), sizes(node)):
                while keeps_shape(one):
                    one = one.args[0]
                return one
    return node


def _reaches(node: fx.Node, target: fx.Node) -> bool:
    seen, queue = {node}, [node]
    for current in queue:
        if current is target:
            return True
        if len(queue) > REACH:
            return False
        for source in current.all_input_nodes:
            if source not in seen:
                seen.add(source)
                queue.append(source)
    return False


def update_of(node: Any) -> Update | None:
    """Read a state update, or None."""
    if not plain_binary(node, aten.add.Tensor, aten.sub.Tensor):
        return None
    left, right = node.args
    if not isinstance(left, fx.Node) or not isinstance(right, fx.Node):
        return None
    shape = sizes(node)
    if not 2 <= len(shape) <= 4 or same(shape[-1], 1) or same(shape[-2], 1):
        return None
    orders = [(left, right)]
    if is_call(node, aten.add.Tensor):
        orders.append((right, left))
    for kept, product in orders:
        if not same_sizes(sizes(kept), shape) or not same_sizes(sizes(product), shape):
            continue
        inner = _inner_size(product)
        if inner is None:
            continue
        previous = _decayed(kept)
        if isinstance(previous, fx.Node) and _reaches(product, previous):
            return Update(node, previous, inner)
    return None


def last_updates(graph: fx.Graph) -> Iterator[fx.Node]:
    """The updates that no other update follows, of the chains that an output is read from.

    A residual connection looks like an update, too, but nothing is read from its sum alone.
    """
    targets = (aten.add.Tensor, aten.sub.Tensor)
    found = [update_of(node) for node in graph.nodes if is_call(node, *targets)]
    followed = {update.previous for update in found if update is not None}
    for update in found:
        if update is None or update.node in followed:
            continue
        if _is_read(update.node):
            yield update.node


def _is_read(last: fx.Node) -> bool:
    try:
        read_chain(last)
    except Refusal:
        return False
    return True


def read_chain(last: fx.Node) -> Chain:
    """The whole chain that ends in the update `last`."""
    updates: list[Update] = []
    node: Any = last
    while (update := update_of(node)) is not None:
        updates.append(update)
        node = update.previous
    updates.reverse()
    inner = {update.inner for update in updates}
    if len(inner) != 1:
        raise Refusal(f"the updates before {last.name} are by {sorted(inner)} tokens")
    nodes = tuple(update.node for update in updates)
    if inner == {1}:
        output = _read_of(last)
        finished = True
    else:
        later = _chunk_read(last, nodes)
        output = later or _chunk_read(updates[-1].previous, nodes)
        finished = later is None
    if output is None:
        raise Refusal(f"no output is read from the state {last.name}")
    return Chain(nodes, node, inner.pop(), output, finished)


def _read_of(state: fx.Node) -> fx.Node | None:
    """The sum or product over the key dim that reads one token's output from the state."""
    reads = []
    for user in state.users:
        node = user
        for _ in range(8):
            if is_call(node, aten.sum.dim_IntList, *PRODUCTS):
                reads.append(node)
                break
            onward = moves(node) or is_call(node, aten.expand.default, aten.mul.Tensor)
            if not onward or len(node.users) != 1:
                break
            node = next(iter(node.users))
    return reads[0] if len(reads) == 1 else None


def _chunk_read(state: fx.Node, updates: tuple[fx.Node, ...]) -> fx.Node | None:
    """The sum of a chunk's read from the state and its reads within the chunk."""
    products, frontier = [], list(state.users)
    while frontier:
        node = frontier.pop()
        if is_call(node, *PRODUCTS):
            products.append(node)
        elif moves(node) or is_call(node, aten.expand.default):
            frontier.extend(node.users)
    found = []
    for product in products:
        node = product
        while len(node.users) == 1:
            node = next(iter(node.users))
            if not moves(node) and not is_scaling(node):
                break
        if is_call(node, aten.add.Tensor) and node not in updates:
            found.append(node)
    return found[0] if len(found) == 1 else None


def is_scaling(node: Any) -> bool:
    """Whether node multiplies or divides by a number."""
    return (
        is_call(node, aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar)
        and len(node.args) == 2
        and not node.kwargs
        and isinstance(node.args[0], fx.Node)
        and number(node.args[1]) is not None
    )


def after(output: fx.Node) -> list[fx.Node]:
    """output and the nodes that follow it one by one and only move, join or scale its values."""
    path = [output]
    while len(path) < 24 and len(path[-1].users) == 1:
        node = next(iter(path[-1].users))
        if is_call(node, aten.copy.default) and node.args[1] is not path[-1]:
            break
        joins = is_call(node, *MERGES, aten.slice.Tensor, aten.copy.default)
        if not (joins or moves(node) or is_scaling(node)):
            break
        path.append(node)
    return path
