"""W4A8: the ops against fp64 that rounds activations itself, its bound, and the option."""

from __future__ import annotations

import copy

import forms
import pytest
import torch
from torch import Tensor, nn

import inductor_moe
from inductor_moe.config import parse
from inductor_moe.errors import UnknownOptionError
from inductor_moe.ops import quant
from inductor_moe.passes import FusionPass
from inductor_moe.quant.fit import Packed, Scheme, quantize_weight
from inductor_moe.reference.moe import gated_activation
from inductor_moe.reference.quant import dequantize_reference, round_activations
from inductor_moe.testing import capture, relative_error

LIMIT = 3e-3
OPTION = {"inductor_moe.int8_activations": True}
INPUTS = {
    "normal": lambda x: x,
    "large mean": lambda x: x + 100.0,
    "one huge channel": lambda x: x * torch.where(torch.arange(x.shape[1]) == 37, 1e4, 1.0),
    "a row of zeros": lambda x: x * (torch.arange(len(x)) != 3)[:, None],
}


def rounded(x: Tensor, group: int) -> Tensor:
    """x, in fp64, in steps of a 127th of the largest of its row and group."""
    out = torch.empty_like(x)
    for start in range(0, x.shape[1], group):
        part = x[:, start : start + group]
        largest = part.abs().max(1, keepdim=True).values
        codes = (part * 127 / largest.clamp_min(1e-300)).round()
        out[:, start : start + group] = codes * (largest / 127)
    return out


def drawn(shape: tuple[int, ...], scheme: Scheme, dtype: torch.dtype = torch.bfloat16) -> Packed:
    return quantize_weight((torch.randn(shape) / shape[-1] ** 0.5).to(dtype), scheme)


def exact(weight: Packed, group: int, inputs: int) -> Tensor:
    zeros = None if weight.zeros is None else weight.zeros.double()
    return dequantize_reference(weight.packed, weight.scales.double(), zeros, group, inputs)


@pytest.mark.parametrize("kind", INPUTS)
@pytest.mark.parametrize("group", [32, 64, 128])
def test_activations_move_by_half_a_step_at_most(kind, group):
    x = INPUTS[kind](torch.randn(9, 200)).double()
    found = round_activations(x, group)
    for start in range(0, 200, group):
        part = slice(start, start + group)
        step = x[:, part].abs().amax(1, keepdim=True) / 127
        assert ((found - x)[:, part].abs() <= step / 2 * (1 + 1e-12)).all()
    torch.testing.assert_close(found, rounded(x, group), rtol=1e-12, atol=0)


def test_a_nan_reaches_its_group_and_no_other():
    x = torch.ones(2, 128)
    x[0, 70] = float("nan")
    found = round_activations(x, 64)
    assert found[0, 64:].isnan().all()
    assert torch.equal(found[0, :64], x[0, :64]) and torch.equal(found[1], x[1])


@pytest.mark.parametrize("kind", INPUTS)
@pytest.mark.parametrize("group, symmetric", [(32, True), (64, False), (128, True)])
def test_linear(kind, group, symmetric):
    scheme = Scheme(4, group, symmetric, "rtn")
    weight, bias = drawn((48, 200), scheme), torch.randn(48).bfloat16()
    x = INPUTS[kind](torch.randn(70, 200)).bfloat16()
    found = quant.quantized_linear(
        x, weight.packed, weight.scales, weight.zeros, bias, group, int8_activations=True
    )
    matrix, wide = exact(weight, group, 200), x.double()
    reference = rounded(wide, group) @ matrix.T + bias.double()
    assert relative_error(found, reference) <= LIMIT
    # Half a step of each input, times the weights of its group, and the rounding of the output.
    steps = nn.functional.pad(wide, (0, -200 % group)).unflatten(-1, (-1, group))
    steps = steps.abs().amax(-1) / 254
    spread = nn.functional.pad(matrix.abs(), (0, -200 % group)).unflatten(-1, (-1, group)).sum(-1)
    weight_only = wide @ matrix.T + bias.double()
    bound = steps @ spread.T
    assert ((rounded(wide, group) @ matrix.T + bias.double() - weight_only).abs() <= bound).all()
    rounding = LIMIT * weight_only.norm()
    assert (found.double() - weight_only).norm() <= bound.norm() + rounding


