"""Every layout, activation and dtype of hand-written experts is rewritten and stays exact."""

from __future__ import annotations

import copy

import forms
import pytest
import torch

from inductor_moe.testing import capture, fused_layers, relative_error


def check(model, x, *, detail="", halves=False, dynamic=None):
    exact = copy.deepcopy(model).double()
    exact.experts.form = "batched"
    with torch.no_grad():
        reference, eager = exact(x.double()), model(x)
    graphs = []
    fused, report = capture(model, x, dynamic=dynamic, graphs=graphs)
    assert fused_layers(report) == {"moe_experts": 1}, str(report)
    assert not report.refused, str(report)
    site = report.matched[0]
    assert detail in site.detail
    assert site.module == "experts"
    called = {str(node.target).split(".")[1] for node in graphs[0].graph.nodes
              if "inductor_moe" in str(node.target)}  # fmt: skip
    assert called - {"moe_route", "moe_router"} == (
        {"moe_up", "moe_down_combine"} if halves else {"moe_experts"}
    )
    targets = {str(node.target) for node in graphs[0].graph.nodes}
    assert not any("_grouped_mm" in target or "bmm" in target for target in targets)
    eager_error = relative_error(eager, reference)
    assert relative_error(fused, reference) <= 2 * eager_error + 1e-7


@pytest.mark.parametrize("name", forms.GATED)
@pytest.mark.parametrize("gate", ["chunked", "interleaved"])
def test_gated_activation(gate, name):
    model = forms.routed(torch.bfloat16, form="grouped", gate=gate, function=forms.GATED[name])
    check(model, forms.tokens(), detail=f"{name.split()[0]}, gate {gate}")


@pytest.mark.parametrize("name", forms.UNGATED)
@pytest.mark.parametrize("form", ["grouped", "batched"])
def test_ungated_activation(form, name):
    model = forms.routed(form=form, gate="none", function=forms.UNGATED[name])
    check(model, forms.tokens(), detail=f"{name}, gate none")


@pytest.mark.parametrize("bias", [False, True], ids=["no-bias", "bias"])
@pytest.mark.parametrize("transposed", [False, True], ids=["out-in", "in-out"])
@pytest.mark.parametrize("on_input", [False, True], ids=["on-output", "on-input"])
@pytest.mark.parametrize("form", ["grouped", "batched"])
def test_layout(form, on_input, transposed, bias):
    model = forms.routed(form=form, transposed=transposed, bias=bias, weights_on_input=on_input)
    detail = "weights on the input" if on_input else "biases" if bias else ""
    check(model, forms.tokens(), detail=detail)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("count", [1, 5, 33])
@pytest.mark.parametrize("dynamic", [None, True], ids=["static", "dynamic"])
def test_dtype_and_length(dtype, count, dynamic):
    model = forms.routed(dtype, form="batched")
    check(model, forms.tokens(dtype, count), dynamic=dynamic)


@pytest.mark.parametrize("count", [1, 33])
@pytest.mark.parametrize("dynamic", [None, True], ids=["static", "dynamic"])
def test_grouped_length(count, dynamic):
    check(forms.routed(mask_sentinels=True), forms.tokens(count=count), dynamic=dynamic)


LIMIT = torch.tensor(0.7)


@pytest.mark.parametrize(
    "function",
    [
        lambda g, u: torch.tanh(g) * u,
        lambda g, u: g * torch.nn.functional.silu(u),
        lambda g, u: torch.nn.functional.silu(g) * u * 1.5,
        lambda g, u: torch.nn.functional.silu(g) * u + g,
        lambda g, u: torch.nn.functional.softplus(g) * u,
        lambda g, u: torch.clamp(g, torch.full([], -0.5), torch.full([], 0.5)) * u,
        # How a float that Dynamo takes for a number unknown reaches the graph from 2.15 on.
        lambda g, u: torch.clamp_min(g.clamp_max(LIMIT), -LIMIT) * u,
    ],
    ids=["tanh", "swapped-halves", "scaled", "sum", "softplus", "clamp", "unknown-limit"],
)
@pytest.mark.parametrize("form", ["grouped", "batched"])
def test_an_unnamed_function_keeps_its_nodes(form, function):
    model = forms.routed(form=form, function=function)
    check(model, forms.tokens(), detail="has no name", halves=True)


@pytest.mark.parametrize("form", ["grouped", "batched"])
def test_one_constant_changed_is_no_longer_named(form):
    def function(gate, up):
        return (0.5 * gate * (1 + torch.tanh(0.7978845608 * (gate + 0.0447 * gate**3)))) * up

    model = forms.routed(form=form, function=function)
    check(model, forms.tokens(), detail="has no name", halves=True)


def test_sentinels_are_skipped():
    experts = forms.Experts(mask_sentinels=True).to(torch.bfloat16)
    x = forms.tokens()
    ids = torch.randint(0, forms.EXPERTS, (forms.TOKENS, 2))
    ids[::3, 1] = forms.EXPERTS
    weights = torch.rand(forms.TOKENS, 2).to(torch.bfloat16)
    weights[::3, 1] = 0
    fused, report = capture(experts, x, ids, weights)
    assert fused_layers(report) == {"moe_experts": 1}, str(report)
    exact = copy.deepcopy(experts).double()
    exact.form = "batched"
    with torch.no_grad():
        reference = exact(x.double(), ids.clamp_max(forms.EXPERTS - 1), weights.double())
    assert relative_error(fused, reference) < 2**-7


