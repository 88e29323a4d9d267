"""The expert ops on CPU: against their definition in fp64, one pair at a time."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from inductor_moe.ops.moe import moe_down_combine, moe_experts, moe_up
from inductor_moe.ops.moe_cpu import moe_down_combine_cpu, moe_experts_cpu, moe_up_cpu
from inductor_moe.reference.moe import (
    ACTIVATIONS,
    GATES,
    moe_down_combine_reference,
    moe_experts_reference,
    moe_up_reference,
)

HIDDEN, INNER, EXPERTS, TOP_K = 40, 24, 5, 3
OPEN_GATE: dict[str, Any] = {"alpha": 1.702, "up_offset": 1.0, "limit": 0.7}


@dataclass
class Case:
    x: Tensor
    w_up: Tensor
    w_down: Tensor
    ids: Tensor
    weights: Tensor
    bias_up: Tensor | None = None
    bias_down: Tensor | None = None
    activation: str = "silu"
    gate: str = "chunked"

    def arguments(self) -> tuple[Any, ...]:
        return tuple(vars(self).values())

    def wide(self) -> Case:
        floats = {
            name: value.double()
            for name, value in vars(self).items()
            if isinstance(value, Tensor) and value.is_floating_point()
        }
        return replace(self, **floats)


@pytest.fixture(autouse=True)
def _seed() -> None:
    seed = int(os.environ.get("TEST_SEED", int.from_bytes(os.urandom(4), "little")))
    print(f"TEST_SEED={seed}")
    torch.manual_seed(seed)


def draw(
    tokens: int,
    dtype: torch.dtype,
    gate: str = "chunked",
    activation: str = "silu",
    bias: bool = True,
    transposed: bool = False,
    sizes: tuple[int, int, int, int] = (HIDDEN, INNER, EXPERTS, TOP_K),
    ids_dtype: torch.dtype = torch.int64,
) -> Case:
    """Random inputs; ids -1 and E are among them, and pair 0 always has an expert."""
    hidden, inner, experts, top_k = sizes
    rows = inner if gate == "none" else 2 * inner

    def weight(n: int, k: int) -> Tensor:
        value = torch.randn(experts, n, k) / k**0.5
        if transposed:
            value = value.transpose(1, 2).contiguous().transpose(1, 2)
        return value.to(dtype)

    ids = torch.randint(-1, experts + 1, (tokens, top_k), dtype=ids_dtype)
    if tokens:
        ids[0, 0] = experts - 1
    return Case(
        torch.randn(tokens, hidden).to(dtype),
        weight(rows, hidden),
        weight(hidden, inner),
        ids,
        torch.rand(tokens, top_k).to(dtype),
        torch.randn(experts, rows).to(dtype) if bias else None,
        torch.randn(experts, hidden).to(dtype) if bias else None,
        activation,
        gate,
    )


def by_definition(
    case: Case,
    alpha: float = 1.0,
    up_offset: float = 0.0,
    limit: float | None = None,
    weights_on_input: bool = False,
) -> Tensor:
    """The op's docstring, one pair at a time, in fp64."""
    act = {
        "silu": lambda v: v * torch.sigmoid(alpha * v),
        "gelu": F.gelu,
        "gelu_tanh": lambda v: F.gelu(v, approximate="tanh"),
        "relu": F.relu,
        "relu2": lambda v: F.relu(v) ** 2,
    }[case.activation]
    c = case.wide()
    y = torch.zeros(c.x.shape, dtype=torch.float64)
    inner = c.w_down.shape[2]
    for t in range(c.x.shape[0]):
        for slot, e in enumerate(c.ids[t].tolist()):
            if not 0 <= e < c.w_up.shape[0]:
                continue
            scale = c.weights[t, slot]
            up = c.w_up[e] @ (c.x[t] * scale if weights_on_input else c.x[t])
            up = up if c.bias_up is None else up + c.bias_up[e]
            if case.gate == "none":
                h = act(up if limit is None else up.clamp(max=limit))
            else:
                g, u = (up[:inner], up[inner:]) if case.gate == "chunked" else (up[::2], up[1::2])
                if limit is not None:
                    g, u = g.clamp(max=limit), u.clamp(-limit, limit)
                h = act(g) * (u + up_offset)
            down = c.w_down[e] @ h
            down = down if c.bias_down is None else down + c.bias_down[e]
            y[t] += down if weights_on_input else scale * down
    return y


