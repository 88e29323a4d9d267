"""Changes of one step of delta_forms: what is a delta rule no longer, and what still is one."""

from __future__ import annotations

import delta_forms
import torch
from delta_forms import Spelling, Steps, read
from torch import Tensor


def float_bits(x):
    return x.to(torch.int32).to(x.dtype)


def bf16(x: Tensor) -> Tensor:
    return x.bfloat16().to(x.dtype)


# A rounding that the op does not do is kept, with the whole rule.
ROUNDINGS = {
    "memory in bf16": {"delta": lambda v, m, b: (v - bf16(m)) * b[..., None]},
    "beta in bf16": {"delta": lambda v, m, b: (v - m) * bf16(b)[..., None]},
    "state in bf16": {"keep": bf16},
    "output in bf16": {"output": lambda *a: bf16(read(*a))},
}
# Wrong for one step as well as for many.
ALWAYS = {
    "memory read before the decay": {"seen": lambda old, state: old},
    "output read from the old state": {"shown": lambda old, state: old},
    "output read between the two": {"shown": lambda old, state: (old + state) / 2},
    "error with the other sign": {"delta": lambda v, m, b: (m - v) * b[..., None]},
    "written with the other sign": {"write": lambda s, p: s - p},
    "beta on the value alone": {"delta": lambda v, m, b: v * b[..., None] - m},
    "beta on the memory alone": {"delta": lambda v, m, b: v - m * b[..., None]},
    "no memory": {"delta": lambda v, m, b: v * b[..., None]},
    "memory doubled": {"delta": lambda v, m, b: (v - 2 * m) * b[..., None]},
    "error bounded": {"delta": lambda v, m, b: ((v - m) * b[..., None]).clamp(-50, 50)},
    "error through tanh": {"delta": lambda v, m, b: torch.tanh(v - m) * b[..., None]},
    "error plus a constant": {"delta": lambda v, m, b: (v - m + 1e-4) * b[..., None]},
    "decay by a root": {"decay": lambda s, f: s * f.sqrt()},
    "decay of the rest": {"decay": lambda s, f: s * (1 - f)},
    "decay with a floor": {"decay": lambda s, f: s * f.clamp(min=0.01)},
    "heads averaged": {"delta": lambda v, m, b: (v - m.mean(1, True)) * b[..., None]},
    "rows shifted": {"delta": lambda v, m, b: (v - m.roll(1, dims=0)) * b[..., None]},
    "memory read by the mean": {"read": lambda *a: read(*a) / delta_forms.KEY},
    "memory read over the value dim": {"read": lambda s, r, p, turned: read(s, r, p, not turned)},
    "output read over the value dim": {
        "output": lambda s, r, p, turned: read(s, r, p, not turned)
    },
    "output scaled by its own norm": {
        "output": lambda *a: read(*a) / read(*a).norm(dim=-1, keepdim=True)
    },
    "query and key swapped in the output": {"given": lambda x: x | {"q": x["k"]}},
    "beta a channel": {"delta": lambda v, m, b: (v - m) * b[..., None] * v.sigmoid()},
    "computed in float64": {"given": lambda x: {n: t.double() for n, t in x.items()}},
}
# Before or after a single step these are the model's own business; inside a loop they are not.
AROUND = {
    "beta squared": {"delta": lambda v, m, b: (v - m) * (b * b)[..., None]},
    "decay twice": {"decay": lambda s, f: s * f * f},
    "decay of an offset": {"decay": lambda s, f: s * f + 1e-3},
    "decay divided by": {"decay": lambda s, f: s / f},
    "state bounded": {"keep": lambda s: s.clamp(-100, 100)},
    "state scaled": {"keep": lambda s: 0.999 * s},
    "state cut to whole numbers": {"keep": float_bits},
    "heads shifted": {"keep": lambda s: s.roll(1, dims=1)},
    "output squared": {"output": lambda *a: read(*a).square()},
}
# Wrong for more than one step.
LOOPS = {
    "state in bf16 in the middle": {"between": lambda s, t: bf16(s) if t == 1 else s},
    "outputs in reverse": {"outputs": lambda x: x[::-1]},
    "an output left out": {"outputs": lambda x: [*x[:-2], x[-1], x[-1]]},
    "a first output again": {"outputs": lambda x: [x[0], *x[:-1]]},
    "one key late": {
        "turn": lambda r, t, name: r[max(t - 1, 0)] if name == "k" else r[t],
    },
    "the first beta for all": {"turn": lambda r, t, name: r[0] if name == "beta" else r[t]},
    "two values exchanged": {
        "turn": lambda r, t, name: r[{1: 2, 2: 1}.get(t, t)] if name == "v" else r[t],
    },
    "state reset in the middle": {"between": lambda s, t: torch.zeros_like(s) if t == 1 else s},
    "state scaled in the middle": {"between": lambda s, t: 0.5 * s if t == 1 else s},
    "state bounded in the middle": {"between": lambda s, t: s.clamp(max=10) if t == 1 else s},
    "state rounded down in the middle": {"between": lambda s, t: s.floor() if t == 2 else s},
}


