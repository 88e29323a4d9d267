"""Proof by evaluation: which input plays which part, and that the region is the delta rule.

The rule is equivariant in batch and heads, so the region is run in fp64 with two of each, at full
size in tokens, K and V, against the op itself: on plain draws, on extremes, and on values so
large that a bound anywhere shows.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from inductor_moe.compat import real_tensors
from inductor_moe.ops.delta_rule import delta_rule
from inductor_moe.patterns.delta_rule.boundary import Region
from inductor_moe.patterns.delta_rule.chain import Chain
from inductor_moe.patterns.delta_rule.labels import Label, Labelled
from inductor_moe.patterns.delta_rule.runner import Runner
from inductor_moe.patterns.evaluate import CannotEvaluate
from inductor_moe.patterns.rewrite import Refusal
from inductor_moe.patterns.walk import aten, is_call, same, sizes

DRAWS = 3
RUN = {"B": 2, "H": 2}
PARTS = {
    "q": ("B", "T", "H", "K"),
    "k": ("B", "T", "H", "K"),
    "v": ("B", "T", "H", "V"),
    "g": ("B", "T", "H"),
    "channel g": ("B", "T", "H", "K"),
    "beta": ("B", "T", "H"),
    "state": ("B", "H", "K", "V"),
}
Layout = tuple[str | None, ...]  # the letter of each dim, None for size 1


@dataclasses.dataclass(frozen=True)
class Parts:
    """The node and layout of each part; out and final as the op's results lie in the graph."""

    nodes: Mapping[str, fx.Node]
    layouts: Mapping[str, Layout]
    out: fx.Node
    out_layout: Layout
    final: fx.Node | None
    final_layout: Layout | None
    scale: float
    letters: Mapping[str, Any]


def prove(
    chain: Chain, region: Region, outputs: Sequence[fx.Node], final: fx.Node | None
) -> Parts:
    """Find the parts; raises Refusal where no assignment computes the delta rule.

    outputs  nodes that may hold the output, in graph order; the last that does is taken
    """
    reasons: list[str] = []
    for nodes, layouts, letters in _assignments(chain, region, outputs):
        try:
            with real_tensors():
                _check_first(chain, nodes, layouts, letters, region)
                return _check(nodes, layouts, letters, region, outputs, final)
        except CannotEvaluate as error:
            reasons.append(str(error))
    if not reasons:
        raise Refusal(
            "the inputs "
            + ", ".join(f"{x.name} {list(sizes(x))}" for x in region.inputs)
            + f" around the state {list(sizes(chain.state))} are not q, k, v, g and beta"
        )
    raise Refusal(f"it is not the delta rule: {reasons[0]}")


def _above(nodes: Sequence[fx.Node], region: Region) -> set[fx.Node]:
    """The inputs that `nodes` are computed from."""
    inside, found, seen = set(region.nodes), set(), set()
    stack = list(nodes)
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        if node in inside:
            stack.extend(node.all_input_nodes)
        elif node in region.inputs:
            found.add(node)
    return found


def _assignments(
    chain: Chain, region: Region, outputs: Sequence[fx.Node]
) -> Iterator[tuple[dict[str, fx.Node], dict[str, Layout], dict[str, Any]]]:
    written = _above(chain.updates, region)
    queries = [x for x in region.inputs if x not in written]
    exponents = _above([n for n in region.nodes if is_call(n, aten.exp.default)], region)
    exponents -= set(queries)
    rest = [x for x in region.inputs if x in written and x not in exponents]
    if len(queries) != 1 or len(exponents) > 1 or len(rest) != 3:
        return
    shape = sizes(chain.state)
    batch, heads = ((1, 1, *shape[:-2]))[-2:]
    for transposed in (False, True):
        key, value = shape[-2:][::-1] if transposed else shape[-2:]
        for tokens in _token_counts(chain, queries[0]):
            letters = {"B": batch, "H": heads, "T": tokens, "K": key, "V": value}
            for k, v, beta in itertools.permutations(rest):
                nodes = {"q": queries[0], "k": k, "v": v, "beta": beta}
                choices = [("q",), ("k",), ("v",), ("beta",)]
                if exponents:
                    nodes["g"] = next(iter(exponents))
                    choices.append(("g", "channel g"))
                nodes["state"] = chain.state
                options = [
                    [
                        layout
                        for part in parts
                        for layout in _layouts(nodes[parts[0]], part, letters)
                    ]
                    for parts in choices
                ]
                tail = ("V", "K") if transposed else ("K", "V")
                state = (*(("B", "H")[4 - len(shape) :]), *tail)
                state = tuple(None if same(letters[x], 1) else x for x in state)
                names = [parts[0] for parts in choices]
                for chosen in itertools.islice(itertools.product(*options), 32):
                    yield nodes, {**dict(zip(names, chosen, strict=True)), "state": state}, letters


