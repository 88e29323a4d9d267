"""Hand-written delta rules become the op in every spelling, for every batch."""

from __future__ import annotations

import delta_forms
import pytest
import torch
from delta_forms import Spelling
from rewriting import check_fused

from inductor_moe.testing import capture, relative_error

FEW, MANY = 64, 240
SPELLINGS = [
    pytest.param(spelling, id=str(spelling), marks=() if place < FEW else pytest.mark.slow)
    for place, spelling in enumerate(delta_forms.spellings(MANY))
]


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_spelling_becomes_the_op(spelling):
    check_fused(delta_forms.delta_rule(spelling), delta_forms.inputs(spelling))


@pytest.mark.parametrize(
    "spelling",
    [
        Spelling(norm="rsqrt"),
        Spelling(tokens=3, products="matmul"),
        Spelling(tokens=3, decay="channel", products="einsum", state="vk"),
    ],
    ids=str,
)
def test_one_graph_serves_every_batch(spelling):
    function = delta_forms.delta_rule(spelling)
    arguments = delta_forms.inputs(spelling)
    for argument in arguments:
        torch._dynamo.mark_dynamic(argument, 0)
    found, report = capture(function, *arguments, dynamic=None)
    assert len(report.matched) == 1, str(report)
    for got, want in zip(found, function(*(x.double() for x in arguments)), strict=True):
        assert relative_error(got, want) < 1e-6
