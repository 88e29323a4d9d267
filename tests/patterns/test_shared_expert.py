"""The shared expert beside the routed ones: what is folded into their op, and what is not."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import forms
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import inductor_moe
from inductor_moe.testing import capture, fused_layers, relative_error

H, W = forms.HIDDEN, forms.INNER
OP = "inductor_moe.moe_experts_shared.default"


class Block(nn.Module):
    """Routed experts and a shared one; `steps` replaces any of the steps by name."""

    def __init__(self, inner: int = W, gate: str = "chunked", bias: bool = False, **steps: Any):
        super().__init__()
        self.routed = forms.Routed(forms.Experts("batched", gate=gate, **steps.pop("experts", {})))
        self.gate_proj = nn.Linear(H, inner, bias=bias) if gate != "none" else None
        self.up_proj = nn.Linear(H, inner, bias=False)
        self.down_proj = nn.Linear(inner, H, bias=False)
        self.logit = nn.Linear(H, 1, bias=False)
        self.steps = steps

    def step(self, name: str, default: Callable[..., Any]) -> Callable[..., Any]:
        return self.steps.get(name, default)

    def forward(self, x: Tensor) -> Any:
        y = self.routed(x.view(-1, H)).view(x.shape)
        x = self.step("input", lambda v: v)(x)
        up = self.up_proj(x)
        if self.gate_proj is None:
            h = self.step("function", F.silu)(up)
        else:
            h = self.step("function", forms.swiglu)(self.gate_proj(x), up)
        shared = self.step("down", lambda m, v: m(v))(self.down_proj, h)
        total = self.step("add", lambda y, s, g: y + torch.sigmoid(g) * s)
        result = total(y, shared, self.logit(x))
        extra = self.step("extra", None)
        return (result, extra(y, up, h, shared)) if extra else result


def build(dtype: torch.dtype = torch.bfloat16, scheme: str = "", **knobs: Any) -> Block:
    torch.manual_seed(5)
    block = Block(**knobs).to(dtype).eval()
    if scheme:
        inductor_moe.quantize_(block, scheme, group_size=16 if scheme == "int4" else 0,
                               verbose=False)  # fmt: skip
    return block


def run(block: Block, x: Tensor) -> tuple[Any, Any, list[str]]:
    graphs: list[Any] = []
    with torch.no_grad():
        found, report = capture(block, x, graphs=graphs)
    return found, report, [str(node.target) for node in graphs[0].graph.nodes]


def tokens(count: int = 2, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return forms.tokens(dtype, count)


FORMS: dict[str, tuple[dict[str, Any], Any]] = {
    "gated by a sigmoid": ({}, tokens()),
    "one token": ({}, tokens(1)),
    "three tokens": ({}, tokens(3)),
    "batch and sequence": ({}, tokens(2).view(1, 2, H)),
    "two sequences": ({}, tokens(2).view(2, 1, H)),
    "no gate": ({"add": lambda y, s, g: y + s}, tokens()),
    "shared first": ({"add": lambda y, s, g: s * g.sigmoid() + y}, tokens()),
    "sigmoid in fp32": (
        {"add": lambda y, s, g: y + torch.sigmoid(g.float()).to(s.dtype) * s},
        tokens(),
    ),
    "sum in fp32": ({"add": lambda y, s, g: (y.float() + s.float()).bfloat16()}, tokens()),
    "wider": ({"inner": 3 * W}, tokens()),
    "an odd width": ({"inner": 20}, tokens()),
    "fp32": ({"dtype": torch.float32}, tokens(dtype=torch.float32)),
    "fp16": ({"dtype": torch.float16}, tokens(dtype=torch.float16)),
    "gelu": (
        {"function": forms.geglu, "experts": {"function": forms.geglu}},
        tokens(),
    ),
    "silu spelled out": ({"function": forms.spelled_silu}, tokens()),
    "clamped": (
        {"function": forms.limited_swiglu, "experts": {"function": forms.limited_swiglu}},
        tokens(),
    ),
    "interleaved experts": ({"gate": "interleaved"}, tokens()),
    "halves not gated": ({"gate": "none"}, tokens()),
    "the other half activated": ({"function": lambda g, u: g * F.silu(u)}, tokens()),
    "int4": ({"scheme": "int4"}, tokens()),
    "int4 wider": ({"scheme": "int4", "inner": 2 * W}, tokens()),
    "int8": ({"scheme": "int8"}, tokens()),
    "the gate's result used elsewhere": (
        {"add": lambda y, s, g: y + torch.sigmoid(g) * s + 0 * torch.sigmoid(g)},
        tokens(),
    ),
    "scaled together": ({"add": lambda y, s, g: (y + s) * torch.sigmoid(g)}, tokens()),
}


@pytest.mark.parametrize("knobs, x", FORMS.values(), ids=FORMS)
def test_form_is_folded_in(knobs, x):
    block = build(**knobs)
    found, report, targets = run(block, x)
    assert targets.count(OP) == 1, str(report)
    assert [site.rewrite for site in report.matched if site.op == "moe_experts"] == [
        "moe.shared_expert"
    ]
    assert fused_layers(report)["moe_experts"] == 1 and report.refused == ()
    with torch.no_grad():
        eager, exact = block(x), copy.deepcopy(block).double()(x.double())
    assert found.dtype == eager.dtype and found.shape == eager.shape
    assert relative_error(found, exact) <= 2 * relative_error(eager, exact)


NEAR_MISSES: dict[str, dict[str, Any]] = {
    "nine tokens": {"count": 9},
    "more pairs than experts": {"count": 4},
    "alpha": {"add": lambda y, s, g: torch.add(y, torch.sigmoid(g) * s, alpha=2)},
    "difference": {"add": lambda y, s, g: y - s},
    "product": {"add": lambda y, s, g: y * s},
    "softmax of the logit": {"add": lambda y, s, g: y + torch.softmax(g, -1) * s},
    "tanh of the logit": {"add": lambda y, s, g: y + torch.tanh(g) * s},
    "half a sigmoid": {"add": lambda y, s, g: y + 0.5 * torch.sigmoid(g) * s},
    "a scaled expert": {"add": lambda y, s, g: y + s * 0.5},
    "a sigmoid of channels": {"add": lambda y, s, g: y + torch.sigmoid(s) * s},
    "the gate on the routed experts": {"add": lambda y, s, g: y * torch.sigmoid(g) + s},
    "one token's for all": {"add": lambda y, s, g: y + s[:1]},
    "another token's": {"add": lambda y, s, g: y + s.flip(0)},
    "gates of other tokens": {"add": lambda y, s, g: y + torch.sigmoid(g.flip(0)[:1]) * s},
    "a constant": {"add": lambda y, s, g: y + 1.0},
    "itself": {"add": lambda y, s, g: y + y},
    "clamped before the sum": {"add": lambda y, s, g: y + s.clamp(-0.1, 0.1)},
    "routed clamped before the sum": {"add": lambda y, s, g: y.clamp(-0.1, 0.1) + s},
    "another activation": {"function": forms.geglu},
    "another constant": {"function": lambda g, u: g * torch.sigmoid(1.1 * g) * u},
    "an offset": {"function": lambda g, u: F.silu(g) * (u + 1)},
    "no activation": {"function": lambda g, u: g * u},
    "one half twice": {"function": lambda g, u: F.silu(u) * u + 0 * g},
    "normalised": {"function": lambda g, u: F.silu(g) * u / u.abs().sum(-1, keepdim=True)},
    "rounded between": {
        "dtype": torch.float32,
        "function": lambda g, u: (F.silu(g).bfloat16() * u.bfloat16()).to(g.dtype),
    },
    "rounded after": {
        "dtype": torch.float32,
        "add": lambda y, s, g: y + torch.sigmoid(g).bfloat16() * s.bfloat16(),
    },
    "routed rounded after": {
        "dtype": torch.float32,
        "add": lambda y, s, g: y.bfloat16() * 1.5 + s,
    },
    "another input": {"input": lambda x: x + 1},
    "inputs in another order": {"input": lambda x: x.flip(0)},
    "a bias": {"bias": True},
    "the weight not transposed": {"inner": H, "down": lambda m, h: h @ m.weight},
    "a bias after": {"down": lambda m, h: m(h) + 1},
    "routed result used elsewhere": {"extra": lambda y, up, h, s: y * 2},
    "up rows used elsewhere": {"extra": lambda y, up, h, s: up.sum(0)},
    "hidden rows used elsewhere": {"extra": lambda y, up, h, s: h.sum(0)},
    "shared result used elsewhere": {"extra": lambda y, up, h, s: s * 2},
    "routed biases": {"experts": {"bias": True}},
    "weights on the input": {"experts": {"weights_on_input": True}},
    "routed of another activation": {"experts": {"function": forms.geglu_tanh}},
}


@pytest.mark.parametrize("knobs", NEAR_MISSES.values(), ids=NEAR_MISSES)
def test_near_miss_is_left_alone(knobs):
    knobs = dict(knobs)
    x = tokens(knobs.pop("count", 2), knobs.get("dtype", torch.bfloat16))
    block = build(**knobs)
    found, report, targets = run(block, x)
    assert OP not in targets
    assert fused_layers(report) == {"moe_experts": 1}, str(report)
    with torch.no_grad():
        eager, exact = block(x), copy.deepcopy(block).double()(x.double())
    outputs = [v if isinstance(v, tuple) else (v,) for v in (found, eager, exact)]
    for got, plain, want in zip(*outputs, strict=True):
        assert relative_error(got, want) <= 2 * relative_error(plain, want) + 1e-6


@pytest.mark.parametrize("kept", ["routed.experts", "gate_proj", "up_proj", "down_proj"])
def test_weights_of_two_kinds_are_left_alone(kept):
    block = build()
    inductor_moe.quantize_(block, "int4", group_size=16, skip=[kept], verbose=False)
    _, _, targets = run(block, tokens())
    linears = ("quantized_linear", "merged_linear")
    assert OP not in targets and any(op in target for target in targets for op in linears)


def test_switched_off():
    options = {"inductor_moe.disable": "moe.shared_expert"}
    _, report = capture(build(), tokens(), options=options)
    (site,) = (s for s in report.matched if s.op == "moe_experts")
    assert site.rewrite == "moe.experts.batched_mm"


def test_a_symbolic_number_of_tokens_is_left_alone():
    block = build()
    _, report = capture(block, tokens(5), dynamic=True)
    assert [s.rewrite for s in report.matched if s.op == "moe_experts"] == [
        "moe.experts.batched_mm"
    ]


def test_what_it_costs():
    _, report, _ = run(build(torch.float32), tokens(dtype=torch.float32))
    (site,) = (s for s in report.matched if s.op == "moe_experts")
    pairs, weights = 2 * forms.TOP_K, 3 * H * W
    assert site.flops == 2 * (pairs + 2) * weights
    rows = 2 * (2 * H + 1) * 4 + pairs * (8 + 4)
    assert site.bytes == (pairs + 1) * weights * 4 + rows
    assert site.after.startswith("moe_experts_shared(x [2, 32]")
    assert "moe_up_decode_kernel" in site.kernels
