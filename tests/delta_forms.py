"""The delta rule written by hand in many spellings, each step replaceable.

A near-miss is a spelling with one of its steps replaced.
"""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

BATCH, HEADS, KEY, VALUE = 2, 3, 8, 8
Steps = dict[str, Callable[..., Any]]


@dataclasses.dataclass(frozen=True)
class Spelling:
    """How one hand-written delta rule is spelled.

    tokens     1 is a decode step, more an unrolled loop
    decay      "head", "channel", "none"; decay "outside" takes exp(g) before the loop
    products   "sum" (mul and sum), "matmul", "einsum", "mixed"
    scale      "query *", "query /", "output *", "none"
    norm       "none", "rsqrt", "divide", "normalize", "rsqrt after" (per token, in fp32)
    state      "kv" or "vk", and whether it is kept in bf16
    take       "select", "slice", "unbind"
    join       "stack", "cat", "scatter", "stack -2"
    """

    tokens: int = 1
    decay: str = "head"
    exp: str = "inside"
    products: str = "sum"
    scale: str = "query *"
    norm: str = "rsqrt"
    beta: str = "sigmoid"
    state: str = "kv"
    state_dtype: torch.dtype = torch.float32
    dtype: torch.dtype = torch.float32
    layout: str = "BTH"
    take: str = "select"
    join: str = "stack"
    value: int = VALUE

    def __str__(self) -> str:
        plain = Spelling()
        parts = [
            f"{field.name}={str(getattr(self, field.name)).removeprefix('torch.')}"
            for field in dataclasses.fields(self)
            if getattr(self, field.name) != getattr(plain, field.name)
        ]
        return " ".join(parts) or "plain"