def _token_counts(chain: Chain, query: fx.Node) -> list[int]:
    if not chain.chunked:
        return [chain.length]
    least, most = (chain.length - 1) * chain.inner, chain.length * chain.inner
    counts = {x for x in sizes(query) if isinstance(x, int) and least < x <= most}
    return sorted(counts | ({1} if chain.length == 1 else set()), reverse=True)


def _layouts(node: fx.Node, part: str, letters: Mapping[str, Any]) -> list[Layout]:
    """The orders of a part's dims that fit the node's sizes."""
    names = PARTS[part]
    found: dict[Layout, None] = {}
    for leading in itertools.permutations(names[:3]):
        wanted = [x for x in (*leading, *names[3:]) if not same(letters[x], 1)]
        layout: list[str | None] = []
        for size in sizes(node):
            if same(size, 1):
                layout.append(None)
            elif wanted and same(size, letters[wanted[0]]):
                layout.append(wanted.pop(0))
            else:
                break
        else:
            if not wanted:
                found[tuple(layout)] = None
    return list(found)


def _label(letter: str | None, letters: Mapping[str, Any]) -> Label:
    if letter is None or same(letters[letter], 1):
        return None
    return (letter,) if letter in RUN else (letters[letter],)


def _check(
    nodes: Mapping[str, fx.Node],
    layouts: Mapping[str, Layout],
    letters: Mapping[str, Any],
    region: Region,
    outputs: Sequence[fx.Node],
    final: fx.Node | None,
) -> Parts:
    if any(not isinstance(letters[x], int) for x in "TKV"):
        raise CannotEvaluate("T, K or V is symbolic")
    found: tuple[Any, ...] | None = None
    for draw in range(DRAWS):
        parts, values = _given(draw, nodes, layouts, letters)
        runner = Runner(values, {x: letters[x] for x in RUN}, RUN)
        kept = {*outputs, *([final] if final is not None else [])}
        _run(runner, region, kept)
        want, want_state = delta_rule(
            *(parts.get(x) for x in ("q", "k", "v", "g", "beta", "state")), 1.0
        )
        state_layout = None
        if final is not None:
            if final not in runner.values:
                raise CannotEvaluate(f"{final.name} cannot be run")
            match = _match(runner.values[final], want_state, "BHKV", letters)
            if match is None or abs(match[1] - 1) > 1e-9:
                raise CannotEvaluate(f"{final.name} is not the state after the last token")
            state_layout = match[0]
        chosen = None
        for node in outputs:
            if node in runner.values and node.meta["val"].dim() == len(runner.values[node].labels):
                match = _match(runner.values[node], want, "BTHV", letters)
                if match is not None and match[1] != 0:
                    chosen = (node, *match, state_layout)
        if chosen is None:
            raise CannotEvaluate("no output is the rule's")
        if found is not None and (found[:2] != chosen[:2] or abs(found[2] / chosen[2] - 1) > 1e-9):
            raise CannotEvaluate("the output's scale depends on the inputs")
        found = found or chosen
    assert found is not None
    out, out_layout, scale, state_layout = found
    usual = letters["K"] ** -0.5
    for exact in (1.0, usual):
        if abs(scale / exact - 1) < 1e-12:
            scale = exact
    return Parts(nodes, layouts, out, out_layout, final, state_layout, float(scale), letters)


def _check_first(
    chain: Chain,
    nodes: Mapping[str, fx.Node],
    layouts: Mapping[str, Layout],
    letters: Mapping[str, Any],
    region: Region,
) -> None:
    """Refuse a wrong assignment in a long loop at its first step."""
    if chain.chunked or chain.length < 3:
        return
    inside, needed, stack = set(region.nodes), set(), [chain.updates[0]]
    while stack:
        node = stack.pop()
        if node in inside and node not in needed:
            needed.add(node)
            stack.extend(node.all_input_nodes)
    parts, values = _given(0, nodes, layouts, letters)
    runner = Runner(values, {x: letters[x] for x in RUN}, RUN)
    for node in region.nodes:
        if node in needed:
            runner.compute(node)
    rows = [parts[x][:, :1] if x in parts else None for x in ("q", "k", "v", "g", "beta")]
    want = delta_rule(*rows, parts["state"], 1.0)[1]
    match = _match(runner.values[chain.updates[0]], want, "BHKV", letters)
    if match is None or abs(match[1] - 1) > 1e-9:
        raise CannotEvaluate(f"{chain.updates[0].name} is not the state after one token")


def _given(
    draw: int,
    nodes: Mapping[str, fx.Node],
    layouts: Mapping[str, Layout],
    letters: Mapping[str, Any],
) -> tuple[dict[str, torch.Tensor], dict[fx.Node, Labelled]]:
    """A draw as the op takes it, and as the nodes hold it."""
    parts = _draw(draw, letters, "K" in layouts.get("g", ()))
    if "g" not in nodes:
        del parts["g"]
    values = {
        nodes[part]: _placed(parts[part], _canonical(part, parts[part]), layout, letters)
        for part, layout in layouts.items()
    }
    return parts, values


