"""Expert blocks as gathered bmm pairs and as sorted grouped GEMM pairs.

Both forms end alike: rows times routing weights, summed over the experts of each token. They
differ in how rows meet weights: `batched_mm` gathers each pair's weight matrices, `grouped_mm`
sorts the pairs by expert.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from inductor_moe.patterns.moe.activation import name_activation
from inductor_moe.patterns.moe.region import (
    Combine,
    finish_projection,
    masked,
    region_between,
)
from inductor_moe.patterns.moe.rows import (
    SORTS,
    floor_divided,
    is_inverse,
    non_negative,
    pair_column,
    repeated_rows,
    same_ids,
    sorts_ascending,
    zeroed,
)
from inductor_moe.patterns.moe.site import ExpertsSite, Projection, replace_experts
from inductor_moe.patterns.rewrite import Refusal, Rewrite
from inductor_moe.patterns.walk import (
    aten,
    dtype,
    flat_source,
    gather,
    is_call,
    is_float_cast,
    is_getitem,
    is_number,
    is_transparent,
    operands,
    peel,
    peel_casts,
    prims,
    same,
    sizes,
    unrounded,
)


def _grouped_targets() -> tuple[Any, ...]:
    targets = [aten._grouped_mm.default]
    fallback = getattr(torch.ops.transformers, "grouped_mm_fallback", None)
    return (*targets, fallback.default) if fallback is not None else tuple(targets)


def grouped_anchors(graph: fx.Graph) -> Iterator[fx.Node]:
    """The last of the grouped GEMMs that share their offsets."""
    groups: dict[Any, fx.Node] = {}
    targets = _grouped_targets()
    for node in graph.nodes:
        if is_call(node, *targets):
            groups[node.args[2] if len(node.args) > 2 else node.kwargs.get("offs")] = node
    yield from groups.values()


def batched_anchors(graph: fx.Graph) -> Iterator[fx.Node]:
    """The last of the bmms whose weights are gathered by the same ids."""
    groups: dict[Any, fx.Node] = {}
    for node in graph.nodes:
        operand = _gathered_operand(node)
        if operand is not None:
            groups[flat_source(operand[1])] = node
    yield from groups.values()


def _gathered_operand(node: Any) -> tuple[fx.Node, fx.Node, bool] | None:
    """(weight [E, ., .], ids [S], whether the weight is the right operand) of a gathered bmm."""
    if not is_call(node, aten.bmm.default):
        return None
    for index, operand in enumerate(node.args):
        found = gather(peel(operand))
        if found is not None and len(sizes(found[0])) == 3 and len(sizes(found[1])) == 1:
            return (*found, index == 1)
    return None


class _Grouped:
    """One grouped_mm block: the sort, its offsets and what they say of row order."""

    order = "sorted"

    def __init__(self, down: fx.Node) -> None:
        self.down = down
        self.offsets = down.args[2] if len(down.args) > 2 else down.kwargs.get("offs")
        if not isinstance(self.offsets, fx.Node):
            raise Refusal(f"{down.name} has no offsets")
        self.experts = sizes(down.args[1])[0]
        if not isinstance(self.experts, int) or len(sizes(down.args[1])) != 3:
            raise Refusal(f"{down.name} has no weight of shape [experts, in, out]")
        self._read_offsets()
        self._read_sort()

    def _read_offsets(self) -> None:
        cumsum = peel(self.offsets, lambda n: is_call(n, prims.convert_element_type.default))
        if not is_call(cumsum, aten.cumsum.default) or cumsum.args[1] not in (0, -1):
            raise Refusal(f"the offsets {self.offsets.name} are no cumulative sum of token counts")
        counts = peel(cumsum.args[0], lambda n: is_call(n, prims.convert_element_type.default))
        if not is_call(counts, aten.histc.default):
            raise Refusal(f"{counts} does not count the tokens of each expert")
        bins, low, high = (*counts.args[1:], *(100, 0, 0)[len(counts.args) - 1 :])
        if not (
            is_number(bins, self.experts)
            and is_number(low, 0)
            and is_number(high, self.experts - 1)
        ):
            raise Refusal(
                f"{counts.name} counts {bins} bins from {low} to {high}; "
                f"there are {self.experts} experts"
            )
        self.counted = peel(
            counts.args[0], lambda n: is_call(n, prims.convert_element_type.default)
        )

    def _read_sort(self) -> None:
        sort = self.counted.args[0] if is_getitem(self.counted, 0, *SORTS) else None
        if sort is None:
            raise Refusal(f"{self.counted} is not the sorted list of expert numbers")
        if not sorts_ascending(sort):
            raise Refusal(f"{sort.name} does not sort in ascending order along the pairs")
        self.sorted_ids = self.row_ids = self.counted
        self.ids = sort.args[0]
        if len(sizes(self.ids)) != 1:
            raise Refusal(f"{sort.name} does not sort a flat list of expert numbers")
        self.perm = next((u for u in sort.users if is_getitem(u, 1, sort.target)), None)
        if self.perm is None:
            raise Refusal(f"the order found by {sort.name} is not used")

    def projection(self, gemm: fx.Node) -> Projection:
        weight = gemm.args[1]
        offsets = gemm.args[2] if len(gemm.args) > 2 else gemm.kwargs.get("offs")
        extra = {key: value for key, value in gemm.kwargs.items() if key != "offs"}
        if any(v is not None for v in (*gemm.args[3:], *extra.values())):
            raise Refusal(f"{gemm.name} has a bias or an output dtype of its own")
        if offsets is not self.offsets or len(sizes(weight)) != 3:
            raise Refusal(f"{gemm.name} has other offsets than {self.down.name}")
        if not same(sizes(weight)[0], self.experts):
            raise Refusal(f"{gemm.name} has another number of experts than {self.down.name}")
        rows, bias = finish_projection(gemm, self.experts, self.sorted_ids, self.sorted_ids)
        return Projection(gemm, weight, True, bias, rows)

    def is_up(self, node: Any) -> bool:
        return is_call(node, *_grouped_targets()) and node is not self.down and self.shares(node)

    def shares(self, node: fx.Node) -> bool:
        return self.offsets in (
            node.args[2] if len(node.args) > 2 else None,
            node.kwargs.get("offs"),
        )

    def rows_in(self, gemm: fx.Node) -> Any:
        return gemm.args[0]

    def unmask(self, node: Any) -> Any:
        found = masked(node, self.sorted_ids, self.experts)
        return node if found is None else found

    def column(self, factor: Any, order: str) -> fx.Node | None:
        if order != "sorted":
            return pair_column(factor, order, dtype(self.down))
        found = gather(peel_casts(factor, dtype(self.down)))
        if found is None or peel(found[1]) is not self.perm or len(sizes(found[0])) != 1:
            return None
        return found[0]

    def token_rows(self, node: Any) -> tuple[fx.Node, int] | None:
        """(x, K) where node gathers row perm // K of x."""
        found = gather(node)
        if found is None:
            return None
        token = floor_divided(peel(found[1]))
        if token is not None and peel(token[0]) is self.perm:
            return found[0], token[1]
        if peel(found[1]) is self.perm:
            return repeated_rows(found[0])
        return None

    def skipped(self, _weights: fx.Node | None) -> fx.Node | None:
        return None

    def unsort(self, _rows: fx.Node, node: fx.Node) -> bool:
        """Whether node gathers by the inverse of the sort's permutation."""
        found = gather(node)
        return found is not None and is_inverse(peel(found[1]), self.perm)


