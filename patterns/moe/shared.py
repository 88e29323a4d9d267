"""The shared expert beside fused experts, in their launches where there are few tokens.

Models add an expert that every token passes through, some of them scaled by a sigmoid. For many
tokens its GEMMs are best left apart; for few, its launches cost more than its weights.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from inductor_moe.ops.moe import moe_experts
from inductor_moe.ops.quant import moe_experts_quantized
from inductor_moe.ops.shared import moe_experts_shared
from inductor_moe.patterns.evaluate import CannotEvaluate, evaluate, leaves
from inductor_moe.patterns.moe.activation import Activation, equal_on_probes, probes
from inductor_moe.patterns.moe.region import sole_user
from inductor_moe.patterns.quant import PackedWeight, read_packed
from inductor_moe.patterns.rewrite import Refusal, Rewrite
from inductor_moe.patterns.walk import (
    COPIES,
    SHAPES,
    aten,
    call,
    dtype,
    flat_source,
    is_call,
    is_float_cast,
    operands,
    peel,
    plain_binary,
    same,
    same_sizes,
    sizes,
    tensor,
    unrounded,
    without_ones,
)

FEW_TOKENS = 8
TARGETS = (moe_experts._opoverload, moe_experts_quantized._opoverload)


@dataclasses.dataclass(frozen=True)
class Linear:
    """rows [T, K] times weight.T, weight [N, K] dense or packed."""

    node: fx.Node
    rows: fx.Node
    weight: fx.Node

    @property
    def packed(self) -> PackedWeight | None:
        return read_packed(self.weight)

    def tensors(self) -> list[fx.Node | None]:
        """The weight as `moe_experts_shared` takes it."""
        packed = self.packed
        if packed is None:
            return [self.weight, None, None]
        return [packed.packed, packed.scales, packed.zeros]


@dataclasses.dataclass(frozen=True)
class RoutedSite:
    """The arguments of the experts' node that the new op takes over."""

    node: fx.Node
    x: fx.Node
    ids: fx.Node
    weights: fx.Node
    tensors: list[fx.Node | None]
    group_size: int
    activation: Activation


@dataclasses.dataclass(frozen=True)
class SharedSite:
    """total = routed + [sigmoid(logits) *] down(act(gate(x)) * up(x)); gate may be None."""

    routed: RoutedSite
    gate: Linear | None
    up: Linear
    down: Linear
    logits: fx.Node | None
    total: fx.Node

    def describe(self) -> str:
        text = f"shared expert I={sizes(self.up.weight)[0]}"
        return text + (", times a sigmoid" if self.logits is not None else "")


def anchors(graph: fx.Graph) -> Iterator[fx.Node]:
    """Fused experts whose result is added to something."""
    for node in graph.nodes:
        if is_call(node, *TARGETS) and _added(node):
            yield node


def _added(node: fx.Node) -> bool:
    while len(node.users) == 1:
        node = next(iter(node.users))
        if is_call(node, aten.add.Tensor):
            return True
        if not (is_call(node, *SHAPES, *COPIES) or is_float_cast(node)):
            break
    return False


def walk(experts: fx.Node) -> SharedSite:
    """Read the shared expert whose output is added to that of `experts`."""
    routed = _read_routed(experts)
    least = dtype(routed.x)
    node = experts
    while not is_call(user := sole_user(node), aten.add.Tensor):
        node = _unscaled(user, least)
    if not plain_binary(user, aten.add.Tensor):
        raise Refusal(f"{user.name} adds with an alpha of its own")
    other = next(right for left, right in operands(user) if left is node)
    if other is node or not isinstance(other, fx.Node):
        raise Refusal(f"{user.name} adds no shared expert")
    for operand in (node, other):
        if not same_sizes(sizes(operand), sizes(user)):
            raise Refusal(f"{user.name} broadcasts {operand.name}")
    product, logits = _read_gate(_inside(other, least), sizes(routed.x)[1], least)
    down = _read_linear(product)
    gate, up = _read_halves(_inside(down.rows, least), routed.activation, least)
    for linear in (gate, up):
        if linear is not None and flat_source(linear.rows) is not flat_source(routed.x):
            raise Refusal(f"{linear.node.name} has another input than the routed experts")
    site = SharedSite(routed, gate, up, down, logits, user)
    _check_weights(site)
    return site


