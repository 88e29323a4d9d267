"""The whole router as one op: schema, checks, its kernel, and where it is put in place."""

from __future__ import annotations

import functools

import forms
import pytest
import torch
from kernels.interpreted import Interpreted
from torch import nn

from inductor_moe.ops.moe_router import moe_router, moe_router_cuda, moe_router_plain
from inductor_moe.patterns.moe import gate
from inductor_moe.testing import capture, relative_error

ROUTES = {
    "softmax": (3, "softmax", True),
    "sigmoid, bias, groups": (4, "sigmoid", True, "bias", 1e-20, 0.0, 2.5, 4, 2, 2),
    "logits": (2, "logits", False),
}


def arguments(hidden, experts, route, dtype, residual=True, norm=True, gate=True, tokens=1):
    """The op's arguments; logits far enough apart that rounding hardly changes a choice."""
    # a pattern of signs for even tokens and one for odd ones, each with its order of experts
    signs = torch.randn(2, hidden).sign()
    x = torch.rand(tokens, hidden) * signs[torch.arange(tokens) % 2] * 2
    order = torch.stack([torch.randperm(experts) + 1 for _ in range(2)]) / experts
    router = torch.randn(experts, hidden) / hidden / 8 + (order**16).T @ signs * 8 / hidden
    route = [torch.randn(experts) / 8 if option == "bias" else option for option in route]
    return (
        (x / 2).to(dtype) if residual else x.to(dtype),
        (x / 2).to(dtype) if residual else None,
        (1 + torch.randn(hidden) / 8).to(dtype) if norm else None,
        1e-6, 0.5,
        router.to(dtype),
        torch.randn(1, hidden).to(dtype) if gate else None,
        torch.zeros(2 + tokens, dtype=torch.int32), 1, *route,
    )  # fmt: skip


def decided(*given, **parts):
    """Arguments for which eager and fp64 make one choice, and their outputs."""
    while True:
        drawn = arguments(*given, **parts)
        eager, expected = moe_router_plain(*drawn), moe_router_plain(*widened(drawn))
        if torch.equal(eager[3], expected[3]):
            return drawn, eager, expected


def widened(given):
    return [a.double() if torch.is_tensor(a) and a.is_floating_point() else a for a in given]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("route", ROUTES.values(), ids=ROUTES)
@pytest.mark.parametrize("parts", ["residual norm gate", "norm", "gate", "residual norm"])
@pytest.mark.parametrize("hidden, tokens", [(64, 1), (200, 1), (200, 3), (64, 16)])
def test_kernel(monkeypatch, hidden, tokens, parts, route, dtype):
    torch.manual_seed(len(parts) + hidden)
    flags = {name: name in parts for name in ("residual", "norm", "gate")}
    given, eager, expected = decided(hidden, 20, route, dtype, **flags, tokens=tokens)
    new_empty = torch.Tensor.new_empty

    def poisoned(self, *args, **kwargs):
        tensor = new_empty(self, *args, **kwargs)
        return tensor.fill_(float("nan") if tensor.is_floating_point() else -1)

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)
    found = moe_router_cuda(*given, wrap=Interpreted)
    monkeypatch.undo()
    programs = 20 + flags["gate"] if tokens == 1 else 5 + flags["gate"]
    assert given[7].tolist() == [0, *[programs] * tokens, 0]
    assert [t.shape for t in found] == [t.shape for t in expected]
    assert torch.equal(found[3], expected[3])
    for index in (0, 1, 2, 4):
        assert found[index].dtype == eager[index].dtype
        if found[index].numel():
            limit = 2 * relative_error(eager[index], expected[index]) + 1e-6
            assert relative_error(found[index], expected[index]) <= limit


def test_weights_of_another_dtype():
    given = arguments(64, 20, ROUTES["softmax"], torch.bfloat16)
    for run in (moe_router_plain, functools.partial(moe_router_cuda, wrap=Interpreted)):
        given[7].zero_()
        wide = run(*given)[2]
        given[7].zero_()
        found = run(*given, weights_dtype=torch.bfloat16)[2]
        assert found.dtype == torch.bfloat16 and torch.equal(found, wide.bfloat16())
    given[7].zero_()
    torch.library.opcheck(moe_router, tuple(given), {"weights_dtype": torch.bfloat16})


