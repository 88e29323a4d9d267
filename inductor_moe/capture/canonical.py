"""One normal form before matching, for graphs of torch.compile and of torch.export."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

aten = torch.ops.aten

MOVES = (
    aten.view.default,
    aten.reshape.default,
    aten._unsafe_view.default,
    aten.permute.default,
    aten.unsqueeze.default,
    aten.clone.default,
)
GATHERS = (aten.index.Tensor, aten.index_select.default)


def canonicalise(graph: fx.Graph) -> None:
    """Bring a graph into the form that patterns read, in place.

    Asserts on tensor metadata, no-op permutes and dead nodes go. On a GPU Inductor has made a
    product of two matrices of a batched one with a single batch; where gathered weights meet their
    only row it is batched again.
    """
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        if node.target is aten._assert_tensor_metadata.default:
            graph.erase_node(node)
        elif node.target is aten.permute.default:
            dims = list(node.args[1])
            if dims == list(range(len(dims))):
                node.replace_all_uses_with(node.args[0])
        elif node.target is aten.unsqueeze.default:
            _batch_again(graph, node)
    graph.eliminate_dead_code()


def _batch_again(graph: fx.Graph, node: fx.Node) -> None:
    product, dim = node.args
    if not _calls(product, aten.mm.default) or dim != 0:
        return
    squeezed = product.args
    if not all(_calls(side, aten.squeeze.dim) and side.args[1] == 0 for side in squeezed):
        return
    sides = [side.args[0] for side in squeezed]
    if not all(len(side.meta["val"].shape) == 3 for side in sides):
        return
    if not any(map(_gathers_weights, sides)):
        return
    with graph.inserting_before(node):
        batched = graph.call_function(aten.bmm.default, tuple(sides))
    batched.meta = {**product.meta, "val": node.meta["val"]}
    node.replace_all_uses_with(batched)


def _gathers_weights(node: Any) -> bool:
    while _calls(node, *MOVES):
        node = node.args[0]
    return _calls(node, *GATHERS) and len(node.args[0].meta["val"].shape) == 3


def _calls(node: Any, *targets: Any) -> bool:
    return isinstance(node, fx.Node) and node.op == "call_function" and node.target in targets