def _read_routed(node: fx.Node) -> RoutedSite:
    schema = [argument.name for argument in node.target._schema.arguments]
    named = {**dict(zip(schema, node.args, strict=False)), **node.kwargs}
    x = named["x"]
    tokens, top_k = sizes(named["ids"])
    if not isinstance(tokens, int) or tokens > FEW_TOKENS:
        raise Refusal(f"there are {tokens} tokens: more than {FEW_TOKENS} are faster apart")
    if "w_up" in named:
        packs: list[Any] = [named["w_up"], None, None, named["w_down"], None, None]
        experts, groups = sizes(named["w_up"])[0], {0}
    else:
        packs = [named[f"{side}_{part}"] for side in ("up", "down")
                 for part in ("packed", "scales", "zeros")]  # fmt: skip
        experts = sizes(named["up_packed"])[0]
        groups = {named["up_group_size"], named["down_group_size"]}
    if tokens * top_k > experts:
        raise Refusal(f"{tokens} tokens choose {top_k} of {experts} experts each: sorted GEMMs")
    if len(groups) != 1:
        raise Refusal("the routed experts' weights are packed in groups of different size")
    if named["bias_up"] is not None or named["bias_down"] is not None:
        raise Refusal("the routed experts have biases")
    if named.get("weights_on_input"):
        raise Refusal("the routing weights scale the input")
    activation = Activation(
        named["activation"], named["gate"], named.get("alpha", 1.0), named.get("up_offset", 0.0),
        named.get("limit"),
    )  # fmt: skip
    return RoutedSite(node, x, named["ids"], named["weights"], packs, groups.pop(), activation)


def _unscaled(node: fx.Node, least: torch.dtype) -> fx.Node:
    """`node` if it keeps values and their order."""
    if is_float_cast(node):
        return unrounded(node, least)
    if is_call(node, *SHAPES, *COPIES):
        return node
    raise Refusal(f"{node.name} ({node.target}) is no sum with a shared expert")


def _inside(node: fx.Node, least: torch.dtype) -> fx.Node:
    """Go up through views and casts that nothing else uses."""
    while True:
        sole_user(node)
        if not (is_float_cast(node) or is_call(node, *SHAPES, *COPIES)):
            return node
        node = _unscaled(node, least).args[0]


def _read_gate(node: fx.Node, hidden: int, least: torch.dtype) -> tuple[fx.Node, fx.Node | None]:
    """(the shared expert's output, the logits of its gate or None)."""
    if not is_call(node, aten.mul.Tensor):
        return node, None
    for factor, product in operands(node):
        sigmoid = factor
        while is_float_cast(sigmoid) or is_call(sigmoid, *SHAPES, *COPIES):
            sigmoid = _unscaled(sigmoid, least).args[0]
        if not is_call(sigmoid, aten.sigmoid.default):
            continue
        logits, shape = sigmoid.args[0], sizes(node)
        if (
            same(shape[-1], hidden)
            and same_sizes(sizes(product), shape)
            and same_sizes(sizes(factor), (*shape[:-1], 1))
            and dtype(logits).is_floating_point
        ):
            return _inside(product, least), logits
    raise Refusal(f"{node.name} does not multiply a shared expert by the sigmoid of a logit")


def _read_linear(matmul: Any) -> Linear:
    if not is_call(matmul, aten.mm.default) or len(matmul.args) > 2 or matmul.kwargs:
        raise Refusal(f"{matmul} is no matmul without a bias")
    rows, operand = matmul.args[0], peel(matmul.args[1], lambda n: is_call(n, *COPIES))
    if not is_call(operand, aten.permute.default) or list(operand.args[1]) != [1, 0]:
        raise Refusal(f"{matmul.name} multiplies by {operand.name}, no transposed weight")
    weight = peel(operand.args[0], lambda n: is_call(n, *COPIES))
    if len(sizes(weight)) != 2 or not same_sizes(sizes(weight), sizes(operand)[::-1]):
        raise Refusal(f"{weight.name} has shape {sizes(weight)}, not [N, K]")
    return Linear(matmul, rows, weight)