@pytest.mark.parametrize("first, own", [(0, 10), (10, 10), (7, 1), (0, 20)])
def test_experts_of_others_have_a_number_past_all(first, own):
    torch.manual_seed(own)
    given = arguments(64, 20, ROUTES["softmax"], torch.bfloat16, tokens=1 + own % 2)
    (_, _, weights, ids, _) = moe_router_cuda(*given, wrap=Interpreted)
    for run in (moe_router_plain, functools.partial(moe_router_cuda, wrap=Interpreted)):
        given[7].zero_()
        found = run(*given, first=first, own=own)
        kept = (ids >= first) & (ids < first + own)
        assert torch.equal(found[3], torch.where(kept, ids - first, 20))
        assert relative_error(found[2], weights) < 1e-2


@pytest.mark.parametrize("parts", [{}, {"residual": False, "gate": False}, {"norm": False}])
def test_opcheck(parts):
    for tokens in (1, 2):
        given = arguments(24, 9, ROUTES["softmax"], torch.float32, **parts, tokens=tokens)
        torch.library.opcheck(moe_router, given)
        torch.library.opcheck(moe_router, given, {"first": 3, "own": 4})


@pytest.mark.parametrize("first, own", [(-1, 2), (3, -1), (8, 2)])
def test_experts_that_are_not_there(first, own):
    given = arguments(24, 9, ROUTES["softmax"], torch.float32)
    with pytest.raises(ValueError, match=f"first is {first} and own is {own}"):
        moe_router(*given, first=first, own=own)


@pytest.mark.parametrize(
    "place, value, message",
    [
        (0, torch.ones(17, 24), r"x has dtype torch.float32 and shape \[17, 24\].* from 1 to 16"),
        (0, torch.ones(0, 24), r"x has dtype torch.float32 and shape \[0, 24\]"),
        (1, torch.ones(1, 23), r"residual has shape \[1, 23\]"),
        (2, torch.ones(1, 24), r"norm_weight has shape \[1, 24\]"),
        (5, torch.ones(9, 24).half(), "router has dtype torch.float16"),
        (6, torch.ones(2, 24), r"gate has shape \[2, 24\]"),
        (7, torch.zeros(3), "counters has dtype torch.float32"),
        (8, 3, "index is 3.* has 1 elements"),
        (9, 10, "top_k"),
    ],
)
def test_a_bad_argument_is_named(place, value, message):
    given = list(arguments(24, 9, ROUTES["softmax"], torch.float32))
    given[place] = value
    with pytest.raises(ValueError, match=message):
        moe_router(*given)


class Block(nn.Module):
    """Residual, norm, router, experts: a decoder layer's second half."""

    def __init__(self, norm=None):
        super().__init__()
        torch.manual_seed(4)
        self.norm_weight = nn.Parameter(torch.randn(forms.HIDDEN) / 4)
        self.router = nn.Linear(forms.HIDDEN, forms.EXPERTS, bias=False)
        self.gate = nn.Linear(forms.HIDDEN, 2, bias=False)
        self.experts = forms.Experts(form="batched")
        self.norm = norm or self.one_plus

    def one_plus(self, x):
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)
        return (wide * (1.0 + self.norm_weight.float())).type_as(x)

    def forward(self, x, residual):
        total = x + residual
        normed = self.norm(total).view(-1, forms.HIDDEN)
        scores = torch.softmax(self.router(normed), -1, dtype=torch.float)
        weights, ids = torch.topk(scores, 2, dim=-1)
        weights = weights / weights.sum(-1, keepdim=True)
        out = self.experts(normed, ids, weights.to(x.dtype))
        return total + out.view_as(x), self.gate(normed)


def plain(self, x):
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)
    return self.norm_weight * wide.to(x.dtype)


def halved(self, x):
    wide = x.float()
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) / 2 + 1e-5)).to(x.dtype)


def by_sum(self, x):
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).sum(-1, keepdim=True) + 1e-5)
    return (wide * self.norm_weight.float()).to(x.dtype)


def layer_norm(self, x):
    return nn.functional.layer_norm(x, (forms.HIDDEN,), self.norm_weight, None, 1e-5)


NORMS = {  # name -> (norm, what the site says of it)
    "one plus weight": (None, "residual, norm"),
    "weight": (plain, "residual, norm"),
    "no weight": (halved, ""),
    "sum": (by_sum, ""),
    "layer norm": (layer_norm, ""),
}


