"""One token through a delta-rule layer: convolution, gates, rule and gated norm become one op.

The anchor is a call of `delta_rule` on one token whose state is written back to a graph input.
Around it the walk reads the update of the convolution state, the SiLU and split before the rule,
the gates and the gated RMSNorm. Gates and norm are optional: what is not recognised stays with
Inductor and the op takes its result. Both states are then updated in place and the copies back
to the inputs disappear.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx
from torch.nn import functional as F

from inductor_moe.ops.delta_rule import delta_decode
from inductor_moe.patterns.delta_rule.heads import DELTA_RULE, repeated_heads
from inductor_moe.patterns.evaluate import computes, leaves, literals, probe
from inductor_moe.patterns.rewrite import Refusal, Rewrite
from inductor_moe.patterns.walk import (
    COPIES,
    aten,
    call,
    dtype,
    is_call,
    is_getitem,
    is_transparent,
    last_dim,
    moves_only_ones,
    number,
    prims,
    same,
    same_sizes,
    sizes,
    without_ones,
)


@dataclasses.dataclass(frozen=True)
class Convolution:
    """qkv [B, C] enters, conv_state [B, C, L] shifts, weight [C, 1, W] or [C, W], bias [C]."""

    node: fx.Node
    qkv: fx.Node
    state: fx.Node
    weight: fx.Node
    bias: fx.Node | None
    copy: fx.Node


@dataclasses.dataclass(frozen=True)
class Gates:
    """a and b as the op takes them; `form` is the op's `gate`."""

    a: fx.Node
    b: fx.Node
    form: str = "given"
    A_log: fx.Node | None = None
    dt_bias: fx.Node | None = None
    beta_scale: float = 1.0


@dataclasses.dataclass(frozen=True)
class Norm:
    """RMSNorm over V times the activation of z; `output` holds the result [B * HV, V]."""

    z: fx.Node
    weight: fx.Node
    eps: float
    activation: str
    output: fx.Node


@dataclasses.dataclass(frozen=True)
class DecodeSite:
    """A whole decode step; `copy` writes the recurrent state back, `rule` is the op's call."""

    rule: fx.Node
    state: fx.Node
    copy: fx.Node
    convolution: Convolution
    gates: Gates
    norm: Norm | None
    output: fx.Node

    def describe(self) -> str:
        batch, heads, key, value = sizes(self.state)
        parts = ["convolution and state updated in place"]
        parts.append("gates" if self.gates.form != "given" else "gates left to Inductor")
        parts.append("gated norm" if self.norm else "norm left to Inductor")
        return (
            f"T=1 B={batch} HV={heads} K={key} V={value} {dtype(self.rule.args[2])}; "
            + ", ".join(parts)
        )


def anchors(graph: fx.Graph) -> Iterator[fx.Node]:
    """Calls of the rule on one token with a state."""
    for node in graph.nodes:
        if (
            is_call(node, DELTA_RULE)
            and node.args[5] is not None
            and same(sizes(node.args[0])[1], 1)
        ):
            yield node


def walk(rule: fx.Node) -> DecodeSite:
    """Read the step around the call of the rule."""
    q, k, v, g, beta, state = rule.args[:6]
    if len(rule.args) > 8 and rule.args[8] is not None:
        raise Refusal("packed sequences have no single token each")
    if g is None:
        raise Refusal("the rule has no decay")
    final = next((user for user in rule.users if is_getitem(user, 1, DELTA_RULE)), None)
    out = next((user for user in rule.users if is_getitem(user, 0, DELTA_RULE)), None)
    if final is None or out is None:
        raise Refusal("the output or the new state is not used")
    copy = _written_back(final, state)
    if set(state.users) != {rule, copy}:
        raise Refusal(f"the state {state.name} is read elsewhere, too")
    split = _read_split(q, k, v, state)
    convolution = _read_convolution(split.args[0])
    _check_private(split, convolution.node)
    if dtype(convolution.qkv) != dtype(v):
        raise Refusal("the convolution changes the dtype")
    norm = _read_norm(out, sizes(v))
    return DecodeSite(
        rule=rule,
        state=state,
        copy=copy,
        convolution=convolution,
        gates=_read_gates(g, beta),
        norm=norm,
        output=norm.output if norm else out,
    )


