"""The expert kernels under Triton's interpreter, outputs filled with NaN, against fp64."""

from __future__ import annotations

import math
import os
from typing import Any

import pytest
import torch
from kernels.interpreted import Interpreted
from torch import Tensor

from inductor_moe.ops import moe_cuda
from inductor_moe.reference.moe import (
    ACTIVATIONS,
    GATES,
    gated_activation,
    moe_down_combine_reference,
    moe_experts_reference,
    moe_up_reference,
)
from inductor_moe.tiles import DecodeTile, GemmTile, Plan

EXPERTS, TOP_K, HIDDEN, INNER = 5, 3, 40, 24
PLANS = {
    "decode": Plan(0, DecodeTile(16, 32, 4), DecodeTile(16, 16, 4, unroll=2)),
    "decode-split": Plan(0, DecodeTile(32, 64, 4, 2), DecodeTile(32, 32, 4, split=2)),
    "grouped": Plan(16, GemmTile(32, 32, 2, 4, 2), GemmTile(16, 16, 2, 4, 2)),
    "grouped-tail": Plan(32, GemmTile(64, 16, 1, 4, 2, True), GemmTile(64, 8, 4, 4, 2, True)),
}


@pytest.fixture(autouse=True)
def _seed() -> None:
    seed = int(os.environ.get("TEST_SEED", int.from_bytes(os.urandom(4), "little")))
    print(f"TEST_SEED={seed}")
    torch.manual_seed(seed)


@pytest.fixture(autouse=True)
def _poisoned_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    empty = torch.empty

    def poisoned(*args: Any, **kwargs: Any) -> Tensor:
        tensor = empty(*args, **kwargs)
        return tensor.fill_(math.nan if tensor.is_floating_point() else 1 << 30)

    monkeypatch.setattr(moe_cuda.torch, "empty", poisoned)


def draw(
    tokens: int,
    dtype: torch.dtype,
    gate: str = "chunked",
    activation: str = "silu",
    layout: str = "k",
    ids_dtype: torch.dtype = torch.int64,
) -> tuple[Any, ...]:
    rows = INNER if gate == "none" else 2 * INNER

    def strided(value: Tensor) -> Tensor:
        """The same values, no stride what a contiguous tensor has."""
        wide = value.new_zeros([2 * n for n in value.shape])
        view = wide[tuple(slice(None, None, 2) for _ in value.shape)]
        return view.copy_(value)

    def weight(n: int, k: int) -> Tensor:
        value = (torch.randn(EXPERTS, n, k) / k**0.5).to(dtype)
        if layout == "n":
            return value.transpose(1, 2).contiguous().transpose(1, 2)
        return value if layout == "k" else strided(value)

    ids = torch.randint(-1, EXPERTS + 2, (tokens, TOP_K), dtype=ids_dtype)
    ids[0, 0] = EXPERTS - 1
    others = [
        torch.randn(tokens, HIDDEN).to(dtype),
        torch.rand(tokens, TOP_K).to(dtype),
        torch.randn(EXPERTS, rows).to(dtype),
        torch.randn(EXPERTS, HIDDEN).to(dtype),
    ]
    if layout == "strided":
        ids, others = strided(ids), [strided(v) for v in others]
    x, weights, bias_up, bias_down = others
    w_up, w_down = weight(rows, HIDDEN), weight(HIDDEN, INNER)
    return x, w_up, w_down, ids, weights, bias_up, bias_down, activation, gate


