"""Sums of small tensors over ranks whose GPUs share memory: one launch, not the backend's."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from inductor_moe import compat
from inductor_moe.ops.all_reduce import all_reduce, why_not
from inductor_moe.patterns.rewrite import Refusal, Rewrite
from inductor_moe.patterns.walk import call, dtype, is_call, sizes, tensor

collectives: Any = torch.ops._c10d_functional
DEVICES = ("cuda",)


@dataclasses.dataclass(frozen=True)
class SumSite:
    """`output` is the awaited sum of x over the ranks of a group."""

    x: fx.Node
    group_name: str
    output: fx.Node

    def describe(self) -> str:
        value = tensor(self.x)
        return f"{value.numel() * value.element_size()} bytes of {dtype(self.x)}"


def anchors(graph: fx.Graph) -> Iterator[fx.Node]:
    """Where a sum on a GPU is waited for."""
    for node in graph.nodes if torch.distributed.is_available() else ():
        if (
            is_call(node, collectives.wait_tensor.default)
            and is_call(node.args[0], collectives.all_reduce.default)
            and tensor(node).device.type in DEVICES
        ):
            yield node


def walk(wait: fx.Node) -> SumSite:
    """Read the sum; refuse one that the kernel cannot do, or that a package is to hold."""
    start = wait.args[0]
    x, kind, group_name = start.args
    if kind != "sum":
        raise Refusal(f"the ranks' values are not added up: {kind}")
    if len(start.users) > 1:
        raise Refusal("the sum is used before it is waited for")
    if compat.compiles_package():
        raise Refusal("a package does without Python")
    reason = why_not(tensor(x), group_name)
    if reason is not None:
        raise Refusal(reason)
    return SumSite(x, group_name, wait)


def replace(graph: fx.Graph, site: SumSite) -> fx.Node:
    """Insert the op where the sum was waited for."""
    with graph.inserting_before(site.output):
        output = call(graph, all_reduce._opoverload, site.x, site.group_name, like=site.output)
    site.output.replace_all_uses_with(output)
    graph.erase_node(site.output)  # a wait counts as an effect, and would keep the sum
    return output


def left_to_backends(graph: fx.Graph) -> tuple[str, ...]:
    """Remarks on the sums that a graph still leaves to the backend of its process group."""
    reasons: collections.Counter[str] = collections.Counter()
    for wait in anchors(graph):
        try:
            walk(wait)
            reason = "collective.all_reduce is off"
        except Refusal as refusal:
            reason = str(refusal)
        size = " x ".join(map(str, sizes(wait)))
        reasons[f"all-reduce of {size} left to the process group's backend: {reason}"] += 1
    return tuple(
        f"{text} ({count} times)" if count > 1 else text for text, count in reasons.items()
    )


ALL_REDUCE = Rewrite(
    "collective.all_reduce",
    op="all_reduce",
    anchors=anchors,
    walk=walk,
    replace=replace,
    describe=SumSite.describe,
    optional=True,
)
