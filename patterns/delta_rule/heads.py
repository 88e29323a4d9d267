"""Delta-rule calls whose key heads were repeated for their value heads: the op shares heads.

The call comes from capture (a known function) and needs no proof; a repeat of q and k before it
would be a copy in memory that the kernels do not need.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from torch import fx

from inductor_moe.ops.delta_rule import delta_rule
from inductor_moe.patterns.rewrite import Rewrite
from inductor_moe.patterns.walk import (
    COPIES,
    SHAPES,
    aten,
    call,
    dtype,
    is_call,
    is_transparent,
    same,
    same_sizes,
    sizes,
)

DELTA_RULE = delta_rule._opoverload


@dataclasses.dataclass(frozen=True)
class DeltaRuleSite:
    """A call of the op; `q` and `k` [B, T, H, K] hold each head once, the call `repeats` times."""

    call: fx.Node
    q: fx.Node
    k: fx.Node
    repeats: int

    def describe(self) -> str:
        _, tokens, heads, width = sizes(self.q)
        _, _, value_heads, value_width = sizes(self.call.args[2])
        g = self.call.args[3]
        gate = "no decay" if g is None else "decay per channel" if len(sizes(g)) == 4 else "decay"
        text = f"T={tokens} H={heads} HV={value_heads} K={width} V={value_width}"
        return f"{text} {dtype(self.q)}; {gate}" + (
            "; heads shared without a copy" if self.repeats > 1 else ""
        )


def anchors(graph: fx.Graph) -> Iterator[fx.Node]:
    """Calls of the op."""
    return (node for node in graph.nodes if is_call(node, DELTA_RULE))


def walk(node: fx.Node) -> DeltaRuleSite:
    """Read the repeats of q and k, where both have the same."""
    q, k = node.args[0], node.args[1]
    found_q, found_k = repeated_heads(q), repeated_heads(k)
    if found_q is None or found_k is None or found_q[1] != found_k[1]:
        return DeltaRuleSite(node, q, k, 1)
    return DeltaRuleSite(node, found_q[0], found_k[0], found_q[1])


def repeated_heads(node: Any) -> tuple[fx.Node, int] | None:
    """(x [B, T, H, K], r) where node [B, T, H * r, K] is x with each head repeated r times."""
    batch, tokens, heads, width = sizes(node)
    flattened = node
    while is_call(flattened, *COPIES):
        flattened = flattened.args[0]
    if not is_call(flattened, *SHAPES):
        return None
    expand = flattened.args[0]
    while is_call(expand, *COPIES):
        expand = expand.args[0]
    if not is_call(expand, aten.expand.default) or len(sizes(expand)) != 5:
        return None
    source = sizes(expand)[2]
    repeats = sizes(expand)[3]
    if not isinstance(repeats, int) or not same(source * repeats, heads):
        return None
    x = expand.args[0]
    if not same_sizes(sizes(expand), (batch, tokens, source, repeats, width)) or not same_sizes(
        sizes(x), (batch, tokens, source, 1, width)
    ):
        return None
    while not same_sizes(sizes(x), (batch, tokens, source, width)):
        if not is_transparent(x):
            return None
        x = x.args[0]
    return x, repeats


def replace(graph: fx.Graph, site: DeltaRuleSite) -> fx.Node:
    """Call the op on heads that are not repeated."""
    if site.repeats == 1:
        return site.call
    with graph.inserting_before(site.call):
        output = call(
            graph, DELTA_RULE, site.q, site.k, *site.call.args[2:], like=site.call,
            **site.call.kwargs,
        )  # fmt: skip
    site.call.replace_all_uses_with(output)
    return output


CALLED = Rewrite(
    "delta_rule.called",
    op="delta_rule",
    anchors=anchors,
    walk=walk,
    replace=replace,
    describe=DeltaRuleSite.describe,
)
