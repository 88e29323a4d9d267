"""W4A8: which ops on packed weights multiply with int8 activations, once a graph is rewritten."""

from __future__ import annotations

from typing import Any

from torch import fx

from inductor_moe import compat
from inductor_moe.ops.quant import (
    BITS,
    INT8_GROUPS,
    moe_down_combine_quantized,
    moe_experts_quantized,
    moe_up_quantized,
    quantized_linear,
)
from inductor_moe.patterns.walk import dtype, is_call, sizes

# Below, reading the weights takes the time and decode is what runs.
MANY_ROWS = 64

# Positions of (packed, group_size), and of the argument whose first dim is the number of tokens.
POSITIONS: dict[Any, tuple[tuple[tuple[int, int], ...], int]] = {
    quantized_linear._opoverload: (((1, 5),), 0),
    moe_experts_quantized._opoverload: (((1, 4), (5, 8)), 10),
    moe_up_quantized._opoverload: (((1, 4),), 5),
    moe_down_combine_quantized._opoverload: (((1, 4),), 5),
}


def mark_int8_activations(graph: fx.Graph) -> dict[fx.Node, str]:
    """Give int8 activations to the ops that can have them; what to say of each op on packed
    weights.

    An op is for prefill or not by the number of tokens the graph was traced with.
    """
    said = {}
    for node in graph.nodes:
        if is_call(node, *POSITIONS):
            reason = _reason_against(node)
            if reason is None:
                arguments = compat.schema_of(node.target).arguments
                left = arguments[len(node.args) : -1]
                node.args = (*node.args, *(argument.default_value for argument in left), True)
                said[node] = "int8 activations per token and group"
            else:
                said[node] = f"{_short(dtype(node.args[0]))} activations: {reason}"
    return said


def _reason_against(node: fx.Node) -> str | None:
    weights, tokens = POSITIONS[node.target]
    for packed, group_size in weights:
        bits, group = BITS[dtype(node.args[packed])], node.args[group_size]
        if bits != 4:
            return f"weights of {bits} bits"
        if group not in INT8_GROUPS:
            return f"groups of {group or 'a whole row'}, not of 32, 64 or 128"
    rows = compat.size_hint(sizes(node.args[tokens])[0])
    return f"{rows} tokens, fewer than {MANY_ROWS}" if rows < MANY_ROWS else None


def _short(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")
