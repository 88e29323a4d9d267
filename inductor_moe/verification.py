"""`inductor_moe.verify`: the first call runs with and without the rewrites and compares.

Two correct compiles of one graph differ by rounding. How much is measured: the fused result may
be as far from eager's as a few times what Inductor's own compile of the same graph is.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch

from inductor_moe.errors import VerificationError, VerificationWarning

SLACK = 4.0
# Relative errors that rounding alone explains, where Inductor's own compile happens to be exact.
FLOORS = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 2e-2}


class Verified:
    """A compiled graph that checks itself on its first call.

    fused   compiled with the rewrites
    plain   compiled without
    eager   the graph itself, run op by op
    Calls go to `fused` once it has passed. Where it has not: VerificationError under `strict`,
    otherwise a VerificationWarning, and calls go to `plain` from then on.
    """

    def __init__(
        self,
        fused: Callable[..., Any],
        plain: Callable[..., Any],
        eager: Callable[..., Any],
        names: Sequence[str],
        strict: bool,
        failed: Callable[[str], None],
    ) -> None:
        self.fused, self.plain, self.eager = fused, plain, eager
        self.names, self.strict, self.failed = tuple(names), strict, failed
        self.chosen: Callable[..., Any] | None = None

    def __call__(self, *args: Any) -> Any:
        if self.chosen is None:
            self.chosen = self._choose(args)
        return self.chosen(*args)

    def _choose(self, args: tuple[Any, ...]) -> Callable[..., Any]:
        fused, plain, eager = (
            _results(function, args) for function in (self.fused, self.plain, self.eager)
        )
        for index, (one, other, reference) in enumerate(zip(fused, plain, eager, strict=True)):
            error, own = distance(one, reference), distance(other, reference)
            floor = FLOORS.get(reference.dtype, 1e-9 if reference.is_floating_point() else 0.0)
            allowed = max(SLACK * own, floor)
            if not error <= allowed:
                return self._reject(
                    f"value {index} of the graph is {error:.2e} from eager's, relatively; "
                    f"Inductor alone is {own:.2e} from it and {allowed:.2e} is allowed"
                )
        return self.fused

    def _reject(self, what: str) -> Callable[..., Any]:
        text = (
            f"inductor_moe.verify: with {', '.join(self.names)}, {what}; inductor_moe.bisect "
            "finds the site, inductor_moe.disable leaves the rewrite out"
        )
        self.failed(text)
        if self.strict:
            raise VerificationError(text)
        warnings.warn(text + "; this graph runs without rewrites", VerificationWarning, 4)
        return self.plain


def _results(function: Callable[..., Any], args: tuple[Any, ...]) -> list[torch.Tensor]:
    """What a call returns and what it leaves in its arguments, on copies of them."""
    copies = [_copy(value) for value in args]
    outputs = function(*copies)
    flat = [*(outputs if isinstance(outputs, (list, tuple)) else [outputs]), *copies]
    return [value.detach().clone() for value in flat if isinstance(value, torch.Tensor)]


def _copy(value: Any) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    copy = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)
    return copy.copy_(value.detach())


def distance(value: torch.Tensor, reference: torch.Tensor) -> float:
    """||value - reference|| / ||reference||; infinite where the NaNs or infinities differ."""
    if value.shape != reference.shape or value.dtype != reference.dtype:
        return float("inf")
    if not reference.is_floating_point():
        return 0.0 if torch.equal(value, reference) else float("inf")
    finite = torch.isfinite(reference)
    if not torch.equal(finite, torch.isfinite(value)):
        return float("inf")
    one, other = value[finite].double(), reference[finite].double()
    return float((one - other).norm() / other.norm().clamp_min(1e-30))
