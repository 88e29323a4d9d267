"""Norm and rotary embedding of the queries and keys of a decode step's attention.

Inductor makes a kernel or three of each, as their shapes differ; all of them together are one.
Where the graph has the caches of keys and values for nothing but this attention, the same kernel
stores them there.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from inductor_moe.ops.attention import attention_decode
from inductor_moe.ops.norm_rope import MAX_HEAD_DIM, norm_rope, norm_rope_cache
from inductor_moe.patterns.norm import RmsNorm, read_rms_norm
from inductor_moe.patterns.rewrite import Refusal, Rewrite
from inductor_moe.patterns.walk import (
    aten,
    call,
    dtype,
    is_call,
    is_getitem,
    operands,
    peel,
    plain_binary,
    same,
    same_sizes,
    sizes,
    without_ones,
)

CACHE_WRITES = (aten.index_put.default, aten.index_put_.default)


@dataclasses.dataclass(frozen=True)
class Rotation:
    """`output` [B, H, 1, D]: x [B, 1, H, D], normed or not, its first R channels rotated."""

    output: fx.Node
    x: fx.Node
    norm: RmsNorm | None
    cos: fx.Node
    sin: fx.Node

    @property
    def source(self) -> fx.Node:
        return self.norm.x if self.norm else self.x


@dataclasses.dataclass(frozen=True)
class Write:
    """`node` is cache [B, H, L, D], an input, with value [B, H, 1, D] at position [1].

    copy  writes it back to the input
    """

    node: fx.Node
    cache: fx.Node
    value: fx.Node
    position: fx.Node
    copy: fx.Node


@dataclasses.dataclass(frozen=True)
class RopeSite:
    """The queries and keys of one attention, and where its keys and values are stored."""

    q: Rotation
    k: Rotation
    writes: tuple[Write, Write] | None

    @property
    def last(self) -> fx.Node:
        """The last node that the op depends on or replaces."""
        nodes = [self.q.output, self.k.output]
        for write in self.writes or ():
            nodes += [write.value, write.position]
        return max(nodes)

    def describe(self) -> str:
        batch, _, heads, dim = sizes(self.q.x)
        norm = ", norm" if self.q.norm else ""
        rotated = sizes(self.q.cos)[-1]
        cache = "; cache" if self.writes else ""
        return f"B={batch} Hq={heads} Hkv={sizes(self.k.x)[2]} D={dim} R={rotated}{norm}{cache}"


def anchors(graph: fx.Graph) -> Iterator[fx.Node]:
    """The keys of fused attentions of one position."""
    for node in graph.nodes:
        if is_call(node, attention_decode._opoverload):
            yield node.args[1]


def walk(written: fx.Node) -> RopeSite:
    """Read how the queries, and the keys last written to the cache, were made."""
    if not is_call(written, *CACHE_WRITES):
        raise Refusal("the keys are not those of a cache that was just written")
    attention = next(
        user
        for user in written.users
        if is_call(user, attention_decode._opoverload) and user.args[1] is written
    )
    q, k = _rotation(peel(attention.args[0])), _rotation(peel(written.args[2]))
    if q.cos is not k.cos or q.sin is not k.sin:
        raise Refusal("queries and keys are rotated by different angles")
    if (q.norm is None) != (k.norm is None):
        raise Refusal("only one of queries and keys is normed")
    if q.norm and k.norm and (q.norm.eps, q.norm.offset) != (k.norm.eps, k.norm.offset):
        raise Refusal("queries and keys are normed differently")
    later, earlier = max(q.output, k.output), min(q.output, k.output)
    if any(user < later for user in earlier.users):
        raise Refusal(f"{earlier.name} is used before {later.name} is computed")
    site = RopeSite(q, k, _writes(attention, k))
    if any(user < site.last for user in q.output.users):
        return RopeSite(q, k, None)
    return site


def _writes(attention: fx.Node, k: Rotation) -> tuple[Write, Write] | None:
    """Where the attention's keys and values are stored, if that is all their caches are for."""
    keys, values = (_write(attention, place) for place in (1, 2))
    if keys is None or values is None or keys.position is not values.position:
        return None
    if not dtype(k.output) == dtype(keys.cache) == dtype(values.cache):
        return None
    node = keys.value
    while node is not k.output and len(node.users) == 1:
        node = node.args[0]
    return (keys, values) if len(node.users) == 1 else None


