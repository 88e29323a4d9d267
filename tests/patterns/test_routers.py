"""Routers of a known form become one op; others stay, and the experts are fused all the same."""

from __future__ import annotations

import copy
import operator

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


BIAS = torch.linspace(-0.3, 0.4, forms.EXPERTS).flip(0)


def corrected(logits, bias=BIAS):
    """Chosen by biased scores, weighed by the scores themselves."""
    scores = logits.float().sigmoid()
    _, ids = torch.topk(scores + bias, 2, dim=-1, sorted=False)
    return scores.gather(-1, ids), ids


def corrected_and_scaled(logits):
    weights, ids = corrected(logits)
    return weights / (weights.sum(-1, keepdim=True) + 1e-20) * 2.5, ids


def corrected_softmax(logits):
    scores = torch.softmax(logits.float(), 1)
    ids = torch.topk(scores + BIAS[None].squeeze(), 2, dim=-1).indices
    weights = torch.gather(scores, dim=-1, index=ids)
    return weights / torch.clamp(weights.sum(-1, keepdim=True), min=1e-12), ids


def scaled(logits):
    weights, ids = softmax(logits)
    return weights * 1.5, ids


def gathered(logits):
    scores = logits.float().sigmoid()
    ids = torch.topk(scores, 2, dim=-1).indices
    return scores.gather(1, ids), ids


def grouped(
    scoring="sigmoid",
    bias=True,
    top=2,
    kept=2,
    fill=float("-inf"),
    groups=3,
    choose=2,
    quality=None,
):
    """DeepSeek's choice among the best groups: V3 by default, V2 with softmax, top=1, fill=0."""
    size = forms.EXPERTS // groups

    def route(logits):
        scores = logits.float().sigmoid() if scoring == "sigmoid" else logits.float().softmax(-1)
        choice = scores + BIAS if bias else scores
        tiles = (quality(scores, choice) if quality else choice).view(-1, groups, size)
        best = tiles.topk(top, dim=-1)[0].sum(-1) if top > 1 else tiles.max(dim=-1).values
        group_ids = torch.topk(best, kept, dim=-1, sorted=False)[1]
        mask = torch.zeros_like(best).scatter_(1, group_ids, 1)
        mask = mask.unsqueeze(-1).expand(-1, groups, size).reshape(-1, forms.EXPERTS)
        choice = choice.masked_fill(~mask.bool(), fill)
        if not bias:
            weights, ids = torch.topk(choice, choose, dim=-1, sorted=False)
            return weights * 16, ids
        ids = torch.topk(choice, choose, dim=-1, sorted=False)[1]
        weights = scores.gather(1, ids)
        return weights / (weights.sum(-1, keepdim=True) + 1e-20) * 2.5, ids

    route.__name__ = f"grouped {scoring} {bias} {top} {kept} {fill} {groups} {choose}"
    return route


KNOWN = {
    corrected: "sigmoid, bias",
    corrected_and_scaled: "sigmoid, bias, normalised, x 2.5",
    corrected_softmax: "softmax, bias, normalised",
    scaled: "softmax, x 1.5",
    gathered: "sigmoid",
    grouped(): "sigmoid, bias, 2 of 3 groups, normalised, x 2.5",
    grouped(kept=1): "sigmoid, bias, 1 of 3 groups, normalised, x 2.5",
    grouped(kept=3): "sigmoid, bias, normalised, x 2.5",
    grouped(groups=1, kept=1): "sigmoid, bias, normalised, x 2.5",
    grouped("softmax", False, 1, fill=0.0): "softmax, 2 of 3 groups, x 16",
    grouped("softmax", False, 1): "softmax, 2 of 3 groups, x 16",
    softmax: "softmax",
    softmax_normalised: "softmax, normalised",
    softmax_after: "softmax, normalised",
    sigmoid: "sigmoid",
    sigmoid_normalised: "sigmoid, normalised",
    logits_alone: "logits",
}


def smallest(logits):
    return torch.topk(torch.softmax(logits.float(), -1), 2, dim=-1, largest=False)


def biased_weights(logits):
    return torch.topk(logits.float().sigmoid() + BIAS.abs(), 2, dim=-1)


def absolute_logits(logits):
    weights, ids = torch.topk(logits, 2, dim=-1)
    return weights.abs() / weights.abs().sum(-1, keepdim=True), ids


