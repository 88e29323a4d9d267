"""What the report says a site needs, and what to do about one that was refused."""

from __future__ import annotations

import re
from pathlib import Path

import forms
import pytest
import torch
from torch import fx

import inductor_moe
from inductor_moe import advice, costs, kernels, patterns
from inductor_moe.report import Report, Site

E, K, H, W, T = forms.EXPERTS, forms.TOP_K, forms.HIDDEN, forms.INNER, 2


def arguments(tokens):
    return torch.randn(tokens, H), torch.randint(E, (tokens, K)), torch.rand(tokens, K)


@pytest.mark.parametrize("tokens, reached", [(T, T * K), (40, E)])
def test_costs_of_experts(tokens, reached):
    report = inductor_moe.explain(forms.Experts("batched"), *arguments(tokens), dynamic=False)
    (site,) = report.matched
    assert site.flops == tokens * K * (2 * H * 2 * W + 2 * W * H)
    weights = reached * (2 * W * H + H * W) * 4
    assert site.bytes == weights + 2 * tokens * H * 4 + tokens * K * (8 + 4)
    assert "bmm \N{MULTIPLICATION SIGN}2" in site.before and "sum" in site.before
    assert site.after.startswith(f"moe_experts(x [{tokens}, {H}], w_up [{E}, {2 * W}, {H}]")
    assert "moe_grouped_gemm_kernel" in site.kernels
    assert Report.from_json(report.to_json()) == report


def test_costs_of_packed_experts():
    """Fewer bytes, the same work."""
    plain = inductor_moe.explain(forms.Experts("batched"), *arguments(T), dynamic=False)
    packed = forms.Experts("batched")
    inductor_moe.quantize_(packed, "int4", group_size=16, verbose=False)
    report = inductor_moe.explain(packed, *arguments(T), dynamic=False)
    (site,), (before,) = report.matched, plain.matched
    assert site.after.startswith("moe_experts_quantized(")
    assert site.flops == before.flops and 0 < site.bytes < before.bytes
    assert "quantized_up_decode_kernel" in site.kernels


def test_nodes_that_something_else_needs_are_not_before():
    graph = fx.Graph()
    x = graph.placeholder("x")
    shared = graph.call_function(torch.sin, (x,))
    alone = graph.call_function(torch.cos, (shared,))
    anchor = graph.call_function(torch.exp, (alone,))
    after = graph.call_function(torch.neg, (anchor,))
    graph.output(shared)
    assert set(costs.dead_with(anchor)) == {alone, anchor, after}
    kept = fx.Graph()
    y = kept.call_function(torch.exp, (kept.placeholder("x"),))
    kept.output(y)
    assert costs.dead_with(y) == []


def test_several_layers_are_before_a_merged_one():
    """Their input stays, at which the site was found; a report shows the layers instead."""

    class Layers(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = torch.nn.RMSNorm(16)
            self.first, self.second = (torch.nn.Linear(16, n, bias=False) for n in (8, 24))

        def forward(self, x):
            x = self.norm(x)
            return self.first(x), self.second(x)

    (site,) = inductor_moe.explain(Layers(), torch.randn(1, 16)).matched
    assert site.op == "merged_linear" and site.module == "first"
    assert site.source.endswith("return self.first(x), self.second(x)")
    assert "mm \N{MULTIPLICATION SIGN}2" in site.before and "rsqrt" not in site.before
    assert site.flops == 2 * 16 * (8 + 24) and site.bytes == 4 * (16 + 16 * 32 + 32)


def test_calls_of_one_site_are_counted_together():
    times = "\N{MULTIPLICATION SIGN}"
    earlier = costs.Costs(before=f"view {times}2, topk", after="moe_route(logits [1, 8])")
    later = costs.Costs(before="mm, view, moe_route")
    assert costs.joined_calls(earlier, later) == f"view {times}3, topk, mm"
    assert costs.joined_calls(costs.Costs(), costs.Costs()) == ""


def test_a_failure_to_count_is_no_failure_to_fuse(monkeypatch):
    from inductor_moe import passes

    monkeypatch.setattr(passes, "costs_of", lambda *_: 1 / 0)
    with pytest.warns(inductor_moe.errors.RewriteFailedWarning, match="counting"):
        report = inductor_moe.explain(forms.Experts("batched"), *arguments(T))
    (site,) = report.matched
    assert site.bytes is None and site.after == ""


def test_kernels_that_are_named_exist():
    folder = Path(kernels.__path__[0])
    source = "".join(file.read_text() for file in folder.glob("*.py"))
    named = set(re.findall(r"\w+_kernel\b", " ".join(costs.KERNELS.values())))
    assert len(named) > 8
    for kernel in named:
        assert f"def {kernel}(" in source, kernel
    for op in costs.KERNELS:
        assert hasattr(torch.ops.inductor_moe, op), op


def refusals():
    """The constant words of every refusal in the sources."""
    folder = Path(patterns.__path__[0])
    source = "".join(file.read_text() for file in sorted(folder.rglob("*.py")))
    return re.findall(r"Refusal\(\s*((?:f?\"[^\n]*\"\s*)+)\)", source)


def test_advice_fits_what_the_sources_say():
    found = refusals()
    assert len(found) > 50
    special = [reason for reason in found if advice.on_refusal(reason) != advice.GENERAL]
    assert len(special) > len(found) / 2
    for words, text in advice._ADVICE[1:]:
        assert any(advice.on_refusal(reason) == text for reason in found), words


def test_a_refused_site_has_advice():
    leaky = forms.Experts("batched", extra=lambda up, h, out: up)
    (site,) = inductor_moe.explain(leaky, *arguments(T)).refused
    assert "is used by" in site.reason and "needed outside" in site.advice


def test_a_break_in_a_loop_is_reported():
    def loop(x, ids, weights):
        y = torch.zeros_like(x)
        for expert in range(E):
            token, slot = torch.where(ids == expert)
            y.index_add_(0, token, x[token] * weights[token, slot, None])
        return y

    report = inductor_moe.explain(loop, *arguments(T))
    assert not report.sites
    (reason,) = report.breaks
    assert "nonzero" in reason and "sort the pairs" in advice.on_break(reason)
    assert inductor_moe.explain(torch.sin, torch.ones(2)).breaks == ()


def select(x, ids):
    token, _ = torch.where(ids == 0)
    return x[token] * 2


def count(x, ids):
    return x * float((ids == 0).sum().item())


def skip(x, ids):
    for expert in range(E):
        if (ids == expert).any():
            x = x + 1
    return x


@pytest.mark.parametrize(
    ("function", "setting"),
    [
        (select, "capture_dynamic_output_shape_ops"),
        (count, "capture_scalar_outputs"),
    ],
)
def test_the_setting_named_for_a_break_removes_it(function, setting):
    x, ids, _ = arguments(T)
    (reason,) = inductor_moe.explain(function, x, ids).breaks
    assert f"torch._dynamo.config.{setting} = True" in advice.on_break(reason)
    with torch._dynamo.config.patch(setting, True):
        assert inductor_moe.explain(function, x, ids).breaks == ()


def test_no_setting_is_named_for_a_branch():
    x, ids, _ = arguments(T)
    (reason,) = inductor_moe.explain(skip, x, ids).breaks
    assert "leave the condition out" in advice.on_break(reason)
    assert "capture_" not in advice.on_break(reason)


def test_advice_is_in_the_text_of_a_report():
    report = Report((Site("moe_experts", "moe", reason="h, inside the expert block, is used"),))
    assert report.sites[0].advice in str(report)