def _write(attention: fx.Node, place: int) -> Write | None:
    node = attention.args[place]
    if not is_call(node, aten.index_put.default) or node.kwargs or any(node.args[3:]):
        return None
    cache, indices, value = node.args[:3]
    copies = [user for user in node.users if user is not attention]
    if cache.op != "placeholder" or len(copies) != 1 or list(indices[:2]) != [None, None]:
        return None
    if not is_call(copies[0], aten.copy_.default) or copies[0].args != (cache, node):
        return None
    if set(cache.users) != {node, copies[0]} or len(indices) != 3:
        return None
    if sizes(indices[2]) != (1,) or dtype(indices[2]) not in (torch.int32, torch.int64):
        return None
    batch, heads, _, width = sizes(cache)
    if not same_sizes(sizes(value), (batch, heads, 1, width)) or dtype(value) != dtype(cache):
        return None
    return Write(node, cache, value, indices[2], copies[0])


def _rotation(node: fx.Node) -> Rotation:
    shape = sizes(node)
    if len(shape) != 4 or not same(shape[2], 1) or not isinstance(shape[3], int):
        raise Refusal(f"{node.name} is not [B, H, 1, D]")
    turned: Any = node
    rest: Any = None
    if is_call(node, aten.cat.default) and _last(node, node.args[1:]) and len(node.args[0]) == 2:
        parts: Any = node.args[0]
        turned, rest = parts
    width = sizes(turned)[3]
    if width % 2 or shape[3] > MAX_HEAD_DIM or not plain_binary(turned, aten.add.Tensor):
        raise Refusal(f"{node.name} is no rotation")
    for along, across in operands(turned):
        found = _read_sum(along, across, shape[0], width)
        if found is None:
            continue
        part, cos, sin = found
        x = part
        if rest is not None:
            if not _is_slice(part, 0, width) or not _is_slice(rest, width, shape[3]):
                continue
            x = _source(part)
            if _source(rest) is not x:
                continue
        if not same_sizes(sizes(x), shape) or dtype(x) != dtype(node):
            continue
        if is_call(x, aten.permute.default) and list(x.args[1]) == [0, 2, 1, 3]:
            heads = x.args[0]
            norm = read_rms_norm(heads)
            if norm is not None and norm.weight.op not in ("placeholder", "get_attr"):
                norm = None
            return Rotation(node, heads, norm, cos, sin)
    raise Refusal(f"{node.name} is no rotation")


def _read_sum(
    along: Any, across: Any, batch: Any, width: int
) -> tuple[fx.Node, fx.Node, fx.Node] | None:
    """(x, cos, sin) of x * cos + cat(-second half, first half) * sin."""
    if not (plain_binary(along, aten.mul.Tensor) and plain_binary(across, aten.mul.Tensor)):
        return None
    for x, cos in operands(along):
        for turned, sin in operands(across):
            tables = _is_table(cos, batch, width) and _is_table(sin, batch, width)
            if tables and same_sizes(sizes(cos), sizes(sin)) and _is_turned(turned, x, width):
                return x, cos, sin
    return None


def _is_table(node: Any, batch: Any, width: int) -> bool:
    """Whether node has an angle for each channel, of all rows of the batch or of each."""
    if not isinstance(node, fx.Node):
        return False
    by_row = isinstance(batch, int) and same_sizes(sizes(node), (batch, 1, 1, width))
    return by_row or same_sizes(without_ones(sizes(node)), (width,))