def widened(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(
        v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for v in arguments
    )


def assert_as_exact(run: Any, reference: Any, arguments: tuple[Any, ...], **options: Any) -> None:
    """At most twice the plain-torch error, or a few units in the last place of fp32."""
    exact = reference(*widened(arguments), **options)
    got, plain = run(*arguments, **options), reference(*arguments, **options)
    assert got.dtype == plain.dtype and got.shape == plain.shape
    error, allowed = (((v.double() - exact).norm() / exact.norm()).item() for v in (got, plain))
    assert error <= max(2 * allowed, 4 * torch.finfo(torch.float32).eps)


def launched(op: Any, plan: str) -> Any:
    return lambda *a, **k: op(*a, **k, plan=PLANS[plan], wrap=Interpreted)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("layout", ["k", "n", "strided"])
@pytest.mark.parametrize("gate", GATES)
def test_layouts_and_gates(plan, layout, gate):
    arguments = draw(2, torch.float32, gate, layout=layout)
    assert_as_exact(launched(moe_cuda.moe_experts_cuda, plan), moe_experts_reference, arguments)


@pytest.mark.parametrize("plan", ["decode", "grouped"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(plan, dtype):
    # The error of one pair's few roundings varies by more than two; of many, it does not.
    arguments = draw(7, dtype, ids_dtype=torch.int32)
    assert_as_exact(launched(moe_cuda.moe_experts_cuda, plan), moe_experts_reference, arguments)


@pytest.mark.parametrize("plan", ["decode", "grouped"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("gate", ["none", "interleaved"])
def test_activations(plan, activation, gate):
    options: dict[str, Any] = {"limit": 0.7}
    if activation == "silu":
        options["alpha"] = 1.702
    if gate != "none":
        options["up_offset"] = 1.0
    arguments = draw(1, torch.float32, gate, activation)
    assert_as_exact(
        launched(moe_cuda.moe_experts_cuda, plan), moe_experts_reference, arguments, **options
    )


@pytest.mark.parametrize("plan", ["decode-split", "grouped-tail"])
def test_weights_on_input_and_out_dtype(plan):
    assert_as_exact(
        launched(moe_cuda.moe_experts_cuda, plan),
        moe_experts_reference,
        draw(2, torch.float16),
        weights_on_input=True,
        out_dtype=torch.float32,
    )


@pytest.mark.parametrize("plan", ["decode", "grouped"])
def test_halves(plan):
    x, w_up, w_down, ids, weights, bias_up, bias_down, *_ = draw(2, torch.float32)
    up_arguments = (x, w_up, ids, bias_up, weights)
    assert_as_exact(launched(moe_cuda.moe_up_cuda, plan), moe_up_reference, up_arguments)
    up = launched(moe_cuda.moe_up_cuda, plan)(*up_arguments)
    assert not up[~((ids >= 0) & (ids < EXPERTS)).reshape(-1)].any()
    h = gated_activation(up, "silu", "chunked")
    for scale in (weights, None):
        assert_as_exact(
            launched(moe_cuda.moe_down_combine_cuda, plan),
            moe_down_combine_reference,
            (h, w_down, ids, scale, bias_down),
        )


@pytest.mark.parametrize("plan", ["grouped", "grouped-tail"])
@pytest.mark.parametrize("expert", [None, 2])
def test_many_tokens(plan, expert):
    arguments = draw(33, torch.float32)
    if expert is not None:
        arguments[3].fill_(expert)
    assert_as_exact(launched(moe_cuda.moe_experts_cuda, plan), moe_experts_reference, arguments)


@pytest.mark.parametrize("plan", PLANS)
def test_nothing_routed(plan):
    arguments = draw(2, torch.float32)
    arguments[3].fill_(EXPERTS)
    arguments[4].fill_(math.nan)
    y = launched(moe_cuda.moe_experts_cuda, plan)(*arguments)
    assert torch.equal(y, torch.zeros_like(y))
    assert moe_cuda.moe_experts_cuda(*(v[:0] if v is arguments[0] or v is arguments[3] else v
                                       for v in arguments)).shape == (0, HIDDEN)  # fmt: skip


@pytest.mark.parametrize("ranked", [True, False])
@pytest.mark.parametrize("block_m", [16, 64])
@pytest.mark.parametrize(
    ("tokens", "top_k", "experts"), [(1, 1, 1), (5, 3, 5), (70, 8, 3), (33, 60, 64), (200, 8, 100)]
)
def test_sort(monkeypatch, ranked, block_m, tokens, top_k, experts):
    monkeypatch.setattr(moe_cuda, "RANKED_PAIRS", 1 << 20 if ranked else 0)
    ids = torch.randint(-1, experts + 1, (tokens, top_k))
    flat = ids.reshape(-1).tolist()
    expected = sorted(
        (p for p, e in enumerate(flat) if 0 <= e < experts), key=lambda p: (flat[p], p)
    )
    routed = moe_cuda._sort(ids, experts, block_m, None, Interpreted)
    order = routed.order.tolist()
    assert order[: len(expected)] == expected
    covered = []
    for expert, first, rows in routed.blocks.view(3, -1).T.tolist():
        if expert >= 0:
            assert 0 < rows <= block_m
            assert {flat[p] for p in order[first : first + rows]} == {expert}
            covered += order[first : first + rows]
    assert covered == expected
