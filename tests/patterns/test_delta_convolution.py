"""Causal convolutions of a prompt as sums of shifted rows: which, and that they stay exact."""

from __future__ import annotations

import copy

import pytest
import torch
from rewriting import exact
from torch._inductor.decomposition import select_decomp_table
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F

import inductor_moe
from inductor_moe.ops.delta_rule import delta_rule
from inductor_moe.patterns.delta_rule import convolution
from inductor_moe.patterns.delta_rule.convolution import spread_convolutions
from inductor_moe.patterns.walk import call
from inductor_moe.testing import capture, graph_backend, relative_error

CHANNELS = 12


def inputs(tokens=9, width=4, dtype=torch.float32, bias=True, batch=2):
    torch.manual_seed(tokens + width)
    rows = torch.randn(batch, tokens, CHANNELS, dtype=dtype)
    weight = torch.randn(CHANNELS, 1, width, dtype=dtype)
    return (rows, weight, torch.randn(CHANNELS, dtype=dtype)) if bias else (rows, weight)


def convolved(rows, weight, bias, after, **changed):
    """What transformers' layers do between the projection and the rule."""
    setting = {"padding": weight.shape[-1] - 1, "groups": CHANNELS} | changed
    out = F.conv1d(rows.transpose(1, 2), weight, bias, **setting)[:, :, : rows.shape[1]]
    return after(out).transpose(1, 2)


def mixed(rows, weight, bias=None):
    return convolved(rows, weight, bias, F.silu)


def joined(rows, weight, bias, kept):
    """What transformers' layers do to a prompt that goes on from a cache: its outputs alone."""
    inputs = torch.cat([kept, rows.transpose(1, 2)], -1)
    out = F.conv1d(inputs, weight, bias, padding=weight.shape[-1] - 1, groups=CHANNELS)
    out = F.silu(out[:, :, : inputs.shape[-1]])
    return out[:, :, -rows.shape[1] :].transpose(1, 2)


def convolutions(function, arguments):
    """The result after the rewrite, and how many convolutions are left in the graph."""
    with torch.no_grad():
        traced = make_fx(
            lambda *given: function(*given),
            decomposition_table=select_decomp_table(),
            tracing_mode="fake",
        )(*arguments)
    spread_convolutions(traced.graph)
    traced.graph.lint()
    traced.recompile()
    return traced(*copy.deepcopy(arguments)), left_in(traced.graph)


def left_in(graph):
    return sum(node.target is torch.ops.aten.convolution.default for node in graph.nodes)


@pytest.mark.parametrize("tokens", [2, 3, 9, 70])
@pytest.mark.parametrize("width", [2, 4])
@pytest.mark.parametrize("bias", [False, True], ids=["no-bias", "bias"])
def test_a_causal_convolution_is_a_sum_of_shifted_rows(tokens, width, bias):
    arguments = inputs(tokens, width, bias=bias)
    found, left = convolutions(mixed, arguments)
    assert not left
    expected = exact(mixed, arguments)
    assert found.shape == expected.shape and found.is_contiguous()
    assert relative_error(found, expected) < 3e-7


@pytest.mark.parametrize("tokens", [1, 2, 9, 70])
@pytest.mark.parametrize("kept", [1, 3, 4, 7])
def test_a_prompt_goes_on_from_what_a_cache_keeps(tokens, kept):
    arguments = (*inputs(tokens), torch.randn(2, CHANNELS, kept))
    found, left = convolutions(joined, arguments)
    assert not left
    expected = exact(joined, arguments)
    assert found.shape == expected.shape == (2, tokens, CHANNELS)
    assert relative_error(found, expected) < 3e-7


def test_every_cut_is_made():
    def several(rows, weight, bias):
        out = convolved(rows, weight, bias, lambda x: F.silu(x)[:, :, 1:].sigmoid()[..., 2:-1])
        return out + 1

    arguments = inputs()
    found, left = convolutions(several, arguments)
    assert not left
    expected = exact(several, arguments)
    assert found.shape == expected.shape == (2, 5, CHANNELS)
    assert relative_error(found, expected) < 3e-7


def test_what_a_cache_keeps_is_read_before_it_is_written():
    def step(rows, weight, bias, kept):
        kept = kept.clone()
        inputs = torch.cat([kept, rows.transpose(1, 2)], -1)
        kept.copy_(inputs[..., -kept.shape[-1] :])
        out = F.conv1d(inputs, weight, bias, padding=weight.shape[-1] - 1, groups=CHANNELS)
        out = F.silu(out[:, :, : inputs.shape[-1]])[:, :, -rows.shape[1] :]
        return torch.cat([out.transpose(1, 2), kept.transpose(1, 2)], 1)

    arguments = (*inputs(), torch.randn(2, CHANNELS, 4))
    found, left = convolutions(step, arguments)
    assert not left
    assert relative_error(found, exact(step, arguments)) < 3e-7


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_sums_in_fp32(dtype):
    arguments = inputs(70, dtype=dtype)
    found, left = convolutions(mixed, arguments)
    assert not left and found.dtype == dtype
    expected = exact(mixed, arguments)
    assert relative_error(found, expected) <= 1.05 * relative_error(mixed(*arguments), expected)