def _is_turned(node: Any, x: Any, width: int) -> bool:
    if not is_call(node, aten.cat.default) or not _last(node, node.args[1:]):
        return False
    parts = node.args[0]
    return (
        len(parts) == 2
        and is_call(parts[0], aten.neg.default)
        and _is_slice(parts[0].args[0], width // 2, width)
        and _is_slice(parts[1], 0, width // 2)
        and _source(parts[0].args[0]) is x
        and _source(parts[1]) is x
    )


def _is_slice(node: Any, start: int, end: int) -> bool:
    """Whether node is x[..., start:end]."""
    return _bounds(node) == (start, end)


def _source(node: fx.Node) -> Any:
    """x where node is x[..., start:end]."""
    source = node.args[0]
    return source.args[0] if is_getitem(node, node.args[1], aten.split.Tensor) else source


def _bounds(node: Any) -> tuple[int, int] | None:
    """(start, end) where node is x[..., start:end], a slice or a part of a split."""
    if is_call(node, operator.getitem) and is_call(node.args[0], aten.split.Tensor):
        split, index = node.args
        source, size, dim = [*split.args, 0][:3]
        if split.kwargs or not isinstance(size, int) or not _last(source, (dim,)):
            return None
        return index * size, min((index + 1) * size, sizes(source)[-1])
    if not is_call(node, aten.slice.Tensor) or node.kwargs:
        return None
    source, dim, begin, end, step = [*node.args, *[0, 0, None, 1][len(node.args) - 1 :]]
    if not _last(source, (dim,)) or step != 1:
        return None
    width = sizes(source)[-1]
    return begin or 0, width if end is None else min(end, width)


def _last(node: fx.Node, dim: Any) -> bool:
    """Whether dim, as a node was given it, is the last one."""
    return bool(dim) and dim[0] in (-1, len(sizes(node)) - 1)


def replace(graph: fx.Graph, site: RopeSite) -> fx.Node:
    """Insert the op where the last of all it depends on was computed."""
    q, k = site.q, site.k
    with graph.inserting_before(site.last.next):
        rows = [call(graph, aten.select.int, r.source, 1, 0, like=r.output) for r in (q, k)]
        weights = [_flat(graph, r.norm.weight, r.output) if r.norm else None for r in (q, k)]
        tables = [_flat(graph, table, q.output) for table in (q.cos, q.sin)]
        constants = (q.norm.eps, q.norm.offset) if q.norm else (0.0, 0.0)
        if site.writes:
            return _store(graph, site, rows, (*weights, *constants, *tables))
        op = norm_rope._opoverload
        output = call(graph, op, *rows, *weights, *constants, *tables, like=q.output)
        for index, rotation in enumerate((q, k)):
            item = graph.call_function(operator.getitem, (output, index))
            item.meta["val"] = output.meta["val"][index]
            four = call(graph, aten.unsqueeze.default, item, 2, like=rotation.output)
            rotation.output.replace_all_uses_with(four)
    return output


def _store(graph: fx.Graph, site: RopeSite, rows: list[fx.Node], rest: tuple[Any, ...]) -> fx.Node:
    """Insert the op that stores keys and values, and drop the copies back to the caches."""
    assert site.writes
    keys, values = site.writes
    value, like = values.value, site.q.output
    if is_call(value, aten.permute.default) and list(value.args[1]) == [0, 2, 1, 3]:
        value = call(graph, aten.select.int, value.args[0], 1, 0, like=like)
    else:
        value = call(graph, aten.squeeze.dim, value, 2, like=like)
    output = call(
        graph, norm_rope_cache._opoverload, *rows, value, *rest,
        keys.cache, values.cache, keys.position, like=like,
    )  # fmt: skip
    four = call(graph, aten.unsqueeze.default, output, 2, like=like)
    site.q.output.replace_all_uses_with(four)
    for write in site.writes:
        graph.erase_node(write.copy)
        write.node.replace_all_uses_with(write.cache)
    return output


def _flat(graph: fx.Graph, node: fx.Node, like: fx.Node) -> fx.Node:
    width = without_ones(sizes(node))
    if len(sizes(node)) == 1:
        return node
    return call(graph, aten.reshape.default, node, list(width), like=like)


ROPE = Rewrite(
    "attention.rope",
    op="norm_rope",
    anchors=anchors,
    walk=walk,
    replace=replace,
    describe=RopeSite.describe,
    origin=lambda site: site.q.output,
    optional=True,
)