def error(got: Tensor, exact: Tensor) -> float:
    return ((got.double() - exact).norm() / exact.norm()).item()


def assert_as_exact(got: Tensor, plain: Tensor, exact: Tensor) -> None:
    """At most twice the plain-torch error, or a few units in the last place of fp32."""
    assert error(got, exact) <= max(2 * error(plain, exact), 4 * torch.finfo(torch.float32).eps)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("implementation", [moe_experts, moe_experts_cpu])
def test_activations_and_gates(implementation, activation, gate):
    case = draw(7, torch.float64, gate, activation)
    exact = by_definition(case)
    assert error(implementation(*case.arguments()), exact) < 1e-14


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("implementation", [moe_experts, moe_experts_cpu])
def test_clamped_swiglu(implementation, gate):
    case = draw(7, torch.float64, gate)
    options = OPEN_GATE if gate != "none" else {"alpha": 1.702, "limit": 0.7}
    exact = by_definition(case, **options)
    assert error(implementation(*case.arguments(), **options), exact) < 1e-14


@pytest.mark.parametrize("implementation", [moe_experts, moe_experts_cpu])
def test_weights_on_input(implementation):
    case = draw(7, torch.float64)
    exact = by_definition(case, weights_on_input=True)
    assert error(implementation(*case.arguments(), weights_on_input=True), exact) < 1e-14


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("tokens", [1, 2, 7, 33])
@pytest.mark.parametrize("transposed", [False, True])
def test_low_precision(dtype, tokens, transposed):
    # Several draws together: one token's few roundings may happen to cancel.
    cases = [draw(tokens, dtype, transposed=transposed, ids_dtype=torch.int32) for _ in range(8)]
    exact = torch.cat([moe_experts_reference(*c.wide().arguments()) for c in cases])
    plain = torch.cat([moe_experts_reference(*c.arguments()) for c in cases])
    for implementation in (moe_experts, moe_experts_cpu):
        assert_as_exact(torch.cat([implementation(*c.arguments()) for c in cases]), plain, exact)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("dynamic", [False, True])
def test_cpu_implementation_compiles(dtype, dynamic):
    compiled = torch.compile(moe_experts_cpu, fullgraph=True, dynamic=dynamic)
    for tokens in (33, 9) if dynamic else (33, 2):
        case = draw(tokens, dtype)
        exact = moe_experts_reference(*case.wide().arguments())
        plain = moe_experts_reference(*case.arguments())
        assert_as_exact(compiled(*case.arguments()), plain, exact)


def test_odd_sizes_compile_in_bf16():
    case = draw(33, torch.bfloat16, sizes=(13, 5, 7, 2))
    compiled = torch.compile(moe_experts_cpu, fullgraph=True)
    exact = moe_experts_reference(*case.wide().arguments())
    assert_as_exact(compiled(*case.arguments()), moe_experts_reference(*case.arguments()), exact)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_halves_agree_with_the_whole(dtype):
    case = draw(33, dtype, "none", "relu")
    up = moe_up(case.x, case.w_up, case.ids, case.bias_up, None)
    y = moe_down_combine(up.relu(), case.w_down, case.ids, case.weights, case.bias_down)
    assert torch.equal(y, moe_experts(*case.arguments()))
    skipped = ~((case.ids >= 0) & (case.ids < EXPERTS)).reshape(-1)
    assert skipped.any() and not up[skipped].any()
    arguments = (case.x, case.w_up, case.ids, case.bias_up, case.weights)
    wide = case.wide()
    exact = moe_up_reference(wide.x, wide.w_up, wide.ids, wide.bias_up, wide.weights)
    assert_as_exact(moe_up_cpu(*arguments), moe_up_reference(*arguments), exact)
    arguments = (up, case.w_down, case.ids, None, case.bias_down)
    exact = moe_down_combine_reference(up.double(), wide.w_down, wide.ids, None, wide.bias_down)
    assert_as_exact(
        moe_down_combine_cpu(*arguments), moe_down_combine_reference(*arguments), exact
    )