class Layer(torch.nn.Module):
    """A convolution and what follows it, with weights of its own, whose sizes are static."""

    def __init__(self, weight, bias, rule=True):
        super().__init__()
        self.weight, self.bias = torch.nn.Parameter(weight), torch.nn.Parameter(bias)
        self.rule = rule

    def forward(self, rows):
        out = mixed(rows, self.weight, self.bias)
        if not self.rule:
            return out
        q, k, v = (part[:, :, None] for part in out.split(CHANNELS // 3, -1))
        return delta_rule(q, k, v, None, rows[..., :1].sigmoid(), None, 0.5, 1e-6)[0]


def exact_layer(rows, weights):
    with torch.no_grad():
        return Layer(*weights).double()(rows.double())


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("tokens", [2, 70])
def test_before_a_rule_it_is_one_under_the_backend(tokens, dynamic):
    graphs = []
    rows, *weights = inputs(tokens)
    found, report = capture(Layer(*weights), rows, dynamic=dynamic, graphs=graphs)
    assert report.counts() == {"delta_rule": 1}
    assert relative_error(found, exact_layer(rows, weights)) < 1e-6
    assert not any(left_in(graph.graph) for graph in graphs)


def test_one_compile_serves_every_length():
    rows, *weights = inputs(70)
    compiled = torch.compile(Layer(*weights), backend=graph_backend(), dynamic=True)
    with torch.no_grad():
        compiled(rows)
        with torch.compiler.set_stance("fail_on_recompile"):
            for tokens in (2, 3, 9, 200):
                rows, *_ = inputs(tokens)
                assert relative_error(compiled(rows), exact_layer(rows, weights)) < 1e-6


@pytest.mark.parametrize(
    "layer, options",
    [
        ({"rule": False}, {}),
        ({}, {"inductor_moe.disable": "delta_rule.convolution"}),
        ({}, {"inductor_moe.limit": 0}),
    ],
    ids=["no-rule", "disabled", "limit"],
)
def test_otherwise_it_is_left(layer, options):
    graphs = []
    rows, *weights = inputs()
    capture(Layer(*weights, **layer), rows, options=options, graphs=graphs)
    assert [left_in(graph.graph) for graph in graphs] == [1]


def test_bisect_names_a_wrong_one(monkeypatch):
    right = convolution._sum_of_taps

    def wrong(graph, site):
        total = right(graph, site)
        return call(graph, torch.ops.aten.neg.default, total, like=total)

    rows, *weights = inputs()
    layer = Layer(*weights)

    def run(options):
        with torch.no_grad():
            return torch.compile(layer, backend=graph_backend(options), fullgraph=True)(rows)

    assert inductor_moe.bisect(run, tolerance=1e-3) == ()
    monkeypatch.setattr(convolution, "_sum_of_taps", wrong)
    (culprit,) = inductor_moe.bisect(run, tolerance=1e-3)
    assert culprit.rewrite == "delta_rule.convolution" and culprit.distance > 1e-2


OTHERS = {
    "looks ahead": {"padding": 2},
    "every second token": {"stride": 1, "dilation": 2, "padding": 3},
    "mixes channels": {"groups": CHANNELS // 2},
}


@pytest.mark.parametrize("case", OTHERS)
def test_another_convolution_is_left(case):
    rows, weight, bias = inputs()
    if "groups" in OTHERS[case]:
        weight = torch.randn(CHANNELS, 2, weight.shape[-1])
    function = lambda *given: convolved(*given, F.silu, **OTHERS[case])  # noqa: E731
    if OTHERS[case].get("padding") == 2:
        rows = rows[:, :9]
    found, left = convolutions(function, (rows, weight, bias))
    assert left == 1
    torch.testing.assert_close(found, function(rows, weight, bias))


USES = {
    "of one token": (lambda r, w, b: mixed(r[:, :1], w, b)),
    "its tail is read": (
        lambda r, w, b: F.conv1d(r.transpose(1, 2), w, b, padding=3, groups=CHANNELS)[
            :, :, 3:
        ].transpose(1, 2)
    ),
    "a row is read as it lies": (
        lambda r, w, b: convolved(r, w, b, lambda x: x - x.mean(1, True))
    ),
    "columns weigh in": (lambda r, w, b: convolved(r, w, b, lambda x: x + r.mT)),
    "channels lie outermost": (lambda r, w, b: mixed(r.mT.contiguous().mT, w, b)),
    "all that is joined has channels outermost": (
        lambda r, w, b: joined(r.mT.contiguous().mT, w, b, r[:, :4].mT.contiguous())
    ),
    "sequences are joined": (
        lambda r, w, b: (
            F.silu(
                F.conv1d(torch.cat([r.mT, r.mT], 0), w, b, padding=3, groups=CHANNELS)[:, :, :9]
            ).mT
        )
    ),
    "every second output is read": (
        lambda r, w, b: convolved(r, w, b, lambda x: F.silu(x)[:, :, ::2])
    ),
    "channels are cut": (lambda r, w, b: convolved(r, w, b, lambda x: F.silu(x)[:, 2:])),
    "it is not turned back": (
        lambda r, w, b: F.silu(F.conv1d(r.mT, w, b, padding=3, groups=CHANNELS)[:, :, :9])
    ),
}


@pytest.mark.parametrize("case", USES)
def test_a_convolution_used_otherwise_is_left(case):
    arguments = inputs()
    found, left = convolutions(USES[case], arguments)
    assert left == 1
    torch.testing.assert_close(found, USES[case](*arguments))