def _read_halves(
    h: fx.Node, activation: Activation, least: torch.dtype
) -> tuple[Linear | None, Linear]:
    """(gate, up) of a shared expert with the routed experts' activation."""
    sources, gated = leaves(h), activation.gate != "none"
    if len(sources) != (2 if gated else 1):
        raise Refusal(f"{h.name} is no activation of {2 if gated else 1} projections of a token")
    _check_region(h, sources, least)
    for order in (sources, sources[::-1]):
        try:
            found = evaluate(h, dict(zip(order, probes(), strict=False)))
        except CannotEvaluate:
            break
        if equal_on_probes(found, activation):
            linears = [_read_linear(_unviewed(source)) for source in order]
            return (linears[0] if gated else None), linears[-1]
    raise Refusal(f"{h.name} has another activation than the routed experts")


def _unviewed(node: fx.Node) -> fx.Node:
    """Go up through views that nothing else uses."""
    while is_call(node, *SHAPES, *COPIES):
        node = node.args[0]
        sole_user(node)
    return node


def _check_region(h: fx.Node, sources: list[fx.Node], least: torch.dtype) -> None:
    """Between the projections and h: nothing is broadcast, used elsewhere or rounded to less."""
    for source in sources:
        if not same_sizes(without_ones(sizes(source)), without_ones(sizes(h))):
            raise Refusal(f"{source.name} has another shape than {h.name}")
    stack, region = [h], set[fx.Node]()
    while stack:
        node = stack.pop()
        if node in region or node in sources:
            continue
        region.add(node)
        if is_float_cast(node):
            unrounded(node, least)
        stack.extend(node.all_input_nodes)
    for node in [*region, *sources]:
        outside = [user for user in node.users if user not in region]
        if node is not h and outside:
            raise Refusal(f"{node.name}, inside the shared expert, is used by {outside[0].name}")


def _check_weights(site: SharedSite) -> None:
    """The shared expert's weights are of the routed experts' kind."""
    routed, x = site.routed, site.routed.x
    values, scales, zeros = routed.tensors[:3]
    for linear in (site.gate, site.up, site.down):
        if linear is None:
            continue
        if not same(sizes(linear.rows)[0], sizes(x)[0]) or dtype(linear.node) != dtype(x):
            raise Refusal(f"{linear.node.name} has other rows than the routed experts")
        packed = linear.packed
        if (packed is None) != (scales is None):
            raise Refusal(f"{linear.weight.name} is packed, or the routed experts are: not both")
        if packed is None:
            if dtype(linear.weight) != dtype(x) or tensor(linear.weight).stride(1) != 1:
                raise Refusal(f"{linear.weight.name} is no row-major weight of dtype {dtype(x)}")
        elif (
            packed.group_size != routed.group_size
            or dtype(packed.packed) != dtype(values)
            or dtype(packed.scales) != dtype(scales)
            or (packed.zeros is None) != (zeros is None)
        ):
            raise Refusal(f"{linear.weight.name} is packed otherwise than the routed experts")
    if not same(sizes(site.down.weight)[0], sizes(x)[1]):
        raise Refusal(f"{site.down.node.name} has other columns than the routed experts")


def replace(graph: fx.Graph, site: SharedSite) -> fx.Node:
    """Insert the op in the place of the sum."""
    routed, total = site.routed, site.total
    activation = routed.activation
    with graph.inserting_before(total):
        logits = site.logits
        column = (sizes(routed.x)[0], 1)
        if logits is not None and not same_sizes(sizes(logits), column):
            logits = call(graph, aten.reshape.default, logits, list(column), like=total)
        own_gate = [None, None, None] if site.gate is None else site.gate.tensors()
        output = call(
            graph, moe_experts_shared._opoverload, routed.x, routed.ids, routed.weights, logits,
            routed.tensors, [*own_gate, *site.up.tensors(), *site.down.tensors()],
            routed.group_size, activation.activation, activation.gate, activation.alpha,
            activation.up_offset, activation.limit, dtype(total),
            like=routed.node,
        )  # fmt: skip
        if not same_sizes(sizes(output), sizes(total)):
            output = call(
                graph, aten.reshape.default, output, list(sizes(total)), like=routed.node
            )
    total.replace_all_uses_with(output)
    return output


SHARED = Rewrite(
    "moe.shared_expert",
    op="moe_experts",
    anchors=anchors,
    walk=walk,
    replace=replace,
    describe=SharedSite.describe,
    optional=True,
)