@pytest.mark.parametrize("implementation", [moe_experts, moe_experts_cpu])
def test_no_tokens_and_no_experts(implementation):
    empty = implementation(*draw(0, torch.float32).arguments())
    assert empty.shape == (0, HIDDEN)
    case = draw(4, torch.float32)
    case.ids.fill_(-1)
    case.weights.fill_(float("nan"))
    assert torch.equal(implementation(*case.arguments()), torch.zeros(4, HIDDEN))


@pytest.mark.parametrize("implementation", [moe_experts, moe_experts_cpu])
def test_out_dtype(implementation):
    case = draw(33, torch.bfloat16)
    y = implementation(*case.arguments(), out_dtype=torch.float32)
    assert y.dtype == torch.float32
    assert torch.equal(y.bfloat16(), implementation(*case.arguments()))


def test_opcheck():
    case = draw(7, torch.float32)
    torch.library.opcheck(moe_experts, case.arguments())
    torch.library.opcheck(moe_experts, case.arguments(), {**OPEN_GATE, "out_dtype": torch.float64})
    torch.library.opcheck(moe_up, (case.x, case.w_up, case.ids, case.bias_up, case.weights))
    h = torch.randn(7 * TOP_K, INNER)
    torch.library.opcheck(moe_down_combine, (h, case.w_down, case.ids, case.weights, None))


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"ids": torch.zeros(7, TOP_K)}, TypeError,
         "moe_experts: ids has dtype float32; "
         "it must be an integer tensor of shape [T, K] (got [7, 3])."),
        ({"ids": torch.zeros(6, TOP_K).long()}, ValueError, "it must be [T, K] with T = 7"),
        ({"ids": torch.zeros(7, 0, dtype=torch.int64)}, ValueError, "K at least 1"),
        ({"x": torch.zeros(7, HIDDEN, dtype=torch.int64)}, TypeError, "x has dtype int64"),
        ({"x": torch.zeros(7, HIDDEN + 1)}, ValueError, "w_up [5, 48, 40] has H = 40, but x [7"),
        ({"w_up": torch.zeros(EXPERTS, 48, HIDDEN).half()}, TypeError, "w_up has dtype float16"),
        ({"w_up": torch.zeros(2 * INNER, HIDDEN)}, ValueError, "it must be [E, N, H]"),
        ({"gate": "none"}, ValueError, "must have N = I rows = 24"),
        ({"gate": "halves"}, ValueError, "gate must be one of"),
        ({"activation": "tanh"}, ValueError, "activation must be one of"),
        ({"w_down": torch.zeros(4, HIDDEN, INNER)}, ValueError, "w_down has shape [4, 40, 24]"),
        ({"weights": torch.zeros(7, 2)}, ValueError, "weights has shape [7, 2]"),
        ({"bias_up": torch.zeros(EXPERTS, INNER)}, ValueError, "bias_up has shape [5, 24]"),
    ],
)  # fmt: skip
def test_bad_input_is_named(change, kind, message):
    case = replace(draw(7, torch.float32), **change)
    with pytest.raises(kind) as raised:
        moe_experts(*case.arguments())
    assert message in str(raised.value)


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({"activation": "relu"}, {"alpha": 1.7}, "alpha only applies to silu"),
        ({"gate": "none"}, {"up_offset": 1.0}, "up_offset needs a gated up projection"),
        ({}, {"limit": -1.0}, "limit must be positive"),
    ],
)
def test_options_that_mean_nothing(changes, options, message):
    case = draw(7, torch.float32, **changes)
    with pytest.raises(ValueError, match=message):
        moe_experts(*case.arguments(), **options)
