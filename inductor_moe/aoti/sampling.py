"""The next token from logits, in operations that a graph can hold."""

from __future__ import annotations

import torch
from torch import Tensor


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
    return torch.where(temperature > 0, sampled, logits.argmax(-1))
