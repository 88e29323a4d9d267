"""The delta rule written by hand becomes the op: one step, an unrolled loop, unrolled chunks.

The walk finds a chain of state updates and what it reads; that it is the delta rule is proved by
evaluation, so spellings need no list. What the op does itself (casts, l2 norm, scale) is then
taken from the graph where it is certain.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import fx

from inductor_moe.ops.delta_rule import delta_rule
from inductor_moe.patterns.delta_rule.boundary import Region, read_region
from inductor_moe.patterns.delta_rule.chain import after, last_updates, read_chain
from inductor_moe.patterns.delta_rule.peel import (
    Operand,
    check_dtypes,
    check_rounding,
    without_norm,
    without_scale,
)
from inductor_moe.patterns.delta_rule.proof import Layout, Parts, prove
from inductor_moe.patterns.rewrite import Refusal, Rewrite
from inductor_moe.patterns.walk import (
    aten,
    call,
    dtype,
    is_call,
    is_float_cast,
    number,
    prims,
    same,
    same_sizes,
    sizes,
)

STATE_DTYPES = (torch.float32, torch.bfloat16, torch.float64)


@dataclasses.dataclass(frozen=True)
class UnrolledSite:
    """q, k, v, g, beta and state as they are read; `out` and `finals` are replaced."""

    parts: Parts
    operands: dict[str, Operand]
    scale: float
    l2norm_eps: float | None
    state_dtype: torch.dtype
    finals: tuple[fx.Node, ...]
    interior: frozenset[fx.Node]
    before: fx.Node
    form: str

    def describe(self) -> str:
        letters = self.parts.letters
        text = f"T={letters['T']} HV={letters['H']} K={letters['K']} V={letters['V']}"
        gate = self.parts.layouts.get("g")
        decay = "no decay" if gate is None else "decay per channel" if "K" in gate else "decay"
        norm = "; l2 norm inside" if self.l2norm_eps is not None else ""
        return f"{self.form}; {text} {dtype(self.parts.out)}; {decay}{norm}"


def anchors(graph: fx.Graph) -> Iterator[fx.Node]:
    """The last state update of every chain."""
    return last_updates(graph)


def walk(last: fx.Node) -> UnrolledSite:
    """Read the chain, prove what it computes, and see what else the op can take over."""
    order = {node: place for place, node in enumerate(last.graph.nodes)}
    chain = read_chain(last)
    outputs = after(chain.output)
    final = last if chain.finished else None
    ends = outputs + ([last] if final is not None else [])
    region = read_region(chain, ends, order)
    parts = prove(chain, region, outputs, final)
    interior = _interior(region, parts, order)
    check_dtypes((*interior, *region.inputs), chain.state)
    _check_private(interior, {parts.out, *chain.updates[-1:]} if final else {parts.out})
    operands = {part: Operand(node, parts.layouts[part]) for part, node in parts.nodes.items()}
    scale, eps = parts.scale, None
    operands["q"], factor = without_scale(operands["q"])
    scale *= factor
    norms = without_norm(operands["q"]), without_norm(operands["k"])
    if norms[0] is not None and norms[1] is not None and norms[0][1] == norms[1][1]:
        (operands["q"], eps), (operands["k"], _) = norms
    kept, finals = _state(chain.state, final, interior)
    check_rounding(interior, (*region.inputs, chain.state, parts.out, *finals))
    form = "one step"
    if chain.chunked:
        form = f"{chain.length} chunks of {chain.inner}"
    elif chain.length > 1:
        form = f"loop of {chain.length} steps"
    before = _place(parts, operands, finals, interior, order)
    return UnrolledSite(
        parts, _same_dtype(operands, parts.out), scale, eps, kept, finals, frozenset(interior),
        before, form,
    )  # fmt: skip


def _interior(region: Region, parts: Parts, order: dict[fx.Node, int]) -> list[fx.Node]:
    """The nodes of the region that the output and the last state need, in graph order."""
    inside, found = set(region.nodes), set()
    stack = [parts.out, *([parts.final] if parts.final is not None else [])]
    while stack:
        node = stack.pop()
        if node in inside and node not in found:
            found.add(node)
            stack.extend(node.all_input_nodes)
    return sorted(found, key=order.__getitem__)


def _check_private(interior: Sequence[fx.Node], ends: set[fx.Node]) -> None:
    """Refuse where a value that depends on the state is used elsewhere, too."""
    inside = set(interior)
    for node in interior:
        if node in ends:
            continue
        outside = next((user for user in node.users if user not in inside), None)
        # A move, cast or gate that others read as well simply stays.
        if outside is not None and not _stays(node, inside):
            raise Refusal(f"{node.name} is used outside the rule by {outside.name}")


def _stays(node: fx.Node, inside: set[fx.Node]) -> bool:
    """Whether node only prepares an input: keeping it costs little."""
    stack, seen = [node], set()
    while stack:
        current = stack.pop()
        if current in seen or current not in inside:
            continue
        seen.add(current)
        if len(seen) > 12 or is_call(
            current, aten.bmm.default, aten.mm.default, aten.linalg_solve_triangular.default,
            aten.sub.Tensor, aten.add.Tensor, aten.sum.dim_IntList,
        ):  # fmt: skip
            return False
        stack.extend(current.all_input_nodes)
    return True


def _state(
    state: fx.Node, final: fx.Node | None, interior: Sequence[fx.Node]
) -> tuple[torch.dtype, tuple[fx.Node, ...]]:
    """The dtype in which the op keeps the state, and the nodes that its new state replaces.

    That is the stored dtype where the new state is rounded to it, too.
    """
    stored = dtype(state)
    if stored == torch.float64 and state.meta["val"].device.type != "cpu":
        raise Refusal(f"the state {state.name} is float64, which has no kernel")
    wide = torch.float64 if stored == torch.float64 else torch.float32
    if final is None:
        return wide, ()
    inside = set(interior)
    outside = tuple(user for user in final.users if user not in inside)
    if stored not in STATE_DTYPES:
        return wide, (final,)
    if stored == dtype(final):
        return stored, (final,)
    if outside and all(is_float_cast(user) and dtype(user) == stored for user in outside):
        return stored, outside
    return wide, (final,)


def _same_dtype(operands: dict[str, Operand], out: fx.Node) -> dict[str, Operand]:
    """q, k and v without their casts if all come from the dtype of the output."""
    bare = {part: operands[part].bare() for part in ("q", "k", "v")}
    if all(dtype(x.node) == dtype(out) for x in bare.values()):
        return operands | bare
    return operands


def _place(
    parts: Parts,
    operands: dict[str, Operand],
    finals: tuple[fx.Node, ...],
    interior: Sequence[fx.Node],
    order: dict[fx.Node, int],
) -> fx.Node:
    """The node before which the op goes: after its inputs, before its users."""
    ready = max(order[x.node] for x in operands.values())
    ends = (parts.out, *finals)
    used = min(order[user] for node in ends for user in node.users if user not in interior)
    if ready >= used:
        raise Refusal("a result is used before all inputs are known")
    nodes = list(parts.out.graph.nodes)
    first = min(order[node] for node in interior)
    for node in nodes[min(first, ready) : used]:
        schema = getattr(node.target, "_schema", None)
        if node.op == "call_function" and schema is not None and schema.is_mutable:
            raise Refusal(f"{node.name} writes to a tensor in between")
    return nodes[used]


def replace(graph: fx.Graph, site: UnrolledSite) -> fx.Node:
    """Insert the op; its results take the places of the output and of the last state."""
    letters, like = site.parts.letters, site.parts.out

    def arranged(part: str, order: str) -> fx.Node:
        operand = site.operands[part]
        present = [x for x in operand.layout if x is not None]
        wanted = [x for x in order if x in present]
        node = operand.node
        if present != wanted:
            dims = [operand.layout.index(x) for x in wanted]
            ones = [d for d, x in enumerate(operand.layout) if x is None]
            node = call(graph, aten.permute.default, node, dims + ones, like=like)
        return _reshaped(graph, node, [letters[x] for x in order], like)

    with graph.inserting_before(site.before):
        gate = site.parts.layouts.get("g")
        order = {"q": "BTHK", "k": "BTHK", "v": "BTHV", "beta": "BTH", "state": "BHKV"}
        if gate is not None:
            order["g"] = "BTHK" if "K" in gate else "BTH"
        given = {part: arranged(part, dims) for part, dims in order.items()}
        kinds = {dtype(given[x]) for x in "qkv"}
        if len(kinds) > 1 or dtype(given["v"]).itemsize < dtype(like).itemsize:
            for part in "qkv":
                given[part] = _cast(graph, given[part], _wide(like), like)
        state = None
        if site.state_dtype != torch.float32 or not _is_zero(site.operands["state"].node):
            state = _cast(graph, given["state"], site.state_dtype, like)
        node = call(
            graph, delta_rule._opoverload, given["q"], given["k"], given["v"], given.get("g"),
            given["beta"], state, site.scale, site.l2norm_eps, like=like,
        )  # fmt: skip
        out = call(graph, operator.getitem, node, 0, like=like)
        _take_place(graph, site, out, "BTHV", site.parts.out_layout, site.parts.out)
        if site.finals:
            final = call(graph, operator.getitem, node, 1, like=like)
            for old in site.finals:
                _take_place(graph, site, final, "BHKV", site.parts.final_layout, old)
    return node


def _is_zero(state: fx.Node) -> bool:
    return is_call(state, aten.full.default) and number(state.args[1]) == 0


def _wide(like: fx.Node) -> torch.dtype:
    return torch.float64 if dtype(like) == torch.float64 else torch.float32


def _cast(graph: fx.Graph, node: fx.Node, to: torch.dtype, like: fx.Node) -> fx.Node:
    if dtype(node) == to:
        return node
    return call(graph, prims.convert_element_type.default, node, to, like=like)


def _reshaped(graph: fx.Graph, node: fx.Node, shape: Sequence[Any], like: fx.Node) -> fx.Node:
    """View with dims of size 1 added or dropped."""
    if same_sizes(sizes(node), shape):
        return node
    if all(isinstance(size, int) for size in shape):
        return call(graph, aten.reshape.default, node, list(shape), like=like)
    have, want = list(sizes(node)), list(shape)
    place = 0
    for size in want:
        if place < len(have) and same(have[place], size) and not same(size, 1):
            place += 1
        elif same(size, 1):
            if place < len(have) and same(have[place], 1):
                place += 1
            else:
                node = call(graph, aten.unsqueeze.default, node, place, like=like)
                have.insert(place, 1)
                place += 1
        else:
            node = call(graph, aten.squeeze.dim, node, place, like=like)
            have.pop(place)
            return _reshaped(graph, node, shape, like)
    while len(have) > len(want):
        node = call(graph, aten.squeeze.dim, node, len(want), like=like)
        have.pop(len(want))
    return node


def _take_place(
    graph: fx.Graph,
    site: UnrolledSite,
    result: fx.Node,
    order: str,
    layout: Layout,
    old: fx.Node,
) -> None:
    """Give the op's result the dims and dtype of what it replaces."""
    like = site.parts.out
    present = [x for x in layout if x is not None]
    dims = [order.index(x) for x in present]
    ones = [d for d, x in enumerate(order) if x not in present]
    if dims != sorted(dims):
        result = call(graph, aten.permute.default, result, dims + ones, like=like)
    result = _reshaped(graph, result, sizes(old), like)
    result = _cast(graph, result, dtype(old), like)
    old.replace_all_uses_with(result, delete_user_cb=lambda user: user not in site.interior)


UNROLLED = Rewrite(
    "delta_rule.unrolled",
    op="delta_rule",
    anchors=anchors,
    walk=walk,
    replace=replace,
    describe=UnrolledSite.describe,
)
