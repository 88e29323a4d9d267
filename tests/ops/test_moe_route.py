"""The router op: schema, checks, and its kernel under Triton's interpreter."""

from __future__ import annotations

import functools

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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("scoring, normalise", CASES)
def test_weights_of_another_dtype(scoring, normalise, dtype):
    logits = torch.randn(33, 60, dtype=torch.float64)
    arguments = (3, scoring, normalise)
    exact, expected_ids = moe_route(logits, *arguments, weights_dtype=torch.float64)
    assert exact.dtype == torch.float64
    assert (exact.float() != exact).any()
    torch.library.opcheck(moe_route, (logits, *arguments), {"weights_dtype": dtype})
    given = logits.float()
    for run in (moe_route, functools.partial(moe_route_cuda, wrap=Interpreted)):
        wide, _ = run(given, *arguments)
        weights, ids = run(given, *arguments, weights_dtype=dtype)
        assert weights.dtype == dtype and torch.equal(ids, expected_ids)
        torch.testing.assert_close(weights, wide.to(dtype), rtol=1e-6, atol=0)


def test_weights_are_floats():
    with pytest.raises(ValueError, match=r"weights_dtype is torch.int32; it must be a floating"):
        moe_route(torch.randn(5, 9), 3, "softmax", False, weights_dtype=torch.int32)


OPTIONS = {
    "bias": {"biased": True},
    "epsilon": {"epsilon": 0.25},
    "floor": {"floor": 3.0},
    "scale": {"scale": 2.5},
    "groups": {"groups": 4, "kept_groups": 2, "group_top": 2},
    "one group": {"groups": 4, "kept_groups": 1, "group_top": 1},
    "all groups": {"groups": 4, "kept_groups": 4, "group_top": 1},
    "deepseek v3": {
        "biased": True, "epsilon": 1e-20, "scale": 2.5,
        "groups": 4, "kept_groups": 3, "group_top": 2,
    },
}  # fmt: skip


def route_by_hand(logits, top_k, scoring, normalise, bias, options):
    """One token after the other, in fp64 and plain Python."""
    groups, kept = options.get("groups", 1), options.get("kept_groups", 1)
    for row in logits.double():
        scores = {"softmax": row.softmax(0), "sigmoid": row.sigmoid(), "logits": row}[scoring]
        scores = scores.tolist()
        choice = [s + b for s, b in zip(scores, bias.tolist(), strict=True)]
        size = len(scores) // groups
        best = [
            sum(sorted(choice[g * size : (g + 1) * size])[-options.get("group_top", 1) :])
            for g in range(groups)
        ]
        open_groups = sorted(range(groups), key=lambda g: -best[g])[:kept]
        allowed = [e for e in range(len(scores)) if e // size in open_groups]
        ids = sorted(allowed, key=lambda e: -choice[e])[:top_k]
        total = sum(scores[e] for e in ids) if normalise else 1.0
        if normalise:
            total = max(total, options.get("floor") or total) + options.get("epsilon", 0.0)
        yield ids, [scores[e] / total * options.get("scale", 1.0) for e in ids]


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("scoring, normalise", CASES)
@pytest.mark.parametrize("tokens, experts, top_k", [(5, 64, 6), (3, 20, 4)])
def test_options(tokens, experts, top_k, scoring, normalise, options):
    options = dict(options)
    logits = torch.randn(tokens, experts) * 2
    bias = torch.randn(2 * experts)[::2] if options.pop("biased", False) else None
    zeros = torch.zeros(experts) if bias is None else bias
    arguments = (logits, top_k, scoring, normalise, bias)
    expected = list(route_by_hand(logits, top_k, scoring, normalise, zeros, options))
    for weights, ids in (
        moe_route(*arguments, **options),
        moe_route_cuda(*arguments, **options, wrap=Interpreted),
    ):
        assert ids.tolist() == [row for row, _ in expected]
        reference = torch.tensor([row for _, row in expected], dtype=torch.float64)
        torch.testing.assert_close(weights.double(), reference, rtol=2e-5, atol=1e-6)


def test_opcheck_with_options():
    options = {"scale": 2.5, "groups": 3, "kept_groups": 2, "group_top": 2, "epsilon": 1e-20}
    arguments = (torch.randn(5, 9), 3, "sigmoid", True, torch.randn(9))
    torch.library.opcheck(moe_route, arguments, options)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"bias": torch.ones(3)}, r"bias has dtype torch\.float32 and shape \[3\]"),
        ({"groups": 5}, "groups is 5; it must divide 8 experts"),
        ({"groups": 4, "kept_groups": 5}, "kept_groups is 5 of 4 groups"),
        ({"groups": 4, "kept_groups": 1}, "must hold top_k = 3 experts"),
        ({"groups": 2, "kept_groups": 1, "group_top": 5}, "group_top is 5; .* between 1 and 4"),
        ({"epsilon": -1.0}, "epsilon is -1.0; it must not be negative"),
        ({"floor": float("nan")}, "floor is nan; it must not be negative"),
    ],
)
def test_a_bad_option_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        moe_route(torch.ones(3, 8), 3, "softmax", False, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_ties_and_minus_infinity_choose_distinct_experts(dtype):
    logits = torch.full((3, 6), float("-inf"), dtype=dtype)
    logits[0, 2] = 1.0
    logits[1] = 3.0
    logits[2] = torch.tensor([-2.0, -0.0, 0.0, -1.0, torch.inf, 0.0])
    weights, ids = moe_route_cuda(logits, 4, "logits", False, wrap=Interpreted)
    assert ids.tolist() == [[2, 0, 1, 3], [0, 1, 2, 3], [4, 1, 2, 5]]
    assert torch.equal(weights, logits.gather(1, ids).float())


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