def chosen_by_others(logits):
    scores = logits.float().sigmoid()
    ids = torch.topk(scores.square() + BIAS, 2, dim=-1).indices
    return scores.gather(1, ids), ids


def multiplied_bias(logits):
    scores = logits.float().sigmoid()
    ids = torch.topk(scores * (BIAS + 1), 2, dim=-1).indices
    return scores.gather(1, ids), ids


def softmax_of_biased_logits(logits):
    ids = torch.topk(logits.float() + BIAS, 2, dim=-1).indices
    return logits.float().gather(1, ids).softmax(-1), ids


def gathered_by_other_ids(logits):
    scores = logits.float().sigmoid()
    ids = torch.topk(scores + BIAS, 2, dim=-1).indices
    return scores.gather(1, ids.flip(0)), ids


def power(logits):
    weights, ids = sigmoid(logits)
    return weights / weights.square().sum(-1, keepdim=True), ids


def tempered(logits):
    return torch.topk(torch.softmax(logits.float() / 2, -1), 2, dim=-1)


def softmax_over_tokens(logits):
    return torch.topk(torch.softmax(logits.float(), 0), 2, dim=-1)


def used_twice(logits):
    weights, ids = softmax(logits)
    return weights / weights.sum(-1, keepdim=True) + 0 * weights.amax(-1, keepdim=True), ids


UNKNOWN = (
    smallest,
    absolute_logits,
    chosen_by_others,
    multiplied_bias,
    softmax_of_biased_logits,
    gathered_by_other_ids,
    power,
    grouped(fill=0.0),
    grouped(fill=-1.0),
    grouped(kept=1, choose=3),
    grouped(quality=lambda scores, choice: scores),
    grouped(quality=lambda scores, choice: choice.flip(0)),
)


MANY = 20  # tokens: a router of fewer is one op with its linear


def run(route):
    torch.manual_seed(5)
    model = Model(route).float().eval()
    x = forms.tokens(torch.float32, MANY)
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


@pytest.mark.parametrize("route", KNOWN, ids=lambda route: route.__name__)
def test_experts_read_the_weights_as_the_router_writes_them(route):
    """A cast between two ops would be a launch of its own."""
    graphs = []
    with torch.no_grad():
        capture(Model(route).bfloat16().eval(), forms.tokens(torch.bfloat16, MANY), graphs=graphs)
    (experts,) = (
        n for n in graphs[0].graph.nodes if str(n.target) == "inductor_moe.moe_experts.default"
    )
    weights = experts.args[4]
    assert weights.target is operator.getitem
    assert str(weights.args[0].target) == "inductor_moe.moe_route.default"


@pytest.mark.parametrize("route", UNKNOWN, ids=lambda route: route.__name__)
def test_an_unknown_router_is_left(route):
    report, targets = run(route)
    assert "moe_route" not in report.counts()
    assert "aten.topk.default" in targets


@pytest.mark.parametrize(
    "route",
    (tempered, used_twice, softmax_over_tokens, biased_weights),
    ids=lambda route: route.__name__,
)
def test_a_formula_around_a_known_router_keeps_its_value(route):
    run(route)


def test_a_top_k_without_experts_is_left():
    _, report = capture(lambda x: torch.topk(torch.softmax(x, -1), 3, dim=-1), torch.randn(4, 9))
    assert report.sites == ()


def choice_of(route, logits):
    """The expert numbers before and after the rewrites, and whether the router was rewritten."""
    experts = forms.Experts(form="batched").float()
    x = torch.randn(logits.shape[0], forms.HIDDEN)
    numbers = []

    def function(x, logits):
        weights, ids = route(logits)
        return experts(x, ids, weights.float()), ids

    with torch.no_grad():
        expected = function(x, logits)
        alone, _ = capture(function, x, logits, options={"inductor_moe.disable": "moe"})
        if not torch.equal(alone[1].sort(-1).values, expected[1].sort(-1).values):
            pytest.skip("Inductor itself drops the rounding, as torch 2.11 does")
        found, report = capture(function, x, logits, graphs=numbers)
    assert relative_error(found[0], expected[0]) < 1e-6
    return found[1].sort(-1).values, expected[1].sort(-1).values, report


