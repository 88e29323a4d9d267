"""Weights dequantised by hand from int8 are read as they lie; what is near them is left alone."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from inductor_moe.testing import capture, fused_layers, relative_error

N, K, G = 48, 128, 32
E, H, INNER = 4, 64, 32


def values(*shape, dtype=torch.bfloat16):
    return (torch.rand(shape) / 50 + 1e-3).to(dtype)


def codes_of(*shape):
    return torch.randint(-128, 128, shape).to(torch.int8)


def rows(x, q, s, z):
    return F.linear(x, q.to(x.dtype) * s)


def rows_of_a_vector(x, q, s, z):
    return F.linear(x, s[:, 0][:, None] * q.to(x.dtype), z[:, 0])


def expanded(x, q, s, z):
    return x @ (q.to(x.dtype) * s.expand(N, K)).t()


def rows_with_zeros(x, q, s, z):
    return F.linear(x, (q.to(x.dtype) - z) * s)


def groups(x, q, s, z):
    return F.linear(x, (q.to(x.dtype).view(N, -1, G) * s[..., None]).view(N, K))


def groups_with_zeros(x, q, s, z):
    return F.linear(x, ((q.view(N, -1, G).to(x.dtype) - z[..., None]) * s[..., None]).flatten(1))


def repeated(x, q, s, z):
    s, z = s.repeat_interleave(G, -1), z.repeat_interleave(G, -1)
    return F.linear(x, (q.to(x.dtype) - z) * s)


def parts(count, dtype):
    torch.manual_seed(count)
    zeros = torch.randint(-9, 9, (N, count)).to(dtype)
    return codes_of(N, K), values(N, count, dtype=dtype), zeros


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(
    "form, count, detail",
    [
        (rows, 1, "128 -> 48 int8"),
        (rows_of_a_vector, 1, "128 -> 48 int8"),
        (expanded, 1, "128 -> 48 int8"),
        (rows_with_zeros, 1, "128 -> 48 int8 with zero points"),
        (groups, K // G, "128 -> 48 int8 g32"),
        (groups_with_zeros, K // G, "128 -> 48 int8 g32 with zero points"),
        (repeated, K // G, "128 -> 48 int8 g32 with zero points"),
    ],
)
def test_linear_layers_are_matched(form, count, detail, dtype, dynamic):
    weights = parts(count, dtype)
    x = torch.randn(6, K).to(dtype)
    eager = form(x, *weights)
    codes, scales, zeros = weights
    reference = form(x.double(), codes, scales.double(), zeros.double())
    if dynamic:
        torch._dynamo.mark_dynamic(x, 0)
    found, report = capture(form, x, *weights)
    assert report.refused == (), str(report)
    (site,) = report.matched
    assert site.op == "quantized_linear" and site.detail.startswith(f"{detail} torch.")
    assert found.dtype == dtype
    assert relative_error(found, reference) <= 2 * relative_error(eager, reference) + 1e-6


def experts(x, ids, weights, up, down, up_scales, down_scales):
    up, down = up.to(x.dtype) * up_scales, down.to(x.dtype) * down_scales
    h = F.silu(torch.einsum("tkih,th->tki", up[ids], x))
    return (torch.einsum("tkhi,tki->tkh", down[ids], h) * weights[..., None]).sum(1)


def test_experts_are_matched():
    torch.manual_seed(0)
    ids = torch.stack([torch.randperm(E)[:2] for _ in range(5)])
    codes = codes_of(E, INNER, H), codes_of(E, H, INNER)
    scales = values(E, INNER, 1), values(E, H, 1)
    x, weights = torch.randn(5, H).bfloat16(), torch.rand(5, 2).bfloat16()
    reference = experts(x.double(), ids, weights.double(), *codes, *scales)
    eager = experts(x, ids, weights, *codes, *scales)
    graphs = []
    found, report = capture(experts, x, ids, weights, *codes, *scales, graphs=graphs)
    assert fused_layers(report) == {"moe_experts": 1} and report.refused == (), str(report)
    assert "int8" in report.matched[0].detail
    assert any("moe_experts_quantized" in str(node.target) for node in graphs[0].graph.nodes)
    assert relative_error(found, reference) <= 2 * relative_error(eager, reference)


def broadcast_over_another_axis(x, q, s, z):
    """[2, N / 2, K] times [N / 2, 1]: two rows share a scale, though it has a row's shape."""
    return F.linear(x, (q.to(x.dtype).view(2, N // 2, K) * s[: N // 2]).view(N, K))


def a_row_s_shape_on_parts(x, q, s, z):
    """[K / 8, N, 8] times [N, 1], flattened to [N, K]: not a row of the weight."""
    return F.linear(x, (q.to(x.dtype).view(K // 8, N, 8) * s).view(N, K))


def tiled(x, q, s, z):
    return F.linear(x, q.to(x.dtype) * s.repeat(1, G))


NEAR_MISSES = {
    "a scale for each input": (lambda x, q, s, z: F.linear(x, q.to(x.dtype) * x[:1]), 1),
    "scales in turn": (tiled, K // G),
    "another axis": (broadcast_over_another_axis, 1),
    "parts of rows": (a_row_s_shape_on_parts, 1),
    "a scale for all": (lambda x, q, s, z: F.linear(x, q.to(x.dtype) * s[0, 0]), 1),
    "no scale": (lambda x, q, s, z: F.linear(x, q.to(x.dtype)) * s[:, 0], 1),
    "a number for a zero point": (lambda x, q, s, z: F.linear(x, (q.to(x.dtype) - 3) * s), 1),
    "zero points of a row": (
        lambda x, q, s, z: F.linear(
            x, (q.to(x.dtype) - z[:, :1]) * s.repeat_interleave(G, -1)
        ), K // G,
    ),
    "an added zero point": (lambda x, q, s, z: F.linear(x, (q.to(x.dtype) + z) * s), 1),
    "twice the zero point": (
        lambda x, q, s, z: F.linear(x, torch.sub(q.to(x.dtype), z, alpha=2) * s), 1,
    ),
    "zero points behind": (lambda x, q, s, z: F.linear(x, q.to(x.dtype) * s - z), 1),
    "scaled twice": (lambda x, q, s, z: F.linear(x, q.to(x.dtype) * s * s), 1),
    "inputs first": (lambda x, q, s, z: x[:, :N] @ (q.to(x.dtype) * s), 1),
    "wider scales": (
        lambda x, q, s, z: F.linear(x, (q.to(x.dtype) * s.float()).to(x.dtype)), 1,
    ),
    "transposed storage": (
        lambda x, q, s, z: F.linear(x, q.view(K, N).t().to(x.dtype) * s), 1,
    ),
}  # fmt: skip


@pytest.mark.parametrize("form, count", NEAR_MISSES.values(), ids=NEAR_MISSES)
def test_near_miss_is_left_alone(form, count):
    weights = parts(count, torch.bfloat16)
    x = torch.randn(6, K).bfloat16()
    found, report = capture(form, x, *weights)
    assert "quantized_linear" not in report.counts(), str(report)
    assert torch.equal(found, form(x, *weights))


def by_groups(x, q, s):
    """Groups of 8, or values for other rows or for each input of a group."""
    return F.linear(x, (q.to(x.dtype).view(N, s.shape[1], -1) * s).view(N, K))


OPERANDS = {  # name -> (form, codes, scales, dtype of x)
    "groups of 8": (by_groups, codes_of(N, K), values(N, K // 8, 1), torch.bfloat16),
    "rows in common": (by_groups, codes_of(N, K), values(1, K // G, 1), torch.bfloat16),
    "a scale in a group": (by_groups, codes_of(N, K), values(N, K // G, G), torch.bfloat16),
    "a scale for each weight": (
        lambda x, q, s: F.linear(x, q.to(x.dtype) * s.view(N, K)),
        codes_of(N, K), values(N * K), torch.bfloat16,
    ),
    "read as another shape": (
        lambda x, q, s: F.linear(x, q.view(N, K).to(x.dtype) * s),
        codes_of(K, N), values(N, 1), torch.bfloat16,
    ),
    "narrower scales": (
        lambda x, q, s: F.linear(x, q.to(x.dtype) * s), codes_of(N, K), values(N, 1), torch.float32
    ),
    "bytes": (
        lambda x, q, s: F.linear(x, q.to(x.dtype) * s),
        codes_of(N, K).view(torch.uint8), values(N, 1), torch.bfloat16,
    ),
    "int16": (
        lambda x, q, s: F.linear(x, q.to(x.dtype) * s),
        codes_of(N, K).short(), values(N, 1), torch.bfloat16,
    ),
}  # fmt: skip


@pytest.mark.parametrize("form, codes, scales, dtype", OPERANDS.values(), ids=OPERANDS)
def test_other_operands_are_left_alone(form, codes, scales, dtype):
    x = torch.randn(6, K).to(dtype)
    found, report = capture(form, x, codes, scales)
    assert "quantized_linear" not in report.counts(), str(report)
    assert not any("failed" in site.reason for site in report.refused), str(report)
    assert torch.equal(found, form(x, codes, scales))


def test_codes_that_do_not_lie_in_rows_are_left_alone():
    q, s, z = parts(1, torch.bfloat16)
    x = torch.randn(6, K).bfloat16()
    columns = q.t().contiguous().t()
    found, report = capture(rows, x, columns, s, z)
    assert report.matched == () and torch.equal(found, rows(x, columns, s, z))