def _written_back(value: fx.Node, state: Any) -> fx.Node:
    if not isinstance(state, fx.Node) or state.op != "placeholder":
        raise Refusal(f"the state {state} is no input of the graph")
    users = list(value.users)
    if (
        len(users) == 1
        and is_call(users[0], aten.copy_.default)
        and users[0].args == (state, value)
    ):
        return users[0]
    raise Refusal(f"the new state is not written back to {state.name} alone")


def _strip(node: Any) -> Any:
    """Go up through copies, and views and permutes that only add, drop or move dims of size 1."""
    while is_transparent(node) or moves_only_ones(node):
        node = node.args[0]
    return node


def _read_split(q: Any, k: Any, v: Any, state: fx.Node) -> fx.Node:
    """The split of rows [B, C] into q, k and v in this order."""
    _, value_heads, key_width, value_width = sizes(state)
    parts, heads = [], set()
    for node in (q, k):
        found = repeated_heads(node)
        source = node if found is None else found[0]
        heads.add(sizes(source)[2])
        parts.append(source)
    if len(heads) != 1:
        raise Refusal("q and k have different numbers of heads")
    key_total = heads.pop() * key_width
    split = None
    for index, node in enumerate((*parts, v)):
        source = node
        while is_call(source, *COPIES, aten.view.default, aten.reshape.default):
            source = source.args[0]
        if not is_getitem(source, index, aten.split_with_sizes.default):
            raise Refusal(f"{node.name} is not part {index} of a split")
        if split not in (None, source.args[0]):
            raise Refusal("q, k and v come from different splits")
        split = source.args[0]
    assert split is not None
    wanted = [key_total, key_total, value_heads * value_width]
    if list(split.args[1]) != wanted or not last_dim(split.args[0], split.args[2]):
        raise Refusal(f"{split.name} splits {split.args[1]}, not q, k and v of {wanted}")
    if any(len(user.users) != 1 for user in split.users):
        raise Refusal("q, k or v is used outside the rule")
    return split


def _check_private(split: fx.Node, convolution: fx.Node) -> None:
    """Refuse where anything between the convolution and the split is used elsewhere, too."""
    between, frontier = {convolution}, [split.args[0]]
    while frontier:
        node = frontier.pop()
        if node not in between:
            between.add(node)
            frontier.extend(node.all_input_nodes)
    for node in between:
        outside = [user for user in node.users if user not in between and user is not split]
        if outside and number(node) is None:
            raise Refusal(f"{node.name}, before the split, is used by {outside[0].name}")


def _read_convolution(mixed: fx.Node) -> Convolution:
    silu = _strip(mixed)
    inputs = leaves(silu)
    values = probe(4096, seed=1, scale=4.0)
    if len(inputs) != 1 or not computes(silu, inputs, [values], F.silu):
        raise Refusal(f"{silu} is not the SiLU of a convolution")
    column = inputs[0]
    if is_call(column, aten.slice.Tensor) and same(sizes(column)[-1], 1):
        _, dim, start = (*column.args, 0, 0)[:3]
        conv = column.args[0]
        length = sizes(conv)[-1]
        if not last_dim(conv, dim) or start not in (-1, length - 1):
            raise Refusal(f"{column.name} does not take the newest output of the convolution")
    else:
        conv = column
    return _read_update(conv)