def rounded_before(logits):
    return torch.topk(logits.bfloat16().float().softmax(-1), 2, dim=-1)


def rounded_scores(logits):
    return torch.topk(logits.softmax(-1).bfloat16(), 2, dim=-1)


def rounded_and_widened(logits):
    return torch.topk(logits.softmax(-1).bfloat16().float(), 2, dim=-1)


def rounded_choice(logits):
    scores = logits.sigmoid()
    ids = torch.topk((scores + BIAS).bfloat16(), 2, dim=-1).indices
    return scores.gather(1, ids), ids


def rounded_under_a_bias(logits):
    scores = logits.sigmoid()
    ids = torch.topk(scores.bfloat16() + BIAS, 2, dim=-1).indices
    return scores.gather(1, ids), ids


def rounded_groups(logits):
    scores = logits.sigmoid()
    best = scores.bfloat16().view(-1, 3, forms.EXPERTS // 3).topk(2, dim=-1)[0].sum(-1)
    mask = torch.zeros_like(best).scatter(1, best.topk(1, dim=-1)[1], 1)
    mask = mask[..., None].expand(-1, 3, forms.EXPERTS // 3).reshape(-1, forms.EXPERTS)
    return torch.topk(scores.masked_fill(~mask.bool(), 0.0), 2, dim=-1)


@pytest.mark.parametrize(
    "route",
    (
        rounded_before,
        rounded_scores,
        rounded_and_widened,
        rounded_choice,
        rounded_under_a_bias,
        rounded_groups,
    ),
    ids=lambda route: route.__name__,
)
def test_rounding_that_decides_a_close_choice_is_kept(route):
    """Scores that differ by less than bf16 tells: the model's own choice must stay."""
    torch.manual_seed(3)
    logits = 1 + 1e-4 * torch.randn(64, forms.EXPERTS)
    exact = torch.topk(logits, 2, dim=-1).indices.sort(-1).values
    found, expected, report = choice_of(route, logits)
    assert not torch.equal(expected, exact)  # the rounding does decide
    assert torch.equal(found, expected)
    matched = [site.detail for site in report.matched if site.op == "moe_route"]
    assert all("logits" in text or route is rounded_before for text in matched)


def test_a_router_in_fp64_is_left():
    """Its scores could tell apart what the op's fp32 does not."""
    logits = 1 + 1e-12 * torch.randn(64, forms.EXPERTS, dtype=torch.float64)
    found, expected, report = choice_of(lambda x: torch.topk(x.softmax(-1), 2, dim=-1), logits)
    assert torch.equal(found, expected)
    assert "moe_route" not in report.counts()


@pytest.mark.parametrize(
    "clamp, kept",
    [
        (lambda ids: ids.clamp(0, 7), False),
        (lambda ids: ids.clamp(min=0).clamp(max=9), False),
        (lambda ids: ids.clamp(1, 7), True),
        (lambda ids: ids.clamp(max=6), True),
        (lambda ids: ids.clamp(min=0, max=6), True),
    ],
)
def test_clamps_that_change_nothing_are_dropped(clamp, kept):
    torch.manual_seed(3)
    w_up, w_down = torch.randn(8, 32, 16), torch.randn(8, 16, 16)

    def block(x, logits):
        weights, ids = torch.topk(torch.softmax(logits, -1), 2, -1)
        rows = clamp(ids.reshape(-1))
        x = x.repeat_interleave(2, 0)
        up = torch.bmm(w_up[rows], x.unsqueeze(-1)).squeeze(-1)
        gate, up = up.chunk(2, -1)
        out = torch.bmm(w_down[rows], (nn.functional.silu(gate) * up).unsqueeze(-1)).squeeze(-1)
        return (out * weights.reshape(-1, 1)).view(-1, 2, 16).sum(1)

    x, logits = torch.randn(5, 16), torch.randn(5, 8) * 3
    logits[0, 0] = logits[1, 7] = 20.0
    graphs = []
    with torch.no_grad():
        found, report = capture(block, x, logits, graphs=graphs)
        expected = block(x, logits)
    assert report.counts() == {"moe_experts": 1, "moe_route": 1}
    clamps = [node for node in graphs[0].graph.nodes if "clamp" in str(node.target)]
    assert bool(clamps) == kept
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