def _run(runner: Runner, region: Region, kept: set[fx.Node]) -> None:
    """Run the region, dropping each value after its last use."""
    inside = set(region.nodes)
    left = {node: sum(user in inside for user in node.users) for node in region.nodes}
    failed: set[fx.Node] = set()
    for node in region.nodes:
        if any(x in failed for x in node.all_input_nodes):
            failed.add(node)
            continue
        try:
            runner.compute(node)
        except CannotEvaluate:
            # What only follows the output may be anything.
            if node not in kept:
                raise
            failed.add(node)
        for source in node.all_input_nodes:
            if source in left:
                left[source] -= 1
                if not left[source] and source not in kept:
                    runner.values.pop(source, None)


def _draw(draw: int, letters: Mapping[str, Any], per_channel: bool) -> dict[str, torch.Tensor]:
    """Inputs [B, T, H, ..] of the op in fp64."""
    generator = torch.Generator().manual_seed(97 + draw)

    def size(letter: str) -> int:
        return 1 if same(letters[letter], 1) else RUN.get(letter, letters[letter])

    batch, heads, tokens, key, value = (size(x) for x in "BHTKV")

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    def uniform(*shape: int) -> torch.Tensor:
        return torch.rand(shape, generator=generator, dtype=torch.float64)

    rows = (batch, tokens, heads)
    drawn = {
        "q": normal(*rows, key),
        "k": normal(*rows, key),
        "v": normal(*rows, value),
        "g": -0.4 * uniform(*rows, *([key] if per_channel else [])),
        "beta": uniform(*rows),
        "state": normal(batch, heads, key, value),
    }
    drawn["k"] *= uniform(*rows, 1) / drawn["k"].norm(dim=-1, keepdim=True)
    if draw == 1:  # what gates do at their ends; values that no bound lets pass
        drawn["g"] = torch.where(uniform(*drawn["g"].shape) < 0.1, -7.0, drawn["g"])
        drawn["g"] = torch.where(uniform(*drawn["g"].shape) < 0.2, 0.0, drawn["g"])
        drawn["beta"] = torch.where(uniform(*rows) < 0.3, 2 * uniform(*rows), drawn["beta"])
        drawn["beta"] = torch.where(uniform(*rows) < 0.1, 0.0, drawn["beta"])
        for name in ("v", "state", "q"):
            drawn[name] *= 1e5
        drawn["k"] = torch.where(uniform(*rows, 1) < 0.1, 0.0, drawn["k"])
    if draw == 2:  # small values, growth instead of decay now and then, one long key
        drawn["g"] = torch.where(uniform(*drawn["g"].shape) < 0.1, 0.1, drawn["g"])
        for name in ("v", "state"):
            drawn[name] *= 1e-3
        drawn["q"] *= 1e-2
        drawn["k"][:, tokens // 2] *= 40.0
    return drawn


def _canonical(part: str, value: torch.Tensor) -> str:
    return "BHKV" if part == "state" else "BTHV" if part == "v" else "BTHK"[: value.dim()]


def _placed(
    value: torch.Tensor, order: str, layout: Layout, letters: Mapping[str, Any]
) -> Labelled:
    """A value with dims in `order` as a node with this layout holds it."""
    present = [x for x in layout if x is not None]
    kept = [x for x in order if x in present]
    squeezed = value.reshape([value.shape[order.index(x)] for x in kept])
    permuted = squeezed.permute([kept.index(x) for x in present])
    sizes_left = iter(permuted.shape)
    shape = [1 if x is None else next(sizes_left) for x in layout]
    return Labelled(permuted.reshape(shape), tuple(_label(x, letters) for x in layout))


def _match(
    found: Labelled, want: torch.Tensor, order: str, letters: Mapping[str, Any]
) -> tuple[Layout, float] | None:
    """(layout, c) where found is c * want with its dims in that layout."""
    letters_left = [x for x in order if _label(x, letters) is not None]
    labels = [label for label in found.labels if label is not None]
    if len(labels) != len(letters_left) or not bool(torch.isfinite(found.tensor).all()):
        return None
    flat = found.tensor.reshape([s for s, x in zip(found.tensor.shape, found.labels, strict=True)
                                 if x is not None])  # fmt: skip
    for names in itertools.permutations(letters_left):
        if any(_label(x, letters) != label for x, label in zip(names, labels, strict=True)):
            continue
        moved = want.reshape([want.shape[order.index(x)] for x in letters_left])
        moved = moved.permute([letters_left.index(x) for x in names])
        factor = float((flat * moved).sum() / (moved * moved).sum())
        bound = 1e-9 * float(moved.abs().max()) * max(abs(factor), 1e-30)
        if torch.allclose(flat, factor * moved, rtol=1e-7, atol=bound):
            remaining = iter(names)
            layout = tuple(None if x is None else next(remaining) for x in found.labels)
            return layout, factor
    return None
