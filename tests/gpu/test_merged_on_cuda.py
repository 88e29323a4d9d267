"""Packed linear layers of a few rows on a GPU, alone and merged: whole rows and slices."""

from __future__ import annotations

import pytest
import torch
from ops.test_merged_linear import arguments, one_after_the_other

from inductor_moe.ops.merged_linear import merged_linear
from inductor_moe.ops.quant import quantized_linear
from inductor_moe.quant.fit import Scheme
from inductor_moe.testing import relative_error

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
SCHEMES = {
    "int4 g128": Scheme(4, 128, True, "rtn"),
    "int4 g32 zeros": Scheme(4, 32, False, "rtn"),
    "int8": Scheme(8, 0, True, "rtn"),
}
ROWS = {  # packed, dense: together narrow, or wide
    "narrow": ((41, 512), (3, 256)),
    "wide": ((4097, 512), (33,)),
}


@pytest.mark.parametrize("tokens", [1, 2, 8, 13, 16, 17])
@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_linear_layers_of_a_few_rows(scheme, rows, tokens):
    torch.manual_seed(tokens)
    (packed, scales, zeros, group, dense), exact = arguments(*rows, scheme, 1024)
    x = torch.randn(tokens, 1024).bfloat16()
    lists = [[value.cuda() for value in values] for values in (packed, scales, zeros, dense)]
    poison = torch.full((1 << 22,), float("nan"), device="cuda")
    del poison
    found = merged_linear(x.cuda(), *lists[:3], group, lists[3]).cpu()
    expected = one_after_the_other(x, exact, (packed, dense))
    assert relative_error(found, expected) <= 3e-3
    weights = [values[:1] or [None] for values in lists[:3]]
    alone = quantized_linear(x.cuda(), *(value for (value,) in weights), None, group).cpu()
    assert relative_error(alone, expected[: alone.numel()].view_as(alone)) <= 3e-3
