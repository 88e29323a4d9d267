"""Experts that compute every token, scaled to zero where the router did not choose them.

Llama 4's form: the tokens are repeated for all E experts and multiplied by scores that are
sigmoid(-inf) = 0 for all but the chosen experts. An expert of a zero row gives a zero row (there
are no biases and every named activation maps 0 to 0), so only the chosen pairs need computing.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

from torch import fx

from inductor_moe.patterns.moe.activation import name_activation
from inductor_moe.patterns.moe.region import region_between, sole_user
from inductor_moe.patterns.moe.site import ExpertsSite, Projection, replace_experts
from inductor_moe.patterns.rewrite import Refusal, Rewrite
from inductor_moe.patterns.walk import (
    COPIES,
    aten,
    call,
    dtype,
    flat_source,
    is_call,
    is_getitem,
    is_number,
    operands,
    peel,
    peel_casts,
    prims,
    same_sizes,
    sizes,
)


@dataclasses.dataclass(frozen=True)
class DenseSite(ExpertsSite):
    """`weights` holds the chosen logits [T, K]; the routing weights are their sigmoid."""

    scores: fx.Node | None = None


def anchors(graph: fx.Graph) -> Iterator[fx.Node]:
    """Batched matmuls summed over their batch, the last step of a dense expert block."""
    for node in graph.nodes:
        if not is_call(node, aten.bmm.default) or len(node.users) != 1:
            continue
        user = next(iter(node.users))
        if (
            is_call(user, aten.sum.dim_IntList)
            and list(user.args[1]) in ([0], [-3])
            and _find_up(node) is not None
        ):
            yield node


def walk(down: fx.Node) -> DenseSite:
    """Read the block that ends in `down`."""
    output = sole_user(down)
    if len(output.args) > 2 and output.args[2]:
        raise Refusal(f"{output.name} keeps the dim of the experts")
    up = _find_up(down)
    if up is None:
        raise Refusal(f"no second expert GEMM feeds {down.name}")
    x, factor = _read_tokens(up)
    experts, tokens, _ = sizes(down)
    scores, logits, ids = _read_scores(factor, experts, tokens)
    top_k = sizes(ids)[1]
    if not isinstance(top_k, int) or not same_sizes(sizes(logits), (tokens, top_k)):
        raise Refusal(f"{logits} are not the logits of the chosen experts")

    region = region_between([up], down)
    h = peel(down.args[0], lambda n: n in region and is_call(n, *COPIES))
    activation = name_activation(region, up, h)
    if activation is None:
        raise Refusal("the function between the dense expert GEMMs has no name")
    return DenseSite(
        x=x,
        ids=ids,
        weights=logits,
        top_k=top_k,
        ups=(Projection(up, up.args[1], True, None, up),),
        down=Projection(down, down.args[1], True, None, down),
        activation=activation,
        h=h,
        output=output,
        weights_on_input=True,
        scores=scores,
    )


def _find_up(down: fx.Node) -> fx.Node | None:
    """The batched matmul over the same experts and tokens that `down` depends on."""
    stack, seen = [down.args[0]], set[fx.Node]()
    while stack:
        node = stack.pop()
        if not isinstance(node, fx.Node) or node in seen or len(seen) > 256:
            continue
        seen.add(node)
        if is_call(node, aten.bmm.default) and same_sizes(sizes(node)[:2], sizes(down)[:2]):
            return node
        stack.extend(node.all_input_nodes)
    return None


def _read_tokens(up: fx.Node) -> tuple[fx.Node, fx.Node]:
    experts, tokens, _ = sizes(up)
    scaled = flat_source(up.args[0])
    if not same_sizes(sizes(up.args[0])[:2], (experts, tokens)) or not is_call(
        scaled, aten.mul.Tensor
    ):
        raise Refusal(f"{scaled} is not the tokens scaled by their scores")
    for repeated, factor in operands(scaled):
        if is_call(repeated, aten.repeat.default) and isinstance(factor, fx.Node):
            x, repeats = repeated.args
            if len(sizes(x)) == 2 and _is_repeat(repeats, experts):
                return x, factor
    raise Refusal(f"{scaled.name} does not scale the tokens repeated for each expert")


def _is_repeat(repeats: Any, experts: Any) -> bool:
    return len(repeats) == 2 and is_number(repeats[0], experts) and is_number(repeats[1], 1)


def _read_scores(factor: fx.Node, experts: Any, tokens: Any) -> tuple[fx.Node, fx.Node, fx.Node]:
    """(scores, logits [T, K], ids [T, K]): sigmoid of logits scattered into -inf, by expert."""
    if not same_sizes(sizes(factor), (experts * tokens, 1)):
        raise Refusal(f"{factor.name} is not one score for each expert and token")
    swapped = flat_source(factor)
    if not is_call(swapped, aten.permute.default) or list(swapped.args[1]) != [1, 0]:
        raise Refusal(f"{factor.name} is not in expert order")
    scores = swapped.args[0]
    sigmoid = peel_casts(scores)
    if not is_call(sigmoid, aten.sigmoid.default):
        raise Refusal(f"{sigmoid} is no sigmoid of the router's logits")
    scatter = peel_casts(sigmoid.args[0])
    if not is_call(scatter, aten.scatter.src) or scatter.args[1] not in (1, -1):
        raise Refusal(f"{scatter} does not scatter the chosen logits")
    base, _, ids, logits = scatter.args
    if not is_call(base, aten.full.default) or not is_number(base.args[1], -math.inf):
        raise Refusal(f"{base} does not fill the experts that were not chosen with -inf")
    if not same_sizes(sizes(base), (tokens, experts)):
        raise Refusal(f"{base} has shape {sizes(base)}, not [tokens, experts]")
    if not is_getitem(ids, 1, aten.topk.default):
        raise Refusal(f"{ids} are not the distinct choices of a top-k")
    return scores, logits, ids


def replace(graph: fx.Graph, site: DenseSite) -> fx.Node:
    """Insert the op with the sigmoid of the chosen logits as routing weights."""
    assert site.scores is not None
    with graph.inserting_before(site.output):
        cast = prims.convert_element_type.default
        wide = call(graph, cast, site.weights, _sigmoid_dtype(site.scores), like=site.output)
        chosen = call(graph, aten.sigmoid.default, wide, like=site.output)
        weights = call(graph, cast, chosen, dtype(site.scores), like=site.output)
    return replace_experts(graph, dataclasses.replace(site, weights=weights))


def _sigmoid_dtype(scores: fx.Node) -> Any:
    return dtype(peel_casts(scores))


DENSE = Rewrite(
    "moe.experts.dense",
    op="moe_experts",
    anchors=anchors,
    walk=walk,
    replace=replace,
    describe=ExpertsSite.describe,
)
