"""Traces a block to the graph that the rewrites see, rewrites it, and compares with fp64."""

from __future__ import annotations

import collections
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch
import transformers.integrations.moe  # noqa: F401  registers grouped_mm_fallback
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from inductor_moe.config import Options
from inductor_moe.passes import rewrite
from inductor_moe.report import Site

# What fp32 rounding may do to these sizes, and the slack beyond the original's own error.
FLOOR, SLACK = 2e-6, 4.0
# What ran in this process: ("experts" or "delta rules", "plain" or "mutated", what came of it).
COUNTS: collections.Counter[tuple[str, str, str]] = collections.Counter()


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What the rewrites did to one case; `error` is None where nothing was rewritten."""

    sites: tuple[Site, ...]
    error: float | None = None
    budget: float = 0.0

    @property
    def matched(self) -> tuple[str, ...]:
        return tuple(site.rewrite for site in self.sites if site.matched)

    @property
    def wrong(self) -> bool:
        return self.error is not None and not self.error <= self.budget


@functools.cache
def decompositions() -> Any:
    from torch._inductor.decomposition import select_decomp_table

    return select_decomp_table()


def trace(function: Callable[..., Any], inputs: dict[str, Tensor]) -> fx.GraphModule:
    """The functional aten graph of function(**inputs), decomposed as Inductor does."""

    def call(values: dict[str, Tensor]) -> Any:
        return function(**values)

    with torch.no_grad():
        graph = make_fx(call, decompositions(), tracing_mode="fake")(inputs)
        if not any(_writes(node) for node in graph.graph.nodes):
            return graph
        functional = torch.func.functionalize(call, remove="mutations")
        return make_fx(functional, decompositions(), tracing_mode="fake")(inputs)


def _writes(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is not None and schema.is_mutable


def run(function: Callable[..., Any], inputs: dict[str, Tensor]) -> Outcome:
    """Rewrite the graph of function on `inputs` cast from fp64 to fp32; measure the result."""
    low = {name: value.float() for name, value in inputs.items()}
    graph = trace(function, low)
    sites = tuple(rewrite(graph.graph, Options(strict=True)))
    graph.graph.lint()
    if not any(site.matched for site in sites):
        return Outcome(sites)
    graph.recompile()
    # A rewritten graph must not depend on the numbers it was traced with.
    with torch.no_grad():
        exact = _flat(function(**_fresh(inputs)))
        plain = _flat(function(**_fresh(low)))
        found = _flat(graph(_fresh(low)))
    if [tuple(v.shape) for v in found] != [tuple(v.shape) for v in exact]:
        return Outcome(sites, float("inf"))
    worst, budget = 0.0, 0.0
    for one, original, reference in zip(found, plain, exact, strict=True):
        error, own = _error(one, reference), _error(original, reference)
        allowed = max(FLOOR, SLACK * own)
        if not error <= allowed:
            error = _error(without_ties(one, original), reference)
        if not error <= allowed or error / allowed > worst / max(budget, 1e-300):
            worst, budget = error, allowed
        if not error <= allowed:
            break
    return Outcome(sites, worst, budget)


def count(kind: str, mutated: bool, matched: bool, outcome: Outcome) -> None:
    """Adds one case to COUNTS; `matched` says whether the op that was asked for is in it."""
    results = {"cases": True, "matched": matched, "wrong": outcome.wrong}
    how = "mutated" if mutated else "plain"
    COUNTS.update((kind, how, name) for name, holds in results.items() if holds)


def summary(counts: collections.Counter[tuple[str, str, str]]) -> list[str]:
    """Lines with the cases of each kind, the share that was rewritten, and the wrong rewrites."""
    lines = []
    for kind, how in sorted({key[:2] for key in counts}):
        cases, matched, wrong = (counts[kind, how, n] for n in ("cases", "matched", "wrong"))
        share = f"{matched / cases:.1%} rewritten"
        lines.append(f"{how} {kind}: {cases:,} cases, {share}, {wrong:,} wrong")
    total, wrong = (
        sum(counts[key] for key in counts if key[2] == name) for name in ("cases", "wrong")
    )
    return [*lines, f"all: {total:,} cases, {wrong:,} wrong"]


def without_ties(found: Tensor, original: Tensor) -> Tensor:
    """found, with the original's values where the two are neighbours in bf16, if those are few.

    A block that rounds to bf16 rounds a value near the middle of two either way, as the last bit
    of fp32 has it. One in a hundred may: a cast in another place moves far more of them, and one
    that is lost leaves values that bf16 does not have.
    """
    if found.dtype != original.dtype or found.shape != original.shape:
        return found
    short = [value.to(torch.bfloat16) for value in (found, original)]
    exact = (short[0] == found) & (short[1] == original)
    steps = [value.view(torch.int16).int() for value in short]
    ties = exact & ((steps[0] - steps[1]).abs() == 1)
    few = int(ties.sum()) <= max(1, found.numel() // 100)
    return torch.where(ties, original, found) if few else found


def _fresh(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in inputs.items()}


def _flat(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result)


def _error(value: Tensor, reference: Tensor) -> float:
    if not torch.isfinite(reference).all():
        return 0.0 if torch.equal(torch.isnan(value), torch.isnan(reference)) else float("inf")
    difference = (value.double() - reference.double()).norm()
    return float(difference / reference.double().norm().clamp_min(1e-12))
