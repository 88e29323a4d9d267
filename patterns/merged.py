"""Linear layers of one input, in a decode step of a few sequences: one launch reads all weights.

Each alone is too small to fill a GPU, and a launch costs what its weights take to read.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any

from torch import fx

from inductor_moe.ops.merged_linear import MEMBERS, MOST_ROWS, merged_linear
from inductor_moe.ops.quant import quantized_linear
from inductor_moe.patterns.quant import PackedWeight
from inductor_moe.patterns.rewrite import Rewrite
from inductor_moe.patterns.walk import (
    aten,
    call,
    dtype,
    flat_source,
    is_call,
    same,
    sizes,
    tensor,
)

# Dense layers with more rows fill a GPU on their own.
DENSE_ROWS = 1024


@dataclasses.dataclass(frozen=True)
class Member:
    """One linear layer on x [M, K]: a packed weight [N, K], or a dense one."""

    node: fx.Node
    x: fx.Node
    packed: PackedWeight | None
    dense: fx.Node | None

    @property
    def rows(self) -> int:
        return int(sizes(self.node)[1])

    @property
    def tokens(self) -> int:
        """M, which is an int, or 1 for every value of the symbols."""
        rows = sizes(self.x)[0]
        return rows if isinstance(rows, int) else 1

    @property
    def weights(self) -> list[fx.Node]:
        """What the layer reads beside x."""
        packed = self.packed
        read = [self.dense] if packed is None else [packed.packed, packed.scales, packed.zeros]
        return [node for node in read if node is not None]


@dataclasses.dataclass(frozen=True)
class MergedSite:
    """Linear layers of one input, packed ones first."""

    members: tuple[Member, ...]

    @property
    def packed(self) -> list[PackedWeight]:
        return [member.packed for member in self.members if member.packed is not None]

    def describe(self) -> str:
        x = self.members[0].x
        rows = " + ".join(str(member.rows) for member in self.members)
        kinds = [self.packed[0].describe()] if self.packed else []
        if len(self.packed) < len(self.members):
            kinds.append(str(dtype(x)))
        tokens = f"{self.members[0].tokens} rows of " if self.members[0].tokens > 1 else ""
        return f"{tokens}{sizes(x)[1]} -> {rows}; {', '.join(kinds)}"


def _takes(x: fx.Node) -> bool:
    """Whether x has one row, or a number of rows that is known and small."""
    rows = sizes(x)[0]
    return same(rows, 1) or (isinstance(rows, int) and 0 < rows <= MOST_ROWS)


def _member(node: fx.Node) -> Member | None:
    """The layer that a node computes for a few rows; None for another node, or more rows."""
    if is_call(node, quantized_linear._opoverload):
        x, packed, scales, zeros, bias, group_size = node.args
        if bias is not None or not _takes(x):
            return None
        weight = PackedWeight(node, packed, scales, zeros, group_size, sizes(x)[1])
        return Member(node, x, weight, None)
    if not is_call(node, aten.mm.default):
        return None
    x, operand = node.args
    if not is_call(operand, aten.permute.default) or list(operand.args[1]) != [1, 0]:
        return None
    weight = operand.args[0]
    plain = weight.op in ("placeholder", "get_attr") and tensor(weight).is_contiguous()
    fits = _takes(x) and isinstance(sizes(weight)[0], int)
    if not plain or not fits or sizes(weight)[0] > DENSE_ROWS or dtype(weight) != dtype(node):
        return None
    return Member(node, x, None, weight)


def _members(nodes: Iterable[fx.Node]) -> dict[fx.Node, list[Member]]:
    """Input -> the layers on it among some nodes."""
    found: dict[fx.Node, list[Member]] = collections.defaultdict(list)
    for node in nodes:
        member = _member(node)
        if member is not None:
            found[flat_source(member.x)].append(member)
    return found


def _readers(x: fx.Node) -> list[fx.Node]:
    """The nodes that read x itself, past views, in graph order."""
    found: list[fx.Node] = []
    stack = [x]
    while stack:
        for user in stack.pop().users:
            (stack if flat_source(user) is x else found).append(user)
    return sorted(found)


def _alike(members: list[Member]) -> list[Member]:
    """The packed layers of the most frequent scheme and the dense ones, as many as fit.

    Dense ones alone are merged for one row only: a library's products of more are their equal.
    """
    # Views may give one tensor several numbers of rows.
    counts = collections.Counter(m.tokens for m in members)
    members = [m for m in members if m.tokens == counts.most_common(1)[0][0]]
    schemes = collections.Counter(_scheme(m.packed) for m in members if m.packed is not None)
    scheme = schemes.most_common(1)[0][0] if schemes else None
    packed = [m for m in members if m.packed is not None and _scheme(m.packed) == scheme]
    dense = [m for m in members if m.dense is not None and dtype(m.node) == dtype(members[0].x)]
    if packed or dense:  # The op takes the place of the first, where some may not be known yet.
        first = min(member.node for member in packed + dense)
        packed, dense = ([m for m in kind if max(m.weights) < first] for kind in (packed, dense))
    if not packed and dense and dense[0].tokens > 1:
        return []
    # What starts after an odd number of rows is not aligned.
    packed.sort(key=lambda m: m.rows % 8 != 0)
    dense.sort(key=lambda m: m.rows % 8 != 0)
    return packed[:MEMBERS] + dense[:MEMBERS]


def _scheme(weight: PackedWeight) -> tuple[Any, ...]:
    zeros = None if weight.zeros is None else dtype(weight.zeros)
    return weight.bits, weight.group_size, zeros


def anchors(graph: fx.Graph) -> Iterator[fx.Node]:
    """The inputs of several linear layers."""
    for x, members in _members(graph.nodes).items():
        if len(_alike(members)) > 1:
            yield x


def walk(x: fx.Node) -> MergedSite:
    """Read the layers on x."""
    return MergedSite(tuple(_alike(_members(_readers(x))[x])))


def replace(graph: fx.Graph, site: MergedSite) -> fx.Node:
    """Insert the op before the first of the layers, and a view of its part for each."""
    positions = {node: place for place, node in enumerate(graph.nodes)}
    first = min(site.members, key=lambda member: positions[member.node])
    packed = site.packed
    with graph.inserting_before(first.node):
        output = call(
            graph, merged_linear._opoverload, first.x,
            [weight.packed for weight in packed], [weight.scales for weight in packed],
            [weight.zeros for weight in packed if weight.zeros is not None],
            packed[0].group_size if packed else 0,
            [member.dense for member in site.members if member.dense is not None],
            like=first.node,
        )  # fmt: skip
        begin = 0
        for member in site.members:
            end = begin + member.tokens * member.rows
            part = call(graph, aten.slice.Tensor, output, 0, begin, end, like=member.node)
            shape = [member.tokens, member.rows]
            rows = call(graph, aten.view.default, part, shape, like=member.node)
            member.node.replace_all_uses_with(rows)
            begin = end
    return output


MERGED = Rewrite(
    "linear.merged",
    op="merged_linear",
    anchors=anchors,
    walk=walk,
    replace=replace,
    describe=MergedSite.describe,
    origin=lambda site: min(member.node for member in site.members),
    optional=True,
)
