"""Weights that a graph dequantises by hand are reported; what only looks like one is not."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from inductor_moe.testing import capture

N, K, G = 48, 64, 16
BYTES = torch.randint(0, 256, (N, K // 2), dtype=torch.uint8)
WORDS = torch.randint(-(2**31), 2**31, (N, K // 8)).to(torch.int32)
CODES = torch.randint(-128, 128, (N, K)).to(torch.int8)
SCALES, ROWS = torch.rand(N, K // G).bfloat16(), torch.rand(N, 1).bfloat16()
X = torch.randn(5, K).bfloat16()


def nibbles(words, first_low=True):
    halves = [words & 15, words >> 4]
    return torch.stack(halves if first_low else halves[::-1], -1).flatten(-2)


def low_first(x, words, scales):
    return F.linear(x, (nibbles(words).to(x.dtype) - 8) * scales.repeat_interleave(G, -1))


def high_first(x, words, scales):
    codes = nibbles(words, first_low=False).to(x.dtype).view(N, -1, G)
    return x @ ((codes - 8) * scales[..., None]).view(N, K).t()


def words_of_eight(x, words, scales):
    shifts = torch.arange(0, 32, 4, device=x.device)
    codes = ((words[..., None] >> shifts) & 15).flatten(-2).to(x.dtype)
    return F.linear(x, codes * scales.repeat_interleave(G, -1))


def with_bias(x, words, scales):
    weight = (nibbles(words).to(x.dtype) - 8) * scales.repeat_interleave(G, -1)
    return F.linear(x, weight, scales[:, 0])


def wider_rows(x, codes, scales):
    return F.linear(x, (codes.to(x.dtype) * scales).to(x.dtype))


def scaled_outputs(x, codes, scales):
    return F.linear(x, codes.to(x.dtype)) * scales[:, 0]


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize(
    "function, codes, scales, kind",
    [
        (low_first, BYTES, SCALES, "[48, 32] uint8"),
        (high_first, BYTES, SCALES, "[48, 32] uint8"),
        (words_of_eight, WORDS, SCALES, "[48, 8] int32"),
        (with_bias, BYTES, SCALES, "[48, 32] uint8"),
        (wider_rows, CODES, ROWS.float(), "[48, 64] int8"),
        (scaled_outputs, CODES, ROWS, "[48, 64] int8"),
    ],
)
def test_hand_written_forms_are_reported(function, codes, scales, kind, dynamic):
    x = X.clone()
    if dynamic:
        torch._dynamo.mark_dynamic(x, 0)
    found, report = capture(function, x, codes, scales)
    assert torch.equal(found, function(x, codes, scales))
    (site,) = report.refused
    assert (site.op, site.rewrite, report.matched) == ("dequantize", "quant.dequantised", ())
    assert "which the graph dequantises from" in site.reason and kind in site.reason
    assert "replace_weight" in str(report)


def test_experts_are_fused_and_reported():
    torch.manual_seed(0)
    up, down = (torch.randint(-128, 128, (4, K, K)).to(torch.int8) for _ in range(2))
    ids = torch.stack([torch.randperm(4)[:2] for _ in range(5)])

    def experts(x, ids, weights, up, down):
        up, down = ((codes.to(x.dtype) * 0.01)[ids] for codes in (up, down))
        h = F.silu(torch.einsum("tkih,th->tki", up, x))
        return (torch.einsum("tkhi,tki->tkh", down, h) * weights[..., None]).sum(1)

    _, report = capture(experts, X, ids, torch.rand(5, 2).bfloat16(), up, down)
    assert [site.op for site in report.matched] == ["moe_experts"]
    (site,) = report.refused
    assert "moe_experts" in site.reason and "int8" in site.reason


SILENT = {
    "a float weight": lambda x: F.linear(x, ROWS.expand(N, K)),
    "a float weight, scaled": lambda x: F.linear(x, ROWS.expand(N, K) * ROWS),
    "one-hot rows": lambda x: x.t() @ F.one_hot(torch.arange(5), N).to(x.dtype),
    "a mask of the activations": lambda x: x.t() @ (x > 0).to(x.dtype),
    "positions": lambda x: x @ (POSITIONS[:, None] * ROWS[0]).to(x.dtype),
    "a table looked up": lambda x: x @ F.embedding(TOKENS, ROWS.expand(N, K)).t(),
    "a boolean mask": lambda x: x.t() @ MASK.to(x.dtype),
    "codes on the left": lambda x: CODES.to(x.dtype) @ x.t(),
    "an int32 weight": lambda x: x @ WORDS.to(x.dtype).repeat(2, 1)[:K] * ROWS[0],
}
POSITIONS = torch.arange(K)
TOKENS = torch.arange(7)
MASK = torch.rand(5, N) > 0.5


@pytest.mark.parametrize("case", SILENT)
def test_other_products_are_not_mentioned(case):
    found, report = capture(SILENT[case], X)
    assert torch.equal(found, SILENT[case](X))
    assert report.sites == ()