def multiplied_in_place(state: Tensor, factor: Tensor) -> Tensor:
    return state.clone().mul_(factor)


def added_in_place(state: Tensor, product: Tensor) -> Tensor:
    return state.clone().add_(product)


# What may be computed is not said: some change nothing, some something, some depend on the rest.
OTHERS: dict[str, Steps] = {
    "decay in place": {"decay": multiplied_in_place},
    "write in place": {"write": added_in_place},
    "state written over": {"keep": lambda s: s.clone().copy_(s)},
    "state transposed twice": {"keep": lambda s: s.transpose(-1, -2).clone().transpose(-1, -2)},
    "state turned": {"keep": lambda s: s.transpose(-1, -2)},
    "error spelled apart": {"delta": lambda v, m, b: v * b[..., None] - m * b[..., None]},
    "error negated twice": {"delta": lambda v, m, b: -((m - v) * b[..., None])},
    "write by subtraction": {"write": lambda s, p: s - (-p)},
    "state returned before the last write": {
        "extra": lambda s, rows: (s * 2).sum(),
    },
    "a row of the queries returned": {"extra": lambda s, rows: rows["q"][0] + 1},
    "values negated": {"given": lambda x: x | {"v": -x["v"]}},
    "keys doubled": {"given": lambda x: x | {"k": 2 * x["k"]}},
    "keys rolled": {"given": lambda x: x | {"k": x["k"].roll(1, -1)}},
    "heads of the keys rolled": {"given": lambda x: x | {"k": x["k"].flip(0)}},
    "query and key the same": {"given": lambda x: x | {"k": x["q"]}},
    "beta of one head": {"given": lambda x: x | {"beta": x["beta"].mean(0, True) + 0 * x["beta"]}},
    "outputs doubled": {"outputs": lambda x: [2 * o for o in x]},
    "an output twice as large": {"outputs": lambda x: [*x[:-1], 2 * x[-1]]},
    "a decay left out": {"decay": lambda s, f: s},
    "decay of one": {"decay": lambda s, f: s * f * 1.0},
    "decay after the write": {"decay": lambda s, f: s, "keep": lambda s: s * 0.9},
    "two writes": {"write": lambda s, p: s + p + p},
    "half a write": {"write": lambda s, p: s + 0.5 * p},
    "write the state's mean": {"write": lambda s, p: s + p - p.mean()},
    "value of the key": {"turn": lambda r, t, name: r[-1] if name == "v" else r[t]},
    "decay of the next token": {
        "turn": lambda r, t, name: r[(t + 1) % len(r)] if name == "g" else r[t],
    },
}
MUTATIONS: dict[str, Steps] = ALWAYS | ROUNDINGS | AROUND | LOOPS | OTHERS


def mutated(spelling: Spelling, *names: str) -> Steps:
    """The steps of the mutations that `spelling` has a place for; the last of a step counts."""
    steps: Steps = {}
    for name in names:
        if spelling.tokens > 2 or name not in LOOPS:
            steps |= MUTATIONS[name]
    return steps