def inputs(spelling: Spelling, seed: int = 0) -> tuple[Tensor, ...]:
    """q, k, v, g, b, state as the model gets them; b goes through the beta gate."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    rows = (BATCH, spelling.tokens, HEADS)
    q, k, v = normal(*rows, KEY), normal(*rows, KEY), normal(*rows, spelling.value)
    if spelling.norm == "none":
        k = k / k.norm(dim=-1, keepdim=True)
    channels = (KEY,) if spelling.decay == "channel" else ()
    g = -torch.rand((*rows, *channels), generator=generator)
    b = normal(*rows)
    state = normal(BATCH, HEADS, KEY, spelling.value)
    if spelling.state == "vk":
        state = state.transpose(-1, -2).contiguous()
    q, k, v, b = (x.to(spelling.dtype) for x in (q, k, v, b))
    return q, k, v, g, b, state.to(spelling.state_dtype)


def norm(x: Tensor, form: str) -> Tensor:
    if form.startswith("rsqrt"):
        return x * torch.rsqrt((x * x).sum(-1, keepdim=True) + 1e-6)
    if form == "divide":
        return x / torch.sqrt(x.pow(2).sum(dim=-1, keepdim=True) + 1e-5)
    return F.normalize(x, dim=-1) if form == "normalize" else x


def read(state: Tensor, row: Tensor, products: str, turned: bool) -> Tensor:
    """state^T row over the key dim."""
    if products in ("sum", "mixed"):
        if turned:
            return (state * row.unsqueeze(-2)).sum(-1)
        return (state * row.unsqueeze(-1)).sum(-2)
    if products == "matmul":
        if turned:
            return (state @ row.unsqueeze(-1)).squeeze(-1)
        return (row.unsqueeze(-2) @ state).squeeze(-2)
    return torch.einsum("bhvk,bhk->bhv" if turned else "bhkv,bhk->bhv", state, row)


def outer(key: Tensor, delta: Tensor, products: str, turned: bool) -> Tensor:
    if turned:
        key, delta = delta, key
    if products == "sum":
        return key.unsqueeze(-1) * delta.unsqueeze(-2)
    if products in ("matmul", "mixed"):
        return key.unsqueeze(-1) @ delta.unsqueeze(-2)
    return torch.einsum("bhk,bhv->bhkv", key, delta)


def step(
    state: Tensor, q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None, beta: Tensor,
    spelling: Spelling, steps: Steps,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """One token [B, H, ..]: the output and the new state."""
    turned, products = spelling.state == "vk", spelling.products
    old = state
    if decay is not None:
        if spelling.decay == "channel":
            factor = decay.unsqueeze(-2) if turned else decay.unsqueeze(-1)
        else:
            factor = decay[..., None, None]
        state = steps.get("decay", lambda s, f: s * f)(state, factor)
    seen = steps.get("seen", lambda old, state: state)(old, state)
    memory = steps.get("read", read)(seen, k, products, turned)
    delta = steps.get("delta", lambda v, m, b: (v - m) * b[..., None])(v, memory, beta)
    state = steps.get("write", lambda s, p: s + p)(state, outer(k, delta, products, turned))
    shown = steps.get("shown", lambda old, state: state)(old, state)
    out = steps.get("output", read)(shown, q, products, turned)
    return out, steps.get("keep", lambda s: s)(state)


def delta_rule(spelling: Spelling, **steps: Callable[..., Any]) -> Callable[..., Any]:
    """The function of `inputs`; returns (output, new state) and what the step "extra" adds."""

    def function(
        q: Tensor, k: Tensor, v: Tensor, g: Tensor, b: Tensor, state: Tensor
    ) -> tuple[Tensor, ...]:
        time = 1
        beta = {"sigmoid": torch.sigmoid, "twice": lambda x: 2 * torch.sigmoid(x)}[spelling.beta](
            b
        )
        if spelling.norm == "rsqrt after":
            q, k = q.float(), k.float()
        q, k = norm(q, spelling.norm), norm(k, spelling.norm)
        if spelling.layout == "BHT":
            q, k, v, g, beta = (x.transpose(1, 2) for x in (q, k, v, g, beta))
            time = 2
        wide = torch.promote_types(torch.float32, state.dtype)
        q, k, v, g, beta = (x.to(wide) for x in (q, k, v, g, beta))
        if spelling.scale.startswith("query"):
            q = q * KEY**-0.5 if spelling.scale.endswith("*") else q / KEY**0.5
        given = {"q": q, "k": k, "v": v, "beta": beta}
        if spelling.decay != "none":
            given["g"] = g.exp() if spelling.exp == "outside" else g
        given = steps.get("given", lambda x: x)(given)
        current = state.to(wide)
        rows = {name: _take(x, time, spelling) for name, x in given.items()}
        outputs = []
        into = torch.zeros((*given["v"].shape[:-1], spelling.value), dtype=wide, device=v.device)
        for t in range(spelling.tokens):
            now = {name: steps.get("turn", lambda r, t, n: r[t])(r, t, name)
                   for name, r in rows.items()}  # fmt: skip
            decay = now.get("g")
            if decay is not None and spelling.exp == "inside":
                decay = decay.exp()
            out, current = step(
                current, now["q"], now["k"], now["v"], decay, now["beta"], spelling, steps
            )
            if spelling.scale == "output *":
                out = out * KEY**-0.5
            outputs.append(out)
            if spelling.join == "scatter":
                into.select(time, t).copy_(out)
            current = steps.get("between", lambda s, t: s)(current, t)
        outputs = steps.get("outputs", lambda x: x)(outputs)
        if spelling.join == "stack":
            joined = torch.stack(outputs, time)
        elif spelling.join == "cat":
            joined = torch.cat([x.unsqueeze(time) for x in outputs], time)
        elif spelling.join == "stack -2":
            joined = torch.stack(outputs, -2)
        else:
            joined = into
        if "extra" in steps:
            return joined, current, steps["extra"](current, rows)
        return joined.to(spelling.dtype), current.to(state.dtype)

    return function


def _take(x: Tensor, time: int, spelling: Spelling) -> list[Tensor]:
    if spelling.take == "unbind":
        return list(x.unbind(time))
    if spelling.take == "slice":
        return [x.narrow(time, t, 1).squeeze(time) for t in range(spelling.tokens)]
    return [x.select(time, t) for t in range(spelling.tokens)]


CHOICES: dict[str, tuple[Any, ...]] = {
    "tokens": (1, 1, 2, 5),
    "decay": ("head", "channel", "none"),
    "exp": ("inside", "outside"),
    "products": ("sum", "matmul", "einsum", "mixed"),
    "scale": ("query *", "query /", "output *", "none"),
    "norm": ("none", "rsqrt", "divide", "normalize", "rsqrt after"),
    "beta": ("sigmoid", "twice"),
    "state": ("kv", "vk"),
    "state_dtype": (torch.float32, torch.bfloat16, torch.float64),
    "dtype": (torch.float32, torch.bfloat16),
    "layout": ("BTH", "BHT"),
    "take": ("select", "slice", "unbind"),
    "join": ("stack", "cat", "scatter", "stack -2"),
    "value": (VALUE, 12),
}


def spellings(count: int, seed: int = 5) -> Iterator[Spelling]:
    """Distinct spellings: every choice alone first, then random ones."""
    chooser = random.Random(seed)
    alone = (
        Spelling(**{"tokens": tokens, name: choice})
        for tokens in (1, 4)
        for name, choices in CHOICES.items()
        if name != "tokens"
        for choice in choices
    )
    mixed = (
        Spelling(**{name: chooser.choice(choices) for name, choices in CHOICES.items()})
        for _ in itertools.count()
    )
    seen: set[str] = set()
    for spelling in itertools.chain(alone, mixed):
        if len(seen) == count:
            return
        if str(spelling) not in seen:
            seen.add(str(spelling))
            yield spelling
