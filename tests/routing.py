"""Whether a model's choices of experts are decided, or a matter of rounding."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
MASKED = -1e30


class Choices(TorchDispatchMode):
    """Records the scores [..., N] and the count k of every `topk` and `argmax` that runs."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[tuple[torch.Tensor, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is aten.topk.default:
            scores, k, dim = (*args, -1)[:3]
            self.made.append((scores.movedim(dim, -1).double(), k))
        elif func is aten.argmax.default and len(args) > 1:
            self.made.append((args[0].movedim(args[1], -1).double(), 1))
        return func(*args, **kwargs)


def undecided(model: torch.nn.Module, exact: torch.nn.Module, *args: Any, slack: float) -> int:
    """How many choices another correct computation in the model's precision might make otherwise.

    model, exact  the same weights, in low precision and in fp64
    slack         scores `slack` times as far from fp64 as the model's own must choose alike

    A choice is decided if the last score taken and the first one left are further apart in fp64
    than both may move. One that is not outweighs every rounding error if it falls otherwise.
    """
    with torch.no_grad(), Choices() as low:
        model(*args)
    with torch.no_grad(), Choices() as high:
        exact(*args)
    count = 0
    for (scores, k), (reference, _) in zip(low.made, high.made, strict=True):
        if k >= reference.shape[-1]:
            continue
        same = (scores == reference) | (reference < MASKED)
        reach = 2 * slack * torch.where(same, 0, (scores - reference).abs()).max()
        taken, left = reference.topk(k + 1).values[..., -2:].unbind(-1)
        count += int((~(taken - left > reach) & (reach > 0) & (taken >= MASKED)).sum())
    return count