def _read_update(conv: Any) -> Convolution:
    if not is_call(conv, aten.convolution.default) or len(sizes(conv)) != 3:
        raise Refusal(f"{conv} is no 1-d convolution")
    joined, weight, bias, stride, padding, dilation, transposed, _, groups = conv.args
    channels = sizes(joined)[1]
    plain = [list(stride), list(padding), list(dilation)] == [[1], [0], [1]] and not transposed
    if not plain or not same(groups, channels) or not same(sizes(weight)[1], 1):
        raise Refusal(f"{conv.name} is no plain depthwise convolution")
    if not is_call(joined, aten.cat.default) or joined.args[1:] not in ((2,), (-1,)):
        raise Refusal(f"{joined} does not append the token to the convolution state")
    state, token = joined.args[0] if len(joined.args[0]) == 2 else (None, None)
    if state is None or state.op != "placeholder" or not same(sizes(token)[-1], 1):
        raise Refusal(f"{joined.name} does not append one token to a state")
    length, width = sizes(state)[-1], sizes(weight)[-1]
    if not isinstance(length, int) or length < width - 1:
        raise Refusal(f"the convolution state keeps {length} inputs for a width of {width}")
    copy = _shifted_back(joined, state, length, conv)
    qkv = _strip(token)
    if not same_sizes(without_ones(sizes(qkv)), without_ones(sizes(token))):
        raise Refusal(f"{token.name} is not one row of channels")
    return Convolution(conv, qkv, state, weight, bias, copy)


def _shifted_back(joined: fx.Node, state: fx.Node, length: int, conv: fx.Node) -> fx.Node:
    """The copy_ that writes the newest `length` inputs back to the state."""
    shifted = [user for user in joined.users if user is not conv]
    if len(shifted) != 1 or not is_call(shifted[0], aten.slice.Tensor):
        raise Refusal(f"{joined.name} is used by more than the convolution and the new state")
    _, dim, start = (*shifted[0].args, 0, 0)[:3]
    if (
        not last_dim(joined, dim)
        or start not in (-length, 1)
        or not same(sizes(shifted[0])[-1], length)
    ):
        raise Refusal(f"{shifted[0].name} does not keep the newest {length} inputs")
    value, inner = shifted[0], {joined}
    if len(value.users) == 1 and is_call(next(iter(value.users)), aten.copy.default):
        value = next(iter(value.users))
        if value.args[0] is not state:
            raise Refusal(f"{value.name} copies the new inputs elsewhere")
        inner.add(value)
    copy = _written_back(value, state)
    if set(state.users) != inner | {copy}:
        raise Refusal(f"the convolution state {state.name} is read elsewhere, too")
    return copy


def _read_gates(g: fx.Node, beta: fx.Node) -> Gates:
    given = Gates(a=g, b=beta)
    strengths = leaves(beta)
    if len(strengths) != 1:
        return given
    values = probe(4096, seed=2, scale=4.0)
    scale = next(
        (s for s in (1.0, 2.0)
         if computes(beta, strengths, [values], lambda b, s=s: s * torch.sigmoid(b))),
        None,
    )  # fmt: skip
    inputs, shape = leaves(g), sizes(g)
    if scale is None or len(shape) != 3 or len(inputs) != 3:
        return given
    probes = [probe(4096, seed=3, scale=8.0), probe(4096, seed=4), probe(4096, seed=5)]
    # one row of a has the shape of A_log and dt_bias
    for a, A_log, dt_bias in itertools.permutations(inputs):
        per_row = same_sizes(without_ones(sizes(a)), without_ones(shape))
        per_head = all(same_sizes(sizes(x), shape[2:]) for x in (A_log, dt_bias))
        if per_row and per_head and computes(g, [a, A_log, dt_bias], probes, _log_decay):
            return Gates(a, strengths[0], "softplus", A_log, dt_bias, scale)
    return given


def _log_decay(a: torch.Tensor, A_log: torch.Tensor, dt_bias: torch.Tensor) -> torch.Tensor:
    return -A_log.exp() * F.softplus(a + dt_bias)


