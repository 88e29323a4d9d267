"""A router that numbers its choices for the experts of one rank, and what only looks like it."""

from __future__ import annotations

import forms
import pytest
import torch
from torch import nn

from inductor_moe.reference.moe import moe_experts_reference
from inductor_moe.testing import capture, relative_error

TOTAL = 4 * forms.EXPERTS


def by_hand(experts, x, ids, weights):
    return moe_experts_reference(x, experts.up, experts.down, ids, weights)


class Rank(nn.Module):
    """One token's router over all experts, of which this rank has some."""

    def __init__(self, first, change=""):
        super().__init__()
        torch.manual_seed(first)
        self.router = nn.Linear(forms.HIDDEN, TOTAL, bias=False)
        self.experts = forms.Experts(mask_sentinels=True)
        self.first, self.change = first, change

    def forward(self, x):
        scores = torch.softmax(self.router(x), -1, dtype=torch.float)
        weights, ids = torch.topk(scores, 4, dim=-1)
        weights = (weights / weights.sum(-1, keepdim=True)).to(x.dtype)
        local, own = ids - self.first, forms.EXPERTS
        others = (local < 0) | (local >= own)
        if self.change == "one more":
            others = (local < 0) | (local >= own - 1)
        elif self.change == "back to front":
            local = own - 1 - local
        elif self.change == "doubled":
            weights = torch.where(ids >= 0, 2.0 * weights, weights)
        elif self.change == "every other":
            others = others | (local % 2 == 1)
        elif self.change == "wrapped":
            local, others = ids % own, ids < 0
        elif self.change == "another's weights":
            weights = torch.where(ids > 8, weights, 0.25)
        experts = by_hand if x.dtype == torch.float64 else forms.Experts.__call__
        out = experts(
            self.experts, x, local.masked_fill(others, own), weights.masked_fill(others, 0.0)
        )
        return (out, ids) if self.change == "used twice" else out


@torch.no_grad()
def found(rank):
    """The details of the sites in a compiled rank, whose output was right."""
    rank, dtype = rank.bfloat16(), torch.bfloat16
    details = []
    for _ in range(3):  # of several tokens some choose no expert of this rank
        x = torch.randn(1, forms.HIDDEN).to(dtype)
        eager, exact = rank(x), rank.double()(x.double())
        rank.to(dtype)
        result, report = capture(rank, x)
        if isinstance(result, tuple):
            (result, ids), (eager, _), (exact, expected) = result, eager, exact
            assert torch.equal(ids, expected)
        limit = 2 * relative_error(eager, exact) + 1e-6 if exact.norm() else 0
        assert (result.double() - exact).norm() <= limit * exact.norm()
        details += [s.detail for s in report.matched if s.rewrite == "moe.local_choices"]
    return details


@pytest.mark.parametrize("first", [0, forms.EXPERTS, TOTAL - forms.EXPERTS])
def test_the_router_numbers_its_choices(first):
    said = f"experts {first} to {first + forms.EXPERTS - 1} of {TOTAL}"
    details = found(Rank(first))
    assert len(details) == 3 and all(detail.endswith(said) for detail in details)


def test_fewer_experts_than_the_weights_are_of():
    details = found(Rank(6, change="one more"))
    assert details and all(detail.endswith("experts 6 to 10 of 24") for detail in details)


@pytest.mark.parametrize(
    "change",
    ["back to front", "doubled", "every other", "wrapped", "another's weights", "used twice"],
)
def test_near_miss_is_left_alone(change):
    assert found(Rank(6, change=change)) == []
