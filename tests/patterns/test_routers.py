"""Routers of a known form become one op; others stay, and the experts are fused all the same."""

from __future__ import annotations

import copy

import forms
import pytest
import torch
from torch import nn

from inductor_moe.testing import capture, relative_error


class Model(nn.Module):
    def __init__(self, route):
        super().__init__()
        self.router = nn.Linear(forms.HIDDEN, forms.EXPERTS, bias=False)
        self.experts = forms.Experts(form="batched")
        self.route = route

    def forward(self, x):
        weights, ids = self.route(self.router(x))
        return self.experts(x, ids, weights.to(x.dtype))


def softmax(logits):
    return torch.topk(torch.softmax(logits, -1, dtype=torch.float), 2, dim=-1)


def softmax_normalised(logits):
    weights, ids = softmax(logits)
    return weights / weights.sum(-1, keepdim=True), ids


def softmax_after(logits):
    weights, ids = torch.topk(logits, 2, dim=-1)
    return torch.softmax(weights.float(), -1), ids


def sigmoid(logits):
    return torch.topk(logits.float().sigmoid(), 2, dim=-1)


def sigmoid_normalised(logits):
    weights, ids = sigmoid(logits)
    return weights / weights.sum(-1, keepdim=True), ids


def logits_alone(logits):
    return torch.topk(logits, 2, dim=-1)


KNOWN = {
    softmax: "softmax",
    softmax_normalised: "softmax, normalised",
    softmax_after: "softmax, normalised",
    sigmoid: "sigmoid",
    sigmoid_normalised: "sigmoid, normalised",
    logits_alone: "logits",
}


def smallest(logits):
    return torch.topk(torch.softmax(logits.float(), -1), 2, dim=-1, largest=False)


def biased(logits):
    scores = logits.float().sigmoid()
    _, ids = torch.topk(scores + torch.linspace(0, 1, forms.EXPERTS), 2, dim=-1)
    return scores.gather(-1, ids), ids


def tempered(logits):
    return torch.topk(torch.softmax(logits.float() / 2, -1), 2, dim=-1)


def scaled(logits):
    weights, ids = softmax(logits)
    return weights * 1.5, ids


def softmax_over_tokens(logits):
    return torch.topk(torch.softmax(logits.float(), 0), 2, dim=-1)


def used_twice(logits):
    weights, ids = softmax(logits)
    return weights / weights.sum(-1, keepdim=True) + 0 * weights.amax(-1, keepdim=True), ids


UNKNOWN = (smallest, biased, scaled)


def run(route):
    torch.manual_seed(5)
    model = Model(route).float().eval()
    x = forms.tokens(torch.float32)
    with torch.no_grad():
        reference = copy.deepcopy(model).double()(x.double())
    graphs = []
    found, report = capture(model, x, graphs=graphs)
    assert relative_error(found, reference) < 1e-6
    assert report.counts()["moe_experts"] == 1
    assert not report.refused
    return report, [str(node.target) for node in graphs[0].graph.nodes]


@pytest.mark.parametrize("route", KNOWN, ids=lambda route: route.__name__)
def test_a_known_router_is_one_op(route):
    report, targets = run(route)
    (site,) = (site for site in report.matched if site.op == "moe_route")
    assert site.detail == f"E={forms.EXPERTS} K=2 {KNOWN[route]}"
    assert "inductor_moe.moe_route.default" in targets
    assert "aten.topk.default" not in targets


@pytest.mark.parametrize("route", UNKNOWN, ids=lambda route: route.__name__)
def test_an_unknown_router_is_left(route):
    report, targets = run(route)
    assert "moe_route" not in report.counts()
    assert "aten.topk.default" in targets


@pytest.mark.parametrize(
    "route", (tempered, used_twice, softmax_over_tokens), ids=lambda route: route.__name__
)
def test_a_formula_around_a_known_router_keeps_its_value(route):
    run(route)


def test_a_top_k_without_experts_is_left():
    _, report = capture(lambda x: torch.topk(torch.softmax(x, -1), 3, dim=-1), torch.randn(4, 9))
    assert report.sites == ()