@pytest.mark.parametrize("on_input", [False, True])
@pytest.mark.parametrize("traced", [False, True], ids=["op", "aten"])
def test_experts(on_input, traced):
    scheme = Scheme(4, 32, True, "rtn")
    # In fp32: what h loses to bf16 between the GEMMs would move some of its codes by a whole step.
    up, down = (drawn(shape, scheme, torch.float32) for shape in ((5, 128, 96), (5, 96, 64)))
    x, ids, weights = torch.randn(70, 96), torch.randint(0, 5, (70, 2)), torch.rand(70, 2)
    run = quant.moe_experts_quantized_plain if traced else quant.moe_experts_quantized
    found = run(
        x, up.packed, up.scales, None, 32, down.packed, down.scales, None, 32, 64, ids, weights,
        None, None, "silu", "chunked", weights_on_input=on_input, int8_activations=True,
    )  # fmt: skip
    reference = torch.zeros(70, 96, dtype=torch.float64)
    for slot in range(2):
        weight = weights[:, slot, None]
        rows = x * weight if on_input else x
        hidden = torch.einsum(
            "th,tnh->tn", rounded(rows.double(), 32), exact(up, 32, 96)[ids[:, slot]]
        )
        h = rounded(gated_activation(hidden, "silu", "chunked"), 32)
        y = torch.einsum("ti,thi->th", h, exact(down, 32, 64)[ids[:, slot]])
        reference += y if on_input else y * weight.double()
    assert relative_error(found, reference) <= LIMIT


def test_weights_that_cannot_have_them_are_refused():
    x = torch.randn(4, 128).bfloat16()
    for scheme, text in (
        (Scheme(8, 0, True, "rtn"), "8 bits"),
        (Scheme(4, 16, True, "rtn"), "16"),
    ):
        weight = drawn((48, 128), scheme)
        with pytest.raises(ValueError, match=f"quantized_linear: int8_activations needs.*{text}"):
            quant.quantized_linear(
                x, weight.packed, weight.scales, None, None, scheme.group_size, True
            )


def test_not_together_with_verify():
    with pytest.raises(UnknownOptionError, match="set one of them"):
        parse({**OPTION, "inductor_moe.verify": True})


def test_compiles_with_and_without_are_cached_apart():
    keys = {FusionPass(parse(options)[0]).uuid() for options in (None, OPTION)}
    assert len(keys) == 2 and None not in keys


def packed_model(group: int) -> nn.Module:
    torch.manual_seed(4)
    model = nn.Sequential(nn.Linear(32, 32).bfloat16(), forms.routed(form="grouped"))
    inductor_moe.quantize_(model, "int4", group_size=group, verbose=False)
    return model.eval()


@pytest.mark.parametrize("tokens, group, said", [
    (64, 32, "int8 activations per token and group"),
    (63, 32, "bfloat16 activations: 63 tokens, fewer than 64"),
    (64, 16, "bfloat16 activations: groups of 16, not of 32, 64 or 128"),
])  # fmt: skip
def test_the_report_says_what_a_site_multiplies(tokens, group, said):
    model, x = packed_model(group), forms.tokens(count=tokens, seed=2)
    plain = inductor_moe.explain(model, x)
    report = inductor_moe.explain(model, x, options=OPTION)
    packed = {site.op: site for site in report.matched if site.op != "moe_route"}
    assert set(packed) == {"quantized_linear", "moe_experts"}
    assert all(site.detail.endswith(f"; {said}") for site in packed.values()), str(report)
    assert "activations" not in str(plain) and plain.counts() == report.counts()


def test_a_graph_is_the_same_without_the_option():
    model, x = packed_model(32), forms.tokens(count=64, seed=2)
    graphs = {}
    for name, options in (("plain", None), ("off", {"inductor_moe.int8_activations": False}),
                          ("on", OPTION)):  # fmt: skip
        graphs[name] = []
        capture(model, x, graphs=graphs[name], options=options)
    text = {name: str(found[0].graph) for name, found in graphs.items()}
    assert text["plain"] == text["off"] != text["on"]


@pytest.mark.parametrize("dynamic", [pytest.param(False, marks=pytest.mark.slow), True])
def test_compiled_code_on_cpu(dynamic):
    model = packed_model(32)
    compiled = {
        name: torch.compile(model, backend="inductor_moe", dynamic=dynamic, options=options)
        for name, options in (("on", OPTION), ("off", {}))
    }
    exact_model = copy.deepcopy(model)
    with torch.no_grad():
        for tokens in (96, 64) if dynamic else (64,):
            x = forms.tokens(count=tokens, seed=tokens)
            eager = exact_model(x)
            error = {name: relative_error(run(x), eager) for name, run in compiled.items()}
            # Noise of 1/254 of the largest, uniform, through two products and a linear layer.
            assert error["off"] < error["on"] < 0.02