@torch.no_grad()
@pytest.mark.parametrize("tokens", [(1, 1), (2, 3)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("norm, said", NORMS.values(), ids=NORMS)
def test_what_is_put_in_place(norm, said, dtype, tokens):
    block = Block()
    if norm is not None:
        block.norm = norm.__get__(block)
    block = block.to(dtype)
    x, residual = (torch.randn(*tokens, forms.HIDDEN).to(dtype) for _ in range(2))
    eager = block(x, residual)
    exact = block.double()(x.double(), residual.double())
    block.to(dtype)
    found, report = capture(block, x, residual)
    sites = [site for site in report.matched if site.rewrite == "moe.router"]
    assert len(sites) == 1
    assert sites[0].detail.endswith(f"H={forms.HIDDEN}" + (f", {said}" if said else ""))
    for output, value, reference in zip(found, eager, exact, strict=True):
        assert output.dtype == value.dtype and output.shape == value.shape
        limit = 2 * relative_error(value, reference) + 1e-6
        assert relative_error(output, reference) <= limit


@torch.no_grad()
def test_many_tokens_and_computed_weights_are_left_alone(monkeypatch):
    block = Block()
    for tokens, sites in ((16, 1), (17, 0)):
        x, residual = torch.randn(2, tokens, 1, forms.HIDDEN).unbind(0)
        _, report = capture(block, x, residual)
        found = [site for site in report.matched if site.rewrite == "moe.router"]
        assert len(found) == sites
    with monkeypatch.context() as patch:
        patch.setattr(gate, "MAX_READ", 15 * forms.HIDDEN)
        _, report = capture(block, x[:16], residual[:16])
        assert not [site for site in report.matched if site.rewrite == "moe.router"]
    _, report = capture(block, x, residual, dynamic=True)
    assert not [site for site in report.matched if site.rewrite == "moe.router"]

    class Doubled(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = Block()

        def forward(self, x):
            logits = nn.functional.linear(x, self.block.router.weight * 2)
            weights, ids = torch.topk(torch.softmax(logits, -1), 2, dim=-1)
            return self.block.experts(x, ids, weights)

    _, report = capture(Doubled(), torch.randn(1, forms.HIDDEN))
    assert not [site for site in report.matched if site.rewrite == "moe.router"]
    assert report.counts() == {"moe_experts": 1, "moe_route": 1}


@torch.no_grad()
def test_a_norm_of_each_half_stays_apart():
    block = Block()
    scale = torch.randn(forms.HIDDEN // 2)

    def forward(x):
        halves = x.view(-1, 2, forms.HIDDEN // 2)
        halves = halves * torch.rsqrt(halves.pow(2).mean(-1, keepdim=True) + 1e-5) * scale
        normed = halves.view(-1, forms.HIDDEN)
        weights, ids = torch.topk(torch.softmax(block.router(normed), -1), 2, dim=-1)
        return block.experts(normed, ids, weights)

    x = torch.randn(3, forms.HIDDEN)
    found, report = capture(forward, x)
    sites = [site for site in report.matched if site.rewrite == "moe.router"]
    assert len(sites) == 1 and sites[0].detail.endswith(f"H={forms.HIDDEN}")
    torch.testing.assert_close(found, forward(x), rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("tokens", [1, 5])
def test_several_routers_count_apart(tokens):
    first, second = Block(), Block()

    def forward(x, residual):
        hidden, _ = first(x, residual)
        return second(hidden, residual)

    graphs = []
    x, residual = torch.randn(2, tokens, 1, forms.HIDDEN).unbind(0)
    eager = forward(x, residual)
    found, _ = capture(forward, x, residual, graphs=graphs)
    routers = [n for n in graphs[0].graph.nodes if "moe_router" in str(n.target)]
    assert [node.args[8] for node in routers] == [0, tokens]
    assert len({node.args[7] for node in routers}) == 1
    torch.testing.assert_close(found[0], eager[0], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_rounded_logits_are_left_alone():
    block = Block()

    def forward(x):
        logits = block.router(x).bfloat16()
        weights, ids = torch.topk(torch.softmax(logits, -1, dtype=torch.float), 2, dim=-1)
        return block.experts(x, ids, weights)

    x = torch.randn(1, forms.HIDDEN)
    graphs = []
    capture(forward, x, graphs=graphs, options={"inductor_moe.disable": "moe"})
    if not any(torch.bfloat16 in node.args for node in graphs[0].graph.nodes):
        pytest.skip("Inductor itself drops the rounding, as torch 2.11 does")
    found, report = capture(forward, x)
    assert report.counts() == {"moe_experts": 1, "moe_route": 1}
    assert not [site for site in report.matched if site.rewrite == "moe.router"]
    torch.testing.assert_close(found, forward(x), rtol=1e-4, atol=1e-5)
