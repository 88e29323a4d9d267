"""The kernels on packed weights under Triton's interpreter, buffers of NaN, against fp64."""

from __future__ import annotations

import itertools
import math
import os
from typing import Any

import pytest
import torch
from kernels.interpreted import Interpreted
from torch import Tensor

from inductor_moe.ops import quant_cuda, quant_gemm_cuda
from inductor_moe.quant.fit import Packed, Scheme, quantize_weight
from inductor_moe.quant_tiles import PartsTile, QuantizedPlan, VectorTile
from inductor_moe.reference.moe import (
    moe_down_combine_reference,
    moe_experts_reference,
    moe_up_reference,
)
from inductor_moe.reference.quant import dequantize_reference
from inductor_moe.testing import relative_error
from inductor_moe.tiles import GemmTile

EXPERTS, TOP_K = 5, 3
LIMIT = 3e-3
PLANS = {
    "parts-8": QuantizedPlan(0, PartsTile(16, 64, 8, 4, 2), PartsTile(16, 64, 8, 4, 2)),
    "parts-2": QuantizedPlan(0, PartsTile(32, 128, 2, 4, 2), PartsTile(8, 64, 2, 4, 2)),
    "gemm": QuantizedPlan(16, GemmTile(32, 64, 2, 4, 2), GemmTile(16, 128, 2, 4, 2)),
}
SCHEMES = {
    "int4 g128": Scheme(4, 128, True, "rtn"),
    "int4 g256": Scheme(4, 256, True, "rtn"),
    "int4 g128 zeros": Scheme(4, 128, False, "rtn"),
    "int4 g64 zeros": Scheme(4, 64, False, "rtn"),
    "int4 g32": Scheme(4, 32, True, "rtn"),
    "int4 g16 zeros": Scheme(4, 16, False, "rtn"),
    "int4 row zeros": Scheme(4, 0, False, "rtn"),
    "int8": Scheme(8, 0, True, "rtn"),
    "int8 g64 zeros": Scheme(8, 64, False, "rtn"),
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
        floats = tensor.is_floating_point()
        return tensor.fill_(math.nan if floats else torch.iinfo(tensor.dtype).max)

    monkeypatch.setattr(quant_cuda.torch, "empty", poisoned)


def packed(shape: tuple[int, ...], scheme: Scheme, dtype: torch.dtype) -> Packed:
    weight = quantize_weight((torch.randn(shape) / shape[-1] ** 0.5).to(dtype), scheme)
    if weight.zeros is not None:
        weight.zeros.add_(torch.rand_like(weight.zeros))  # HQQ's are no integers
    return Packed(weight.packed, *(before_nan(x) for x in (weight.scales, weight.zeros)))


def before_nan(tensor: Tensor | None) -> Tensor | None:
    """The tensor in memory that goes on with NaN, which no kernel may read."""
    if tensor is None:
        return None
    held = torch.full((tensor.numel() + 64,), math.nan, dtype=tensor.dtype)
    return held[: tensor.numel()].view(tensor.shape).copy_(tensor)


def cases(*quick: tuple[str, ...], **every: Any) -> list[Any]:
    """Every combination, all but the quick ones marked slow."""
    return [
        pytest.param(*case, marks=[] if case in quick else pytest.mark.slow)
        for case in itertools.product(*every.values())
    ]


def exact(weight: Packed, scheme: Scheme, inputs: int) -> Tensor:
    zeros = None if weight.zeros is None else weight.zeros.double()
    return dequantize_reference(
        weight.packed, weight.scales.double(), zeros, scheme.group_size, inputs
    )


def arguments(weight: Packed, scheme: Scheme) -> tuple[Any, ...]:
    return weight.packed, weight.scales, weight.zeros, scheme.group_size


@pytest.mark.parametrize(
    ("plan", "scheme"),
    cases(
        ("parts-8", "int4 g128"),
        ("parts-8", "int8"),
        ("parts-8", "int4 row zeros"),
        ("parts-2", "int4 g32"),
        ("parts-2", "int4 g64 zeros"),
        ("gemm", "int4 g128"),
        ("gemm", "int4 g16 zeros"),
        ("gemm", "int8 g64 zeros"),
        plan=PLANS,
        scheme=SCHEMES,
    ),
)
def test_linear(plan, scheme):
    kind = SCHEMES[scheme]
    dtype = torch.float16 if plan == "parts-2" else torch.bfloat16
    tokens = 19 if plan == "gemm" else 2
    inputs, outputs = (256, 64) if scheme in ("int4 g128", "int8") else (200, 41)
    weight, bias = packed((outputs, inputs), kind, dtype), torch.randn(outputs).to(dtype)
    x = torch.randn(tokens, inputs).to(dtype)
    found = quant_cuda.quantized_linear_cuda(
        x, *arguments(weight, kind)[:3], bias, kind.group_size,
        plan=PLANS[plan], wrap=Interpreted,
    )  # fmt: skip
    reference = x.double() @ exact(weight, kind, inputs).T + bias.double()
    assert found.dtype == dtype
    assert relative_error(found, reference) <= LIMIT


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_weight_of_16_bits(scheme, dtype):
    kind, inputs = SCHEMES[scheme], 200
    held = packed((41, inputs), kind, dtype)
    weight = quant_cuda._Weight.of(*arguments(held, kind), inputs)
    found = quant_gemm_cuda.widened(weight, dtype, Interpreted)
    assert found.dtype == dtype and found.shape == (41, inputs)
    reference = exact(held, kind, inputs)
    rounding = relative_error(reference.to(dtype), reference)
    assert relative_error(found, reference) <= rounding * 1.01


def product(x, weight, kind, bias, plan):
    """The layer's output, which has little but the rounding that one large output has."""
    found = quant_cuda.quantized_linear_cuda(
        x, *arguments(weight, kind)[:3], bias, kind.group_size, plan=plan, wrap=Interpreted
    )
    reference = x.double() @ exact(weight, kind, x.shape[1]).T
    reference += 0.0 if bias is None else bias.double()
    assert found.dtype == x.dtype
    rounding = relative_error(reference.to(x.dtype), reference)
    assert relative_error(found, reference) <= rounding + LIMIT / 10
    return found


@pytest.mark.parametrize(
    ("tile", "scheme", "shape", "dtype"),
    [
        (VectorTile(3, 2, 1), "int4 g128", (41, 2048), torch.bfloat16),
        (VectorTile(2, 2, 2), "int4 g64 zeros", (13, 1024), torch.float16),
        (VectorTile(1, 1, 2), "int4 g128", (8, 4096), torch.float16),
        (VectorTile(2, 1, 4), "int4 g128 zeros", (19, 4096), torch.bfloat16),
        (VectorTile(2, 1, 1), "int4 g256", (7, 512), torch.bfloat16),
    ],
)
@pytest.mark.parametrize("far", [False, True])
def test_one_row_without_tensor_cores(tile, scheme, shape, dtype, far):
    kind = SCHEMES[scheme]
    weight, bias = packed(shape, kind, dtype), torch.randn(shape[0]).to(dtype)
    x = (torch.randn(1, shape[1]) + 16 * far).to(dtype)
    if far:
        x[0, 3] = 1000.0
        weight.packed[0], weight.packed[1] = -1, 0  # all codes 15, all codes 0
    plan = QuantizedPlan(0, tile, PLANS["parts-8"].down)
    for own in (bias, None):
        product(x, weight, kind, own, plan)


def test_one_row_without_tensor_cores_refuses_what_it_cannot_read():
    kind = SCHEMES["int4 g32"]
    weight = packed((8, 1024), kind, torch.bfloat16)
    plan = QuantizedPlan(0, VectorTile(1, 1, 1), PLANS["parts-8"].down)
    with pytest.raises(ValueError, match=r"groups of 64, .*group_size=32"):
        quant_cuda.quantized_linear_cuda(
            torch.randn(1, 1024).bfloat16(), *arguments(weight, kind)[:3], None, 32, plan=plan,
            wrap=Interpreted,
        )  # fmt: skip


@pytest.mark.parametrize(
    ("block_m", "tile", "scheme", "shape", "tokens", "dtype"),
    [
        (8, GemmTile(16, 128, 8, 4, 3, parts=4), "int4 g128", (41, 512), 5, torch.bfloat16),
        (16, GemmTile(32, 128, 8, 2, 3, parts=2), "int4 g256", (32, 1024), 16, torch.float16),
        (8, GemmTile(16, 128, 8, 8, 3, parts=8), "int4 g128 zeros", (9, 1000), 11, torch.bfloat16),
        (16, GemmTile(16, 64, 8, 4, 3, parts=4), "int4 g64 zeros", (19, 200), 19, torch.float16),
        (8, GemmTile(16, 64, 8, 2, 3, parts=2), "int4 g32", (7, 192), 2, torch.bfloat16),
        (16, GemmTile(16, 64, 8, 2, 3, parts=2), "int4 g16 zeros", (20, 72), 9, torch.bfloat16),
        (8, GemmTile(16, 128, 8, 4, 3, parts=4), "int4 row zeros", (40, 700), 3, torch.bfloat16),
        (8, GemmTile(16, 64, 8, 4, 3, parts=4), "int8 g64 zeros", (17, 330), 4, torch.float16),
        (8, GemmTile(32, 64, 8, 4, 3), "int4 g128", (41, 512), 3, torch.bfloat16),
    ],
)
@pytest.mark.parametrize("far", [False, True])
def test_a_few_rows(block_m, tile, scheme, shape, tokens, dtype, far):
    """With slices of the inputs, some of which may lie past the end, and without."""
    kind = SCHEMES[scheme]
    weight, bias = packed(shape, kind, dtype), torch.randn(shape[0]).to(dtype)
    # Beside columns of NaN, which are no inputs.
    x = torch.full((tokens, shape[1] + 64), math.nan, dtype=dtype)[:, : shape[1]]
    x.copy_(torch.randn(x.shape) + 16 * far)
    x[tokens // 2] = 0.0
    if far:
        x[0, 3] = 1000.0
        weight.packed[0], weight.packed[1] = -1, 0  # all codes 15, all codes 0
    plan = QuantizedPlan(block_m, tile, tile)
    for own in (bias, None):
        found = product(x, weight, kind, own, plan)
    assert not found[tokens // 2].any()


@pytest.mark.parametrize("plan", PLANS)
def test_zero_points_finer_than_the_scales(plan):
    """fp32 beside bf16, as weights that were quantised elsewhere may need them."""
    kind = SCHEMES["int4 g64 zeros"]
    weight = packed((41, 200), kind, torch.bfloat16)
    fine = weight.zeros.float() + torch.rand(weight.zeros.shape) / 64
    weight = Packed(weight.packed, weight.scales, fine)
    # A sum of inputs far from zero shows what a zero point loses.
    x = (torch.randn(19 if plan == "gemm" else 2, 200) + 16).bfloat16()
    found = quant_cuda.quantized_linear_cuda(
        x, *arguments(weight, kind)[:3], None, kind.group_size,
        plan=PLANS[plan], wrap=Interpreted,
    )  # fmt: skip
    reference = x.double() @ exact(weight, kind, 200).T
    assert relative_error(found, reference) <= LIMIT
    rounded = Packed(weight.packed, weight.scales, fine.bfloat16())
    assert relative_error(x.double() @ exact(rounded, kind, 200).T, reference) > 2 * LIMIT


@pytest.mark.parametrize(
    ("plan", "scheme", "gate"),
    cases(
        ("parts-8", "int4 g128", "chunked"),
        ("parts-2", "int4 g32", "none"),
        ("gemm", "int4 g64 zeros", "interleaved"),
        ("gemm", "int8", "chunked"),
        plan=PLANS,
        scheme=("int4 g128", "int4 g32", "int4 g64 zeros", "int8"),
        gate=("chunked", "interleaved", "none"),
    ),
)
def test_experts(plan, scheme, gate):
    kind = SCHEMES[scheme]
    tokens, hidden, inner = (5, 72, 40) if gate != "chunked" else (3, 128, 64)
    rows = inner if gate == "none" else 2 * inner
    up = packed((EXPERTS, rows, hidden), kind, torch.bfloat16)
    down = packed((EXPERTS, hidden, inner), kind, torch.bfloat16)
    x = torch.randn(tokens, hidden).bfloat16()
    ids = torch.randint(-1, EXPERTS + 2, (tokens, TOP_K))
    ids[0, 0] = EXPERTS - 1
    weights = torch.rand(tokens, TOP_K).bfloat16()
    biases = (torch.randn(EXPERTS, rows).bfloat16(), torch.randn(EXPERTS, hidden).bfloat16())
    if gate == "chunked":
        biases = (None, None)
    options = {"alpha": 1.5, "limit": 2.0, "up_offset": 1.0} if gate == "interleaved" else {}
    found = quant_cuda.moe_experts_quantized_cuda(
        x, *arguments(up, kind), *arguments(down, kind), inner, ids, weights, *biases,
        "silu", gate, **options, plan=PLANS[plan], wrap=Interpreted,
    )  # fmt: skip
    wide = [b if b is None else b.double() for b in biases]
    reference = moe_experts_reference(
        x.double(), exact(up, kind, hidden), exact(down, kind, inner), ids, weights.double(),
        *wide, "silu", gate, **options,
    )  # fmt: skip
    # Four roundings to bf16, one of which is unpacked weights' own.
    assert relative_error(found, reference) <= 1.7 * LIMIT


@pytest.mark.parametrize("plan", ["parts-8", "gemm"])
def test_halves_and_skipped_pairs(plan):
    kind = SCHEMES["int4 g64 zeros"]
    up = packed((EXPERTS, 48, 72), kind, torch.bfloat16)
    x, ids = torch.randn(4, 72).bfloat16(), torch.randint(-1, EXPERTS + 2, (4, TOP_K))
    ids[0] = torch.tensor([-1, EXPERTS, 2])
    rows = quant_cuda.moe_up_quantized_cuda(
        x, *arguments(up, kind), ids, plan=PLANS[plan], wrap=Interpreted
    )
    reference = moe_up_reference(x.double(), exact(up, kind, 72), ids)
    assert relative_error(rows, reference) <= LIMIT
    assert not rows[:2].any()
    down = packed((EXPERTS, 72, 48), kind, torch.bfloat16)
    h = rows.clone()
    h[:2] = math.nan  # rows of skipped pairs hold anything
    found = quant_cuda.moe_down_combine_quantized_cuda(
        h, *arguments(down, kind), ids, None, plan=PLANS[plan], wrap=Interpreted
    )
    reference = moe_down_combine_reference(rows.double(), exact(down, kind, 48), ids)
    assert relative_error(found, reference) <= LIMIT


def with_extreme_codes(weight: Packed) -> Packed:
    """Every nibble 0 or 15."""
    ends = torch.randint(0, 2, (*weight.packed.shape, 4)) * 15
    words = (ends << torch.arange(0, 16, 4)).sum(-1).to(torch.int16)
    return Packed(words, weight.scales, weight.zeros)


ADVERSARIAL = {
    "large mean": lambda x: x + 100.0,
    "one huge channel": lambda x: x * torch.where(torch.arange(x.shape[1]) == 37, 1e4, 1.0),
    "tiny": lambda x: x * 1e-6,
}


@pytest.mark.parametrize(
    ("plan", "inputs", "codes", "scheme"),
    cases(
        ("parts-8", "large mean", "extreme", "int4 g128"),
        ("parts-8", "one huge channel", "random", "int4 g64 zeros"),
        ("gemm", "large mean", "random", "int4 g64 zeros"),
        ("gemm", "one huge channel", "extreme", "int4 g128"),
        plan=PLANS,
        inputs=ADVERSARIAL,
        codes=("random", "extreme"),
        scheme=("int4 g128", "int4 g64 zeros"),
    ),
)
def test_adversarial_inputs(plan, inputs, codes, scheme):
    kind = SCHEMES[scheme]
    x = ADVERSARIAL[inputs](torch.randn(2, 256)).bfloat16()
    weight = packed((32, 256), kind, torch.bfloat16)
    if codes == "extreme":
        weight = with_extreme_codes(weight)
    found = quant_cuda.quantized_linear_cuda(
        x, *arguments(weight, kind)[:3], None, kind.group_size, plan=PLANS[plan], wrap=Interpreted
    )
    reference = x.double() @ exact(weight, kind, 256).T
    assert relative_error(found, reference) <= LIMIT


@pytest.mark.parametrize(
    ("plan", "inputs", "codes", "scheme"),
    cases(
        ("parts-8", "large mean", "extreme", "int4 g64 zeros"),
        ("parts-8", "one huge channel", "extreme", "int4 g128"),
        ("gemm", "large mean", "extreme", "int4 g128"),
        ("gemm", "one huge channel", "extreme", "int4 g64 zeros"),
        plan=PLANS,
        inputs=ADVERSARIAL,
        codes=("random", "extreme"),
        scheme=("int4 g128", "int4 g64 zeros"),
    ),
)
def test_adversarial_inputs_of_experts(plan, inputs, codes, scheme):
    kind, ids = SCHEMES[scheme], torch.randint(0, EXPERTS, (2, TOP_K))
    options = {"plan": PLANS[plan], "wrap": Interpreted}
    up, down = (packed((EXPERTS, 32, 256), kind, torch.bfloat16) for _ in range(2))
    if codes == "extreme":
        up, down = with_extreme_codes(up), with_extreme_codes(down)
    x = ADVERSARIAL[inputs](torch.randn(2, 256)).bfloat16()
    found = quant_cuda.moe_up_quantized_cuda(x, *arguments(up, kind), ids, **options)
    reference = moe_up_reference(x.double(), exact(up, kind, 256), ids)
    assert relative_error(found, reference) <= LIMIT
    h = ADVERSARIAL[inputs](torch.randn(2 * TOP_K, 256)).bfloat16()
    # One slot a token: a sum over slots may cancel, and then shows the rounding of its terms.
    ids, weights = ids.reshape(-1, 1), torch.rand(2 * TOP_K, 1).bfloat16()
    found = quant_cuda.moe_down_combine_quantized_cuda(
        h, *arguments(down, kind), ids, weights, **options
    )
    reference = moe_down_combine_reference(
        h.double(), exact(down, kind, 256), ids, weights.double()
    )
    assert relative_error(found, reference) <= LIMIT


def test_nothing_routed_and_no_tokens():
    kind = SCHEMES["int4 g128"]
    up, down = (packed(s, kind, torch.bfloat16) for s in ((EXPERTS, 64, 128), (EXPERTS, 128, 32)))
    x = torch.randn(2, 128).bfloat16()
    ids, weights = torch.full((2, TOP_K), EXPERTS), torch.full((2, TOP_K), math.nan)

    def run(plan: str, count: int = 2) -> Tensor:
        return quant_cuda.moe_experts_quantized_cuda(
            x[:count], *arguments(up, kind), *arguments(down, kind), 32, ids[:count],
            weights[:count], plan=PLANS[plan], wrap=Interpreted,
        )  # fmt: skip

    for plan in ("parts-8", "gemm"):
        assert torch.equal(run(plan), torch.zeros_like(x))
        assert run(plan, 0).shape == (0, 128)
