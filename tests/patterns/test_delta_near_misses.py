"""What does one step of the delta rule differently is no delta rule and stays as it is."""

from __future__ import annotations

import delta_forms
import pytest
import torch
from delta_forms import Spelling, read
from rewriting import check_fused, check_untouched


def float_bits(x):
    return x.to(torch.int32).to(x.dtype)


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


NEAR_MISSES = [
    pytest.param(
        Spelling(tokens=tokens, products=products, norm="none"), steps, id=f"{name}, T={tokens}"
    )
    for forms, lengths in ((ALWAYS, (1, 4)), (AROUND, (4,)), (LOOPS, (4,)))
    for name, steps in forms.items()
    for tokens, products in zip(lengths, ("sum", "matmul"), strict=False)
]


@pytest.mark.parametrize(("spelling", "steps"), NEAR_MISSES)
def test_a_near_miss_is_left_alone(spelling, steps):
    check_untouched(delta_forms.delta_rule(spelling, **steps), delta_forms.inputs(spelling))


@pytest.mark.parametrize("name", AROUND)
def test_what_surrounds_a_single_step_stays(name):
    spelling = Spelling(norm="none")
    check_fused(delta_forms.delta_rule(spelling, **AROUND[name]), delta_forms.inputs(spelling))
