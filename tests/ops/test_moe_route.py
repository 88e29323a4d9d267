"""The router op: schema, checks, and its kernel under Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from kernels.interpreted import Interpreted

from inductor_moe.ops.moe_route import SCORINGS, moe_route, moe_route_cpu, moe_route_cuda

CASES = [(scoring, normalise) for scoring in SCORINGS for normalise in (False, True)]


@pytest.mark.parametrize("scoring, normalise", CASES)
def test_opcheck(scoring, normalise):
    torch.library.opcheck(moe_route, (torch.randn(5, 9), 3, scoring, normalise))


@pytest.mark.parametrize("scoring, normalise", CASES)
@pytest.mark.parametrize(
    "tokens, experts, top_k", [(1, 256, 8), (7, 6, 2), (3, 5, 5), (33, 60, 4)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_kernel(monkeypatch, scoring, normalise, tokens, experts, top_k, dtype):
    empty = torch.empty
    monkeypatch.setattr(
        torch,
        "empty",
        lambda *args, **kwargs: empty(*args, **kwargs).fill_(
            float("nan") if kwargs["dtype"] is torch.float32 else -1
        ),
    )
    # Distinct in every row, exact in bf16, small enough that no sigmoid saturates.
    ranks = torch.stack([torch.randperm(experts) for _ in range(tokens)])
    logits = ((ranks - experts / 2) / 32).to(dtype)
    padded = torch.zeros(tokens, experts + 3, dtype=dtype)
    padded[:, :experts] = logits
    weights, ids = moe_route_cuda(padded[:, :experts], top_k, scoring, normalise, wrap=Interpreted)
    expected_weights, expected_ids = moe_route_cpu(logits.double(), top_k, scoring, normalise)
    assert torch.equal(ids, expected_ids)
    torch.testing.assert_close(weights.double(), expected_weights.double(), rtol=1e-5, atol=1e-7)


def test_ties_and_minus_infinity_choose_distinct_experts():
    logits = torch.full((2, 6), float("-inf"))
    logits[0, 2] = 1.0
    logits[1] = 3.0
    _, ids = moe_route_cuda(logits, 4, "logits", False, wrap=Interpreted)
    assert ids.tolist() == [[2, 0, 1, 3], [0, 1, 2, 3]]


@pytest.mark.parametrize(
    "logits, top_k, scoring, message",
    [
        (torch.ones(3, dtype=torch.int64), 1, "softmax", r"logits has dtype torch\.int64"),
        (torch.ones(3, 4), 5, "softmax", "top_k is 5; it must be between 1 and 4"),
        (torch.ones(3, 4), -1, "softmax", "top_k is -1; it must be between 1 and 4"),
        (torch.ones(3, 4), 2, "relu", "scoring is 'relu'; it must be one of"),
        (torch.ones(1, 5000), 2, "softmax", "has 5000 experts; at most 4096"),
    ],
)
def test_a_bad_argument_is_named(logits, top_k, scoring, message):
    with pytest.raises(ValueError, match=message):
        moe_route(logits, top_k, scoring, False)
