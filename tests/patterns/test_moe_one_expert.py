"""Experts by einsum with one expert a token: its routing weight scales the row, nothing sums."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from inductor_moe.testing import capture, fused_layers, relative_error

HIDDEN, INNER, EXPERTS = 24, 40, 5
SCALED = {
    "without the dim of experts": lambda rows, w: rows.squeeze(1) * w,
    "with the dim of experts": lambda rows, w: (rows * w[..., None]).view(-1, HIDDEN),
    "weight first": lambda rows, w: w * rows.squeeze(1),
    "weights that were moved before": lambda rows, w: rows.squeeze(1) * w.roll(1, 0),
}
OTHERS = {
    "weight by column": lambda rows, w: rows.squeeze(1) * w.T,
    "scaled by itself": lambda rows, w: rows.squeeze(1) * rows.squeeze(1) + 0 * w,
    "rows used elsewhere": lambda rows, w: rows.squeeze(1) * w + rows.sum(),
}


class Block(nn.Module):
    def __init__(self, combine):
        super().__init__()
        self.combine = combine

    def forward(self, x, up, down, ids, weights):
        h = F.silu(torch.einsum("tkih,th->tki", up[ids], x))
        return self.combine(torch.einsum("tkhi,tki->tkh", down[ids], h), weights)


def run(combine):
    torch.manual_seed(12)
    given = (
        torch.randn(HIDDEN, HIDDEN), torch.randn(EXPERTS, INNER, HIDDEN),
        torch.randn(EXPERTS, HIDDEN, INNER), torch.randint(EXPERTS, (HIDDEN, 1)),
        torch.rand(HIDDEN, 1),
    )  # fmt: skip
    model = Block(combine)
    with torch.no_grad():
        found, report = capture(model, *given)
        x, up, down, ids, weights = given
        exact = model(x.double(), up.double(), down.double(), ids, weights.double())
        assert relative_error(found, exact) <= 2 * relative_error(model(*given), exact) + 1e-7
    return fused_layers(report)


@pytest.mark.parametrize("name", SCALED)
def test_scaled_rows_are_fused(name):
    assert run(SCALED[name]) == {"moe_experts": 1}


@pytest.mark.parametrize("name", OTHERS)
def test_other_products_are_left_alone(name):
    assert run(OTHERS[name]) == {}