class _Batched:
    """One batched_mm block: rows are in pair order throughout."""

    order = "pairs"
    sorted_ids = None

    def __init__(self, down: fx.Node) -> None:
        self.down = down
        operand = _gathered_operand(down)
        assert operand is not None
        self.experts = sizes(operand[0])[0]
        if not isinstance(self.experts, int):
            raise Refusal(f"{operand[0].name} has a symbolic number of experts")
        self.row_ids = self.ids = operand[1]

    def projection(self, gemm: fx.Node) -> Projection:
        operand = _gathered_operand(gemm)
        if operand is None or not same_ids(operand[1], self.ids):
            raise Refusal(f"{gemm.name} gathers its weights by other ids than {self.down.name}")
        if len(gemm.args) > 2 or gemm.kwargs:
            raise Refusal(f"{gemm.name} has an output dtype of its own")
        weight, _, on_the_right = operand
        if not same(sizes(weight)[0], self.experts):
            raise Refusal(f"{gemm.name} has another number of experts than {self.down.name}")
        vector = sizes(self.rows_in(gemm))[1 if on_the_right else 2]
        if not same(vector, 1):
            raise Refusal(f"{gemm.name} multiplies more than one row by each pair's weights")
        rows, bias = finish_projection(gemm, self.experts, self.ids, None)
        if bias is not None and not same(sizes(bias)[1], sizes(weight)[2 if on_the_right else 1]):
            raise Refusal(f"the bias {bias.name} does not fit the weight {weight.name}")
        return Projection(gemm, weight, on_the_right, bias, rows)

    def is_up(self, node: Any) -> bool:
        operand = _gathered_operand(node)
        return operand is not None and same_ids(operand[1], self.ids) and node is not self.down

    def rows_in(self, gemm: fx.Node) -> Any:
        operand = _gathered_operand(gemm)
        assert operand is not None
        return gemm.args[0 if operand[2] else 1]

    def unmask(self, node: Any) -> Any:
        return node

    def column(self, factor: Any, order: str) -> fx.Node | None:
        return pair_column(factor, order, dtype(self.down))

    def token_rows(self, node: Any) -> tuple[fx.Node, int] | None:
        return repeated_rows(node)

    def skipped(self, weights: fx.Node | None) -> fx.Node | None:
        """Pairs of other ranks' experts: clamped to the last expert here, at a weight of zero."""
        clamp = flat_source(self.ids)
        if not is_call(clamp, aten.clamp_max.default) or weights is None:
            return None
        return zeroed(weights) if is_number(clamp.args[1], self.experts - 1) else None

    def unsort(self, _rows: fx.Node, _node: fx.Node) -> bool:
        return False


