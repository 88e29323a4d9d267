"""The chunked delta rule written by hand, each step replaceable."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

BATCH, HEADS, KEY, VALUE = 2, 3, 16, 12


def inputs(tokens: int, per_channel: bool = False, seed: int = 0) -> tuple[Tensor, ...]:
    """q, k, v, g, beta, state."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    rows = (BATCH, tokens, HEADS)
    channels = (KEY,) if per_channel else ()
    q, k, v = normal(*rows, KEY), normal(*rows, KEY), normal(*rows, VALUE)
    g = -0.3 * torch.rand((*rows, *channels), generator=generator)
    return q, k, v, g, normal(*rows), normal(BATCH, HEADS, KEY, VALUE)


def by_rows(lower: Tensor) -> Tensor:
    """(I + lower)^-1 by forward substitution, one row at a time."""
    inverse = -lower
    for i in range(1, lower.shape[-1]):
        row = inverse[..., i, :i].clone()
        known = inverse[..., :i, :i].clone()
        inverse[..., i, :i] = row + (row.unsqueeze(-1) * known).sum(-2)
    return inverse + torch.eye(lower.shape[-1], dtype=lower.dtype, device=lower.device)


def by_solve(lower: Tensor) -> Tensor:
    """The same by a triangular solve."""
    eye = torch.eye(lower.shape[-1], dtype=lower.dtype, device=lower.device)
    return torch.linalg.solve_triangular(lower + eye, eye, upper=False, unitriangular=True)


def chunk_rule(
    chunk: int = 8, inverse: str = "solve", decay: bool = True, **steps: Callable[..., Any]
) -> Callable[..., tuple[Tensor, Tensor]]:
    """The function of `inputs`; returns (output, new state)."""
    step = steps.get

    def function(q: Tensor, k: Tensor, v: Tensor, g: Tensor, b: Tensor, state: Tensor):  # type: ignore[no-untyped-def]
        tokens = q.shape[1]
        beta = torch.sigmoid(b)
        q, k = (x * torch.rsqrt((x * x).sum(-1, keepdim=True) + 1e-6) for x in (q, k))
        q, k, v, g, beta = (x.transpose(1, 2) for x in (q, k, v, g, beta))
        q = q * KEY**-0.5
        padding = -tokens % chunk
        q, k, v = (F.pad(x, (0, 0, 0, padding)) for x in (q, k, v))
        g, beta = (F.pad(x, (0, padding)) for x in (g, beta))
        value, strength = v * beta[..., None], k * beta[..., None]
        count = (tokens + padding) // chunk
        q, k, value, strength = (
            x.reshape(*x.shape[:2], count, chunk, x.shape[-1]) for x in (q, k, value, strength)
        )
        total = g.reshape(*g.shape[:2], count, chunk).cumsum(-1)
        if not decay:
            total = torch.zeros_like(total)
        ones = torch.ones(chunk, chunk, dtype=torch.bool, device=q.device)
        future = step("future", lambda x: x.triu(1))(ones)
        between = (total[..., :, None] - total[..., None, :]).masked_fill(future, float("-inf"))
        between = between.exp()
        lower = step("lower", lambda x: x.tril(-1))(strength @ k.transpose(-1, -2) * between)
        solved = (by_solve if inverse == "solve" else by_rows)(lower)
        within = step("within", lambda x, d: x * d)(q @ k.transpose(-1, -2), between)
        writes, reads = solved @ value, solved @ (strength * total.exp()[..., None])
        start = q * step("start", lambda t: t.exp())(total)[..., None]
        end = k * (total[..., -1:] - total).exp()[..., None]
        outputs = []
        for i in range(count):
            new = step("new", lambda w, r, s: w - r @ s)(writes[:, :, i], reads[:, :, i], state)
            outputs.append(start[:, :, i] @ state + within[:, :, i] @ new)
            kept = (
                state * step("whole", lambda t: t[..., -1])(total[:, :, i]).exp()[..., None, None]
            )
            state = kept + end[:, :, step("end", lambda i: i)(i)].transpose(-1, -2) @ new
        out = torch.stack(step("outputs", lambda x: x)(outputs), 2)
        out = out.reshape(*out.shape[:2], count * chunk, VALUE)[:, :, :tokens]
        return out.transpose(1, 2).contiguous(), state

    return function
