"""The op of routed and shared experts on CPU: against its definition in fp64."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from inductor_moe.ops.moe import moe_experts
from inductor_moe.ops.shared import moe_experts_shared, moe_experts_shared_plain
from inductor_moe.quant.fit import Scheme, quantize_weight
from inductor_moe.reference.quant import dequantize_reference
from inductor_moe.testing import relative_error

TOKENS, HIDDEN, INNER, SHARED, EXPERTS, TOP_K = 4, 40, 24, 56, 5, 3
INT4 = Scheme(4, 32, False, "rtn")
IMPLEMENTATIONS = [moe_experts_shared, moe_experts_shared_plain]


@pytest.fixture(autouse=True)
def _seed() -> None:
    seed = int(os.environ.get("TEST_SEED", int.from_bytes(os.urandom(4), "little")))
    print(f"TEST_SEED={seed}")
    torch.manual_seed(seed)


def draw(dtype: torch.dtype, gate: str = "chunked", scheme: Scheme | None = None) -> list[Any]:
    halves = 1 if gate == "none" else 2

    def weight(*shape: int) -> list[Tensor | None]:
        value = (torch.randn(shape) / shape[-1] ** 0.5).to(dtype)
        if scheme is None:
            return [value, None, None]
        packed = quantize_weight(value, scheme)
        return [packed.packed, packed.scales, packed.zeros]

    ids = torch.randint(-1, EXPERTS + 1, (TOKENS, TOP_K))
    own_gate = [None] * 3 if gate == "none" else weight(SHARED, HIDDEN)
    return [
        torch.randn(TOKENS, HIDDEN).to(dtype),
        ids,
        torch.rand(TOKENS, TOP_K).to(dtype),
        torch.randn(TOKENS, 1).to(dtype),
        [*weight(EXPERTS, halves * INNER, HIDDEN), *weight(EXPERTS, HIDDEN, INNER)],
        [*own_gate, *weight(SHARED, HIDDEN), *weight(HIDDEN, SHARED)],
        0 if scheme is None else scheme.group_size,
        "silu",
        gate,
    ]


def by_definition(arguments: list[Any], alpha: float = 1.0, **rest: Any) -> Tensor:
    """The op's docstring in fp64, the routed part by its own op."""
    x, ids, weights, logits, routed, shared, group_size, activation, gate = arguments
    inputs = [HIDDEN, INNER, HIDDEN, HIDDEN, SHARED]
    dense: list[Any] = []
    for place, (values, scales, zeros) in enumerate(
        zip(*[iter([*routed, *shared])] * 3, strict=True)
    ):
        if scales is not None:
            zeros = None if zeros is None else zeros.double()
            values = dequantize_reference(
                values, scales.double(), zeros, group_size, inputs[place]
            )
        dense.append(None if values is None else values.double())
    x, limit, offset = x.double(), rest.get("limit"), rest.get("up_offset", 0.0)
    y = moe_experts(
        x, dense[0], dense[1], ids, weights.double(), None, None, activation, gate, alpha,
        offset, limit,
    )  # fmt: skip
    if dense[2] is None:
        h = F.silu(x @ dense[3].T)
    else:
        first, second = x @ dense[2].T, x @ dense[3].T
        if limit is not None:
            first, second = first.clamp(max=limit), second.clamp(-limit, limit)
        h = first * torch.sigmoid(alpha * first) * (second + offset)
    factor = 1.0 if logits is None else torch.sigmoid(logits.double())
    return y + factor * (h @ dense[4].T)


@pytest.mark.parametrize("gate", ["none", "chunked", "interleaved"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_definition(implementation, gate):
    arguments = draw(torch.float64, gate)
    assert relative_error(implementation(*arguments), by_definition(arguments)) < 1e-14
    arguments[3] = None
    assert relative_error(implementation(*arguments), by_definition(arguments)) < 1e-14


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_clamped_swiglu_and_packed_weights(implementation):
    options = {"alpha": 1.702, "up_offset": 1.0, "limit": 0.7}
    arguments = draw(torch.float64)
    found = implementation(*arguments, **options)
    assert relative_error(found, by_definition(arguments, **options)) < 1e-14
    for dtype, bound in ((torch.float32, 1e-6), (torch.bfloat16, 1.2e-2)):
        arguments = draw(dtype, scheme=INT4)
        found = implementation(*arguments, **options, out_dtype=torch.float32)
        assert found.dtype == torch.float32
        assert relative_error(found, by_definition(arguments, **options)) < bound


def test_the_cpu_implementation_compiles():
    arguments = draw(torch.bfloat16)
    compiled = torch.compile(moe_experts_shared_plain, fullgraph=True)
    assert relative_error(compiled(*arguments), by_definition(arguments)) < 1e-2


def test_opcheck():
    torch.library.opcheck(moe_experts_shared, draw(torch.float32))
    packed = draw(torch.bfloat16, "none", INT4)
    packed[3] = None
    torch.library.opcheck(moe_experts_shared, packed, {"out_dtype": torch.float32})


def test_no_tokens():
    arguments = [v[:0] if isinstance(v, Tensor) else v for v in draw(torch.float32)]
    assert moe_experts_shared(*arguments).shape == (0, HIDDEN)


def replaced(place: int, index: int | None, value: Any) -> list[Any]:
    arguments = draw(torch.float32)
    if index is None:
        arguments[place] = value
    else:
        arguments[place][index] = value
    return arguments


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ((5, 0, None), ValueError, "gate 'chunked' does not go with v_gate None"),
        ((8, None, "none"), ValueError, "gate 'none' does not go with v_gate of shape [56, 40]"),
        ((4, None, []), ValueError, "routed has 0 tensors; it must have 6"),
        ((5, 3, torch.zeros(55, 40)), ValueError, "v_gate has shape [56, 40]; it must be [55,"),
        ((5, 6, torch.zeros(56, 40)), ValueError, "v_down has shape [56, 40]; it must be [40,"),
        ((5, 3, torch.zeros(56, 40).half()), TypeError, "v_up has dtype float16"),
        ((5, 4, torch.zeros(56, 2)), ValueError, "v_up must be packed as w_up is"),
        ((3, None, torch.zeros(3, 1)), ValueError, "logits has shape [3, 1]; it must be [T, 1]"),
        ((3, None, torch.zeros(4, 1).long()), TypeError, "logits has dtype int64"),
        ((1, None, torch.zeros(4, 3)), TypeError, "ids has dtype float32"),
    ],
)  # fmt: skip
def test_bad_input_is_named(change, kind, message):
    with pytest.raises(kind) as raised:
        moe_experts_shared(*replaced(*change))
    assert message in str(raised.value)
