"""The next token from logits, in operations that a graph can hold."""

from __future__ import annotations

import torch
from torch import Tensor

# What a package's graphs choose tokens by.
SAMPLING = ("top_p", "greedy")

# One reduction over a vocabulary is one block of a GPU; this many rows fill the GPU.
ROWS = 512
SHORT = 4096  # one block reduces so much as fast as two launches


def argmax_last(x: Tensor) -> Tensor:
    """x.argmax(-1), in two stages for a last dim that is long: of parts, and then of the parts.

    x        [..., V]  any float; V is known at compile time
    returns  [...] int64: the first index of the greatest value; NaN counts as the greatest
    """
    size = x.shape[-1]
    if size <= SHORT:
        return x.argmax(-1)
    width = -(-size // ROWS)
    short = -size % width
    if short:
        # The first of equal values is taken, so padding loses to a row of -inf as well.
        x = torch.nn.functional.pad(x, (0, short), value=float("-inf"))
    greatest, index = x.unflatten(-1, (-1, width)).max(-1)
    part = greatest.argmax(-1, keepdim=True)
    found: Tensor = part * width + index.gather(-1, part)
    return found.squeeze(-1)


def next_token(logits: Tensor, temperature: Tensor, top_p: Tensor, uniform: Tensor) -> Tensor:
    """The most likely token where temperature is 0, else one drawn from the nucleus.

    logits       [B, V]  any float
    temperature  [B]     fp32, >= 0
    top_p        [B]     fp32 in (0, 1]: keep the smallest set of most likely tokens whose
                         probability reaches it
    uniform      [B]     fp32 in [0, 1): the same numbers give the same tokens
    returns [B] int64
    """
    logits = logits.float()
    scale = torch.where(temperature > 0, temperature, 1.0).reciprocal()
    probabilities = torch.softmax(logits * scale[:, None], -1)
    descending, order = probabilities.sort(stable=True, dim=-1, descending=True)
    reached = descending.cumsum(-1)
    kept = torch.cat([torch.zeros_like(reached[:, :1]), reached[:, :-1]], -1) < top_p[:, None]
    mass = (descending * kept).sum(-1, keepdim=True)
    passed = ((reached <= uniform[:, None] * mass) & kept).sum(-1)
    # Rounding may let a draw close to 1 pass every kept token.
    drawn = torch.minimum(passed, kept.sum(-1) - 1)
    sampled = order.gather(1, drawn[:, None]).squeeze(1)
    return torch.where(temperature > 0, sampled, argmax_last(logits))
