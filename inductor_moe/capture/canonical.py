"""One normal form before matching, for graphs of torch.compile and of torch.export."""

from __future__ import annotations

import torch
from torch import fx

aten = torch.ops.aten


def canonicalise(graph: fx.Graph) -> None:
    """Erase asserts on tensor metadata, drop dead nodes and no-op permutes, in place."""
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        if node.target is aten._assert_tensor_metadata.default:
            graph.erase_node(node)
        elif node.target is aten.permute.default:
            dims = list(node.args[1])
            if dims == list(range(len(dims))):
                node.replace_all_uses_with(node.args[0])
    graph.eliminate_dead_code()