def _read_norm(out: fx.Node, value_sizes: tuple[Any, ...]) -> Norm | None:
    width = value_sizes[-1]
    rows = out
    while len(rows.users) == 1:
        user = next(iter(rows.users))
        if not is_call(user, aten.view.default, aten.reshape.default, *COPIES):
            break
        if not same(sizes(user)[-1], width):
            break
        rows = user
    exit_node = _exit(rows)
    if exit_node is None or not same_sizes(*(without_ones(sizes(x)) for x in (exit_node, rows))):
        return None
    inputs = [leaf for leaf in leaves(exit_node, stop=(rows,)) if leaf is not rows]
    weights = [x for x in inputs if same_sizes(sizes(x), (width,))]
    per_row = without_ones(sizes(rows))
    zs = [x for x in inputs if same_sizes(without_ones(sizes(x)), per_row) and x not in weights]
    if len(inputs) != 2 or len(weights) != 1 or len(zs) != 1:
        return None
    probes = [probe(5, width, seed=6), probe(5, width, seed=7), probe(width, seed=8)]
    nodes = [rows, zs[0], weights[0]]
    for eps in sorted(x for x in literals(exit_node, stop=(rows,)) if 0 < x < 0.1):
        for name, activation in (("silu", F.silu), ("sigmoid", torch.sigmoid)):

            def formula(x: Any, z: Any, w: Any, eps: Any = eps, act: Any = activation) -> Any:
                return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * w * act(z)

            if computes(exit_node, nodes, probes, formula):
                return Norm(zs[0], weights[0], eps, name, exit_node)
    return None


def _exit(start: fx.Node) -> fx.Node | None:
    """The one node through which everything computed row by row from start leaves, or None."""
    inside, frontier, exits = {start}, [start], []
    while frontier:
        node = frontier.pop()
        users = list(node.users)
        outside = [user for user in users if start not in leaves(user, stop=(start,))]
        if outside:
            exits.append(node)
        for user in users:
            if user not in outside and user not in inside:
                inside.add(user)
                frontier.append(user)
    return exits[0] if len(exits) == 1 and exits[0] is not start else None


def replace(graph: fx.Graph, site: DecodeSite) -> fx.Node:
    """Insert the op, and drop the copies back to the states."""
    batch, heads, _, width = sizes(site.state)
    convolution, gates, norm = site.convolution, site.gates, site.norm

    def reshaped(node: fx.Node, *shape: Any) -> fx.Node:
        if same_sizes(sizes(node), shape):
            return node
        return call(graph, aten.reshape.default, node, list(shape), like=site.output)

    with graph.inserting_before(site.output):
        channels, taps = sizes(convolution.weight)[0], sizes(convolution.weight)[-1]
        per_head = (batch, *sizes(gates.a)[2:]) if len(sizes(gates.a)) > 2 else (batch, heads)
        output = call(
            graph,
            delta_decode._opoverload,
            reshaped(convolution.qkv, batch, channels),
            convolution.state,
            reshaped(convolution.weight, channels, taps),
            convolution.bias,
            reshaped(gates.a, *per_head),
            reshaped(gates.b, batch, heads),
            gates.A_log,
            gates.dt_bias,
            site.state,
            reshaped(norm.z, batch, heads, width) if norm else None,
            norm.weight if norm else None,
            None,
            site.rule.args[6],
            site.rule.args[7] if len(site.rule.args) > 7 else None,
            norm.eps if norm else 1e-6,
            norm.activation if norm else "silu",
            gates.form,
            0.0,
            gates.beta_scale,
            like=site.rule,
        )
        result = reshaped(output, *sizes(site.output))
        if dtype(result) != dtype(site.output):
            result = call(
                graph, prims.convert_element_type.default, result, dtype(site.output),
                like=site.rule,
            )  # fmt: skip
    site.output.replace_all_uses_with(result)
    graph.erase_node(site.copy)
    graph.erase_node(convolution.copy)
    return output


DECODE = Rewrite(
    "delta_rule.decode",
    op="delta_rule",
    anchors=anchors,
    walk=walk,
    replace=replace,
    describe=DecodeSite.describe,
)
