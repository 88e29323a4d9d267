"""Linear layers on packed weights, and what is near them but is none."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import inductor_moe
from inductor_moe import compat
from inductor_moe.ops.quant import dequantize
from inductor_moe.testing import capture, fused_layers, relative_error


def layer(bias: bool = True) -> nn.Linear:
    torch.manual_seed(1)
    linear = nn.Linear(96, 40, bias=bias).bfloat16()
    inductor_moe.quantize_(linear, "int4", verbose=False)
    return linear


RTN, HQQ = {}, {"method": "hqq", "group_size": 32}


@pytest.mark.parametrize(
    "bias, dtype, shape, kind, scheme",
    [
        (False, torch.bfloat16, (96,), "int4", RTN),
        (True, torch.bfloat16, (2, 3, 96), "int4", RTN),
        (True, torch.bfloat16, (5, 96), "int4", HQQ),
        (False, torch.float16, (5, 96), "int4", RTN),
        (True, torch.float32, (5, 96), "int4", HQQ),
        (True, torch.bfloat16, (5, 96), "int8", RTN),
        (False, torch.float32, (2, 3, 96), "int8", RTN),
    ],
)
def test_linear_is_matched(bias, dtype, shape, kind, scheme):
    torch.manual_seed(1)
    linear = nn.Linear(96, 40, bias=bias).to(dtype)
    inductor_moe.quantize_(linear, kind, verbose=False, **scheme)
    x = torch.randn(shape).to(dtype)
    with torch.no_grad():
        eager = linear(x)
        exact = F.linear(x.double(), linear.weight.double())
        if bias:
            exact += linear.bias
        graphs = []
        found, report = capture(linear, x, graphs=graphs)
    assert fused_layers(report) == {"quantized_linear": 1}
    assert report.refused == ()
    assert not any("dequantize" in str(node.target) for node in graphs[0].graph.nodes)
    assert found.dtype == dtype and found.shape == eager.shape
    assert relative_error(found, exact) <= 2 * relative_error(eager, exact) + 1e-6


NEAR_MISSES = {
    "weight times two": (lambda m, x: F.linear(x, m.weight * 2), ""),
    "weight cast": (lambda m, x: F.linear(x.float(), m.weight.float()), "made from one"),
    "inputs along the outputs": (lambda m, x: x[:, :40] @ m.weight, "not the packed dim"),
    "weight on the left": (lambda m, x: m.weight @ x.T, "on the left"),
    "scaled bias": (
        lambda m, x: torch.addmm(m.bias, x, m.weight.T, beta=0.5), "beta = 0.5",
    ),
    "scaled product": (
        lambda m, x: torch.addmm(m.bias, x, m.weight.T, alpha=2), "alpha = 2",
    ),
    "a row of biases each": (
        lambda m, x: torch.addmm(x[:, :40], x, m.weight.T), "no bias [N]",
    ),
    "batched": (
        lambda m, x: torch.bmm(x[None].expand(3, -1, -1), m.weight.T[None].expand(3, -1, -1)),
        "batched matmul",
    ),
}  # fmt: skip


@pytest.mark.parametrize("function, reason", NEAR_MISSES.values(), ids=NEAR_MISSES)
def test_near_miss_is_left_alone(function, reason):
    linear, x = layer(), torch.randn(7, 96).bfloat16()
    with torch.no_grad():
        eager = function(linear, x)
    graphs = []
    found, report = capture(lambda value: function(linear, value), x, graphs=graphs)
    assert fused_layers(report) == {}, str(report)
    if reason:
        assert any(reason in site.reason for site in report.refused), str(report)
    assert any("dequantize" in str(node.target) for node in graphs[0].graph.nodes)
    torch.testing.assert_close(found, eager, rtol=2e-2, atol=2e-2)


def test_a_linear_layer_that_is_not_packed_is_left_alone():
    _, report = capture(nn.Linear(96, 40), torch.randn(3, 96))
    assert report.sites == ()


def test_a_weight_that_is_also_used_otherwise_is_unpacked_for_that():
    linear = layer(bias=False)

    def function(x):
        return linear(x), linear.weight.sum()

    x = torch.randn(7, 96).bfloat16()
    (found, total), report = capture(function, x)
    assert fused_layers(report) == {"quantized_linear": 1}
    torch.testing.assert_close(total, linear.weight.sum())
    torch.testing.assert_close(found, linear(x), rtol=2e-2, atol=2e-2)


def test_max_autotune_keeps_the_products_with_packed_weights():
    """Inductor would decompose an mm by one row on a GPU before any pass sees it."""
    from torch._inductor import config
    from torch._inductor.decomposition import decompositions
    from torch._subclasses.fake_tensor import FakeTensorMode

    linear, plain = layer(bias=False), nn.Linear(96, 40, bias=False)

    class ByHand(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("codes", torch.zeros(40, 96, dtype=torch.int8))

        def forward(self, x):
            return F.linear(x, self.codes.to(x.dtype))

    graphs = {
        name: torch.export.export(module, (torch.randn(2, 96).to(dtype),)).graph
        for name, module, dtype in (
            ("packed", linear, torch.bfloat16),
            ("by hand", ByHand(), torch.bfloat16),
            ("plain", plain, torch.float32),
        )
    }
    with FakeTensorMode(), config.patch(coordinate_descent_tuning=True):
        row, matrix = torch.empty(1, 96, device="cuda"), torch.empty(96, 40, device="cuda")
        for name, kept in (("packed", True), ("by hand", True), ("plain", False)):
            with compat.keep_matmuls(graphs[name]):
                mm = decompositions[torch.ops.aten.mm.default](row, matrix)
            assert (mm is NotImplemented) == kept


def test_exported_programs_and_inductors_code(tmp_path):
    linear, x = layer(), torch.randn(5, 96).bfloat16()
    with torch.no_grad():
        exported = torch.export.export(linear, (x,), strict=False)
        compiled = torch.compile(linear, backend="inductor_moe", fullgraph=True)
        torch.testing.assert_close(compiled(x), linear(x), rtol=2e-2, atol=2e-2)
        assert torch.equal(exported.module()(x), linear(x))
    assert any(node.target is dequantize._opoverload for node in exported.graph.nodes)