class OneRank(torch.nn.Module):
    """The experts of one rank: pairs of others are clamped to the last one, at a weight of 0."""

    def __init__(self, last=forms.EXPERTS - 1, fill=0.0, **knobs):
        super().__init__()
        self.experts = forms.Experts(form="batched", **knobs).float()
        self.last, self.fill = last, fill

    def forward(self, x, ids, weights, owned):
        weights = weights.masked_fill(~owned, self.fill)
        ids = torch.where(owned, ids, forms.EXPERTS)
        return self.experts(x, ids.clamp(0, self.last), weights)


def owned_pairs():
    torch.manual_seed(5)
    ids = torch.randint(0, forms.EXPERTS - 1, (forms.TOKENS, 2))
    owned = torch.rand(forms.TOKENS, 2) < 0.5
    return forms.tokens(torch.float32), ids, torch.rand(forms.TOKENS, 2), owned


def test_pairs_masked_to_a_weight_of_zero_are_skipped():
    model, (x, ids, weights, owned) = OneRank(), owned_pairs()
    with torch.no_grad():
        exact = copy.deepcopy(model).double()(x.double(), ids, weights.double(), owned)
        # Nothing but a skipped pair reads the last expert, whose weights then do not matter.
        model.experts.up[-1] = model.experts.down[-1] = float("nan")
    fused, report = capture(model, x, ids, weights, owned)
    assert fused_layers(report) == {"moe_experts": 1}, str(report)
    assert relative_error(fused, exact) < 1e-6


@pytest.mark.parametrize(
    "knobs",
    [
        {"fill": 0.25},
        {"last": forms.EXPERTS - 2},
        {"weights_on_input": True, "bias": True},
    ],
    ids=["another-weight", "another-clamp", "weights-on-input"],
)
def test_pairs_masked_otherwise_are_computed(knobs):
    model, arguments = OneRank(**knobs), owned_pairs()
    with torch.no_grad():
        x, ids, weights, owned = arguments
        exact = copy.deepcopy(model).double()(x.double(), ids, weights.double(), owned)
    fused, report = capture(model, *arguments)
    assert fused_layers(report) == {"moe_experts": 1}, str(report)
    assert relative_error(fused, exact) < 1e-6


def test_negative_ids_of_a_gather_count_from_the_end():
    experts = forms.Experts(form="batched").float()
    x, weights = forms.tokens(torch.float32), torch.rand(forms.TOKENS, 2)
    ids = torch.randint(-forms.EXPERTS, forms.EXPERTS, (forms.TOKENS, 2))
    with torch.no_grad():
        reference = copy.deepcopy(experts).double()(x.double(), ids, weights.double())
    fused, report = capture(experts, x, ids, weights)
    assert fused_layers(report) == {"moe_experts": 1}, str(report)
    assert relative_error(fused, reference) < 1e-6


def test_gate_and_up_as_two_projections():
    class Apart(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.w1 = torch.nn.Parameter(torch.randn(6, 24, 32) / 6)
            self.w3 = torch.nn.Parameter(torch.randn(6, 24, 32) / 6)
            self.w2 = torch.nn.Parameter(torch.randn(6, 32, 24) / 5)

        def forward(self, x, ids, weights):
            flat = ids.reshape(-1)
            rows = x.repeat_interleave(ids.shape[1], dim=0)[..., None]
            h = torch.nn.functional.silu(torch.bmm(self.w1[flat], rows)) * torch.bmm(
                self.w3[flat], rows
            )
            out = torch.bmm(self.w2[flat], h).squeeze(-1) * weights.reshape(-1, 1)
            return out.view(x.shape[0], ids.shape[1], -1).sum(1)

    model, x = Apart(), forms.tokens(torch.float32)
    ids = torch.randint(0, 6, (forms.TOKENS, 3))
    weights = torch.rand(forms.TOKENS, 3)
    fused, report = capture(model, x, ids, weights)
    assert fused_layers(report) == {"moe_experts": 1}, str(report)
    with torch.no_grad():
        reference = copy.deepcopy(model).double()(x.double(), ids, weights.double())
    assert relative_error(fused, reference) < 1e-6


class FlattenedTwice(forms.Experts):
    """The ids are flattened anew for each gather, and the products indexed out of their column."""

    def __init__(self, flatten_down=lambda ids: ids.flatten(), column=0, **knobs):
        super().__init__(form="batched", bias=True, **knobs)
        self.flatten_down, self.column = flatten_down, column

    def product(self, weight, rows):
        twice = torch.cat([rows[..., None]] * (1 + self.column), -1)
        return torch.bmm(weight, twice)[:, :, self.column]

    def batched(self, x, ids, weights):
        rows = x.repeat_interleave(ids.shape[1], dim=0)
        up = self.product(self.up[ids.flatten()], rows) + self.up_bias[ids.flatten()]
        down_ids = self.flatten_down(ids)
        out = self.product(self.down[down_ids], self.between(up)) + self.down_bias[down_ids]
        return self.combine(out * weights.flatten()[:, None], ids.shape[0])


@pytest.mark.parametrize("count", [1, 12])
def test_ids_flattened_for_each_gather(count):
    model = forms.routed(torch.float32)
    model.experts = FlattenedTwice().eval()
    check(model, forms.tokens(torch.float32, count), detail="biases")


@pytest.mark.parametrize(
    "knobs",
    [
        {"flatten_down": lambda ids: ids.t().flatten()},
        {"flatten_down": lambda ids: ids.flip(-1).flatten()},
        {"column": 1},
    ],
    ids=["columns first", "other slots", "a second column"],
)
def test_other_flattened_ids_are_left(knobs):
    model = forms.routed(torch.float32)
    model.experts = FlattenedTwice(**knobs).eval()
    x = forms.tokens(torch.float32)
    found, report = capture(model, x)
    assert fused_layers(report) == {}
    with torch.no_grad():
        assert relative_error(found, model(x)) < 1e-6