def _ups(block: _Grouped | _Batched) -> list[fx.Node]:
    """The up projections that the down projection's input depends on, in graph order."""
    found: list[fx.Node] = []
    stack, seen = [block.rows_in(block.down)], set()
    while stack:
        node = stack.pop()
        if node in seen or not isinstance(node, fx.Node):
            continue
        seen.add(node)
        if block.is_up(node):
            found.append(node)
        elif len(seen) < 512:
            stack.extend(node.all_input_nodes)
    if not found:
        raise Refusal(f"no second expert GEMM of the same routing feeds {block.down.name}")
    position = {node: index for index, node in enumerate(block.down.graph.nodes)}
    return sorted(found, key=position.__getitem__)


def _read(block: _Grouped | _Batched) -> ExpertsSite:
    gemms = _ups(block)
    ups = tuple(block.projection(gemm) for gemm in gemms)
    down = block.projection(block.down)
    region = region_between([up.value for up in ups], block.down)

    h = peel(block.rows_in(block.down), lambda n: is_transparent(n) and n in region)
    activation = name_activation(region, ups[0].value, h) if len(ups) == 1 else None

    inputs = {_read_input(block, up.node) for up in ups}
    if len(inputs) != 1:
        raise Refusal("the up projections have different inputs")
    x, top_k, input_weights = inputs.pop()

    combine = Combine(
        down.value, block.column, block.unsort, block.order, dtype(block.down), down.width_out
    )
    if combine.top_k != top_k or not same(combine.tokens, sizes(x)[0]):
        raise Refusal(f"tokens are repeated {top_k} times but combined {combine.top_k} at a time")
    if combine.weights is not None and input_weights is not None:
        raise Refusal("routing weights scale both the input and the output")
    weights = combine.weights if combine.weights is not None else input_weights
    if weights is None:
        raise Refusal("no routing weights are applied")
    _check_pairs(weights, x, top_k, "the routing weights")
    _check_pairs(block.ids, x, top_k, "the expert numbers")
    return ExpertsSite(
        x=x,
        ids=block.ids,
        weights=weights,
        top_k=top_k,
        ups=ups,
        down=down,
        activation=activation,
        h=h,
        output=combine.output,
        weights_on_input=input_weights is not None,
        wrap_ids=isinstance(block, _Batched) and not non_negative(block.ids),
        skip=block.skipped(combine.weights),
    )


def _check_pairs(node: fx.Node, x: fx.Node, top_k: int, what: str) -> None:
    if not same(tensor_numel(node), sizes(x)[0] * top_k):
        raise Refusal(f"{what} {node.name} have shape {sizes(node)}, not one for each pair")


def tensor_numel(node: fx.Node) -> Any:
    """The number of elements of a node's tensor."""
    count: Any = 1
    for size in sizes(node):
        count = count * size
    return count


def _read_input(block: _Grouped | _Batched, gemm: fx.Node) -> tuple[fx.Node, int, fx.Node | None]:
    """(x [T, H], K, routing weights on the input) of an up projection."""
    node, weights = block.rows_in(gemm), None
    while True:
        found = block.token_rows(node)
        if found is not None:
            if len(sizes(found[0])) != 2:
                raise Refusal(f"the tokens {found[0].name} have shape {sizes(found[0])}")
            return (*found, weights)
        unmasked = block.unmask(node)
        if unmasked is not node:
            node = unmasked
        elif is_transparent(node):
            node = node.args[0]
        elif is_float_cast(node):
            node = unrounded(node, dtype(gemm)).args[0]
        elif is_call(node, aten.mul.Tensor) and weights is None:
            node, weights = _split_weighted(block, node)
        else:
            raise Refusal(f"{node} does not repeat each token for its experts")


def _split_weighted(block: _Grouped | _Batched, node: fx.Node) -> tuple[fx.Node, fx.Node]:
    for rows, factor in operands(node):
        if not isinstance(factor, fx.Node) or not isinstance(rows, fx.Node):
            continue
        weights = block.column(factor, block.order)
        if weights is not None:
            return rows, weights
    raise Refusal(f"{node.name} multiplies the tokens by something else than routing weights")


GROUPED = Rewrite(
    "moe.experts.grouped_mm",
    op="moe_experts",
    anchors=grouped_anchors,
    walk=lambda node: _read(_Grouped(node)),
    replace=replace_experts,
    describe=ExpertsSite.describe,
)

BATCHED = Rewrite(
    "moe.experts.batched_mm",
    op="moe_experts",
    anchors=batched_anchors,
    walk=lambda node: _read(_Batched(node)),
    replace=replace_experts,
    describe=ExpertsSite.describe,
)
