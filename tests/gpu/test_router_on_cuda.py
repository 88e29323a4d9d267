"""A whole router as one launch on a GPU: several tokens count their programs apart."""

from __future__ import annotations

import pytest
import torch
from ops.test_moe_router import ROUTES, decided

from inductor_moe.ops.moe_router import moe_router
from inductor_moe.testing import relative_error

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


@pytest.mark.parametrize("tokens", [1, 2, 5, 16])
@pytest.mark.parametrize("route", ROUTES.values(), ids=ROUTES)
@pytest.mark.parametrize("hidden, experts", [(2048, 256), (1000, 20)])
def test_router(hidden, experts, route, tokens):
    torch.manual_seed(hidden + tokens)
    given, eager, expected = decided(hidden, experts, route, torch.bfloat16, tokens=tokens)
    moved = [value.cuda() if isinstance(value, torch.Tensor) else value for value in given]
    for _ in range(3):
        poison = torch.full((1 << 22,), float("nan"), device="cuda")
        del poison
        moved[7].zero_()
        found = [value.cpu() for value in moe_router(*moved)]
        assert torch.equal(found[3], expected[3])
        for index in (0, 1, 2, 4):
            limit = 2 * relative_error(eager[index], expected[index]) + 1e-6
            assert relative_error(found[index], expected[index]) <= limit
