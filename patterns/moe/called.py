"""Expert blocks that were captured as two ops become one where the function between has a name."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from torch import fx

from inductor_moe.ops.moe import moe_down_combine, moe_up
from inductor_moe.patterns.moe.activation import Activation, name_activation
from inductor_moe.patterns.moe.region import region_between
from inductor_moe.patterns.moe.site import ExpertsSite, Projection, replace_experts
from inductor_moe.patterns.rewrite import Refusal, Rewrite
from inductor_moe.patterns.walk import is_call, is_transparent, peel, sizes

UP, DOWN = moe_up._opoverload, moe_down_combine._opoverload


@dataclasses.dataclass(frozen=True)
class CalledSite:
    """The call of the down half, and the block it ends if that can be one op."""

    down: fx.Node
    block: ExpertsSite | None

    def describe(self) -> str:
        if self.block is not None:
            return self.block.describe()
        return "captured as two ops; the function between the GEMMs keeps its nodes"


def anchors(graph: fx.Graph) -> Iterator[fx.Node]:
    """Calls of the down half."""
    yield from (node for node in graph.nodes if is_call(node, DOWN))


def walk(down: fx.Node) -> CalledSite:
    """Read what lies between the two halves; a block that cannot be one op stays two."""
    try:
        return CalledSite(down, _read(down))
    except Refusal:
        return CalledSite(down, None)


def _read(down: fx.Node) -> ExpertsSite | None:
    h, w_down, ids, weights, bias = (*down.args, *(None,) * 5)[:5]
    up = _find_up(h, ids)
    if up is None or not isinstance(sizes(ids)[1], int):
        return None
    x, w_up, _, up_bias, input_weights = (*up.args, *(None,) * 5)[:5]
    if (weights is None) == (input_weights is None):
        return None
    region = region_between([up], down)
    h = peel(h, lambda node: is_transparent(node) and node in region)
    activation: Activation | None = name_activation(region, up, h)
    if activation is None:
        return None
    return ExpertsSite(
        x=x,
        ids=ids,
        weights=input_weights if weights is None else weights,
        top_k=sizes(ids)[1],
        ups=(Projection(up, w_up, False, up_bias, up),),
        down=Projection(down, w_down, False, bias, down),
        activation=activation,
        h=h,
        output=down,
        weights_on_input=weights is None,
    )


def _find_up(h: fx.Node, ids: fx.Node) -> fx.Node | None:
    """The one call of the up half with these ids that h depends on."""
    found, stack, seen = [], [h], set[fx.Node]()
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        if is_call(node, UP) and node.args[2] is ids:
            found.append(node)
        elif len(seen) < 64:
            stack.extend(node.all_input_nodes)
    return found[0] if len(found) == 1 else None


def replace(graph: fx.Graph, site: CalledSite) -> fx.Node:
    """Call the whole op in place of its halves."""
    return site.down if site.block is None else replace_experts(graph, site.block)


CALLED = Rewrite(
    "moe.experts.called",
    op="moe_experts",
    anchors=anchors,
    walk=walk,
    replace=replace,
    describe=CalledSite.describe,
)
