"""Finding the rewrite, and the site, that changes a result."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch

from inductor_moe.backend import collected
from inductor_moe.report import Site, merge
from inductor_moe.verification import distance

Run = Callable[[Mapping[str, Any]], Any]


@dataclasses.dataclass(frozen=True)
class Culprit:
    """A rewrite that changes the result: by how much, and the first site that does, if found."""

    rewrite: str
    distance: float
    site: Site | None

    def __str__(self) -> str:
        where = "" if self.site is None else f" at {self.site.module or self.site.source}"
        detail = "" if self.site is None or not self.site.detail else f" ({self.site.detail})"
        return f"{self.rewrite} changes the result by {self.distance:.2e}{where}{detail}"


def bisect(run: Run, tolerance: float = 1e-2) -> tuple[Culprit, ...]:
    """The rewrites that change what run(options) returns by more than `tolerance`.

    run        compiles with torch.compile(..., backend="inductor_moe", options=options), calls
               the model and returns its result: a tensor, a number, or a nest of them; called
               several times, it must give the same result for the same options
    tolerance  relative distance from the result without any rewrite, at least 0
    """
    if not tolerance >= 0:
        raise ValueError(f"bisect: tolerance is {tolerance}; it must be at least 0")
    from inductor_moe.patterns import ALL
    from inductor_moe.patterns.delta_rule import convolution

    names = [rewrite.name for rewrite in ALL]

    def without(left_out: list[str], **more: Any) -> tuple[list[torch.Tensor], tuple[Site, ...]]:
        torch.compiler.reset()
        options = {"inductor_moe.disable": left_out, **more}
        with collected() as reports:
            result = _tensors(run(options))
        return result, merge(reports).matched if reports else ()

    reference, _ = without(names)
    whole, _ = without([])
    if _distance(whole, reference) <= tolerance:
        return ()
    found = []
    for name in names:
        others = [convolution.NAME, *(other for other in names if other != name)]
        result, sites = without(others)
        far = _distance(result, reference)
        if sites and not far <= tolerance:
            found.append(Culprit(name, far, _first_site(without, others, reference, tolerance)))
    # It is no site, and done only beside a rewritten rule: what counts is what it adds to all.
    beside, _ = without([convolution.NAME])
    far = _distance(whole, beside)
    if not far <= tolerance:
        found.append(Culprit(convolution.NAME, far, None))
    return tuple(found)


def _first_site(
    without: Callable[..., tuple[list[torch.Tensor], tuple[Site, ...]]],
    others: list[str],
    reference: list[torch.Tensor],
    tolerance: float,
) -> Site | None:
    """The site whose rewriting, with all before it, first changes the result."""
    _, sites = without(others)
    low, high = 0, len(sites)
    while high - low > 1:
        middle = (low + high) // 2
        result, _ = without(others, **{"inductor_moe.limit": middle})
        if _distance(result, reference) <= tolerance:
            low = middle
        else:
            high = middle
    result, chosen = without(others, **{"inductor_moe.limit": high})
    if _distance(result, reference) <= tolerance or len(chosen) != high:
        return None
    return chosen[-1]


def _tensors(result: Any) -> list[torch.Tensor]:
    if isinstance(result, Mapping):
        result = list(result.values())
    if isinstance(result, (list, tuple)):
        return [tensor for item in result for tensor in _tensors(item)]
    if not isinstance(result, (torch.Tensor, int, float)):
        return []
    return [torch.as_tensor(result).detach().clone()]


def _distance(result: list[torch.Tensor], reference: list[torch.Tensor]) -> float:
    if len(result) != len(reference):
        return float("inf")
    return max((distance(a, b) for a, b in zip(result, reference, strict=True)), default=0.0)
