"""The W4A8 kernels under Triton's interpreter, buffers of NaN, against fp64 that rounds alike."""

from __future__ import annotations

import math

import pytest
import torch
from kernels.interpreted import Interpreted
from kernels.test_quant_kernels import (
    ADVERSARIAL,
    EXPERTS,
    LIMIT,
    TOP_K,
    _poisoned_buffers,  # noqa: F401
    _seed,  # noqa: F401
    arguments,
    cases,
    exact,
    packed,
    with_extreme_codes,
)
from torch import nn

from inductor_moe.ops import quant_cuda
from inductor_moe.ops.quant_gemm_cuda import quantize_activations
from inductor_moe.quant.fit import Scheme
from inductor_moe.quant_tiles import QuantizedPlan
from inductor_moe.reference.moe import (
    gated_activation,
    moe_down_combine_reference,
    moe_up_reference,
)
from inductor_moe.reference.quant import round_activations
from inductor_moe.testing import relative_error
from inductor_moe.tiles import GemmTile

PLAN = QuantizedPlan(16, GemmTile(32, 64, 2, 4, 2), GemmTile(16, 128, 2, 4, 2))
SCHEMES = {
    "g32": Scheme(4, 32, True, "rtn"),
    "g32 zeros": Scheme(4, 32, False, "rtn"),
    "g64": Scheme(4, 64, True, "rtn"),
    "g64 zeros": Scheme(4, 64, False, "rtn"),
    "g128": Scheme(4, 128, True, "rtn"),
    "g128 zeros": Scheme(4, 128, False, "rtn"),
}
INPUTS = {"random": lambda x: x, **ADVERSARIAL}


def linear(x, weight, kind, bias=None):
    return quant_cuda.quantized_linear_cuda(
        x, *arguments(weight, kind)[:3], bias, kind.group_size, True, plan=PLAN, wrap=Interpreted
    )


@pytest.mark.parametrize("group", [32, 64, 128])
def test_codes_are_those_of_the_reference(group):
    x = torch.randn(19, 200).bfloat16()
    x[3], x[5, 40], x[6, 70] = 0, 300, math.nan
    (codes, scales, sums), (width, groups) = quantize_activations(x, group, Interpreted)
    assert codes.shape == (19, width) and scales.shape == sums.shape == (19, groups)
    # A chunk holds codes 16 j + i of bytes 2 i + j // 2, lower nibbles before upper ones.
    place = torch.arange(width)
    byte = place % 32
    k = place // 64 * 64 + place % 64 // 32 * 16 + byte % 2 * 32 + byte // 2
    straight = torch.empty_like(codes)
    straight[:, k] = codes
    parts = straight.double().unflatten(1, (groups, group))
    values = (parts * scales.double()[..., None]).flatten(1)
    good = torch.arange(19) != 6
    # A value halfway between two codes may take either.
    halves = (0.5 + 1e-5) * scales.double().repeat_interleave(group, 1)[:, :200]
    assert ((values[:, :200] - x.double()).abs() <= halves)[good].all()
    largest = nn.functional.pad(x.double(), (0, width - 200)).unflatten(1, (groups, group))
    largest = largest.abs().amax(-1)
    torch.testing.assert_close(scales.double()[good], largest[good] / 127, rtol=1e-6, atol=0)
    assert not straight[good, 200:].any()
    assert torch.equal(parts.sum(-1)[good].float(), sums[good])
    assert scales[6].isnan().nonzero().tolist() == [[70 // group]]


@pytest.mark.parametrize(
    ("scheme", "inputs", "codes"),
    cases(
        ("g32", "random", "random"),
        ("g32 zeros", "large mean", "random"),
        ("g64", "one huge channel", "extreme"),
        ("g64 zeros", "random", "extreme"),
        ("g128", "large mean", "extreme"),
        ("g128 zeros", "one huge channel", "random"),
        scheme=SCHEMES,
        inputs=INPUTS,
        codes=("random", "extreme"),
    ),
)
@pytest.mark.parametrize("shape", [(32, 256), (41, 200)], ids=["even", "ragged"])
def test_linear(scheme, inputs, codes, shape):
    kind, (outputs, width) = SCHEMES[scheme], shape
    dtype = torch.float16 if codes == "extreme" and inputs == "random" else torch.bfloat16
    x = INPUTS[inputs](torch.randn(19, width)).to(dtype)
    weight, bias = packed(shape, kind, dtype), torch.randn(outputs).to(dtype)
    if codes == "extreme":
        weight = with_extreme_codes(weight)
    found = linear(x, weight, kind, bias)
    matrix = exact(weight, kind, width)
    reference = round_activations(x.double(), kind.group_size) @ matrix.T + bias.double()
    assert found.dtype == dtype
    assert relative_error(found, reference) <= LIMIT


@pytest.mark.parametrize(
    ("scheme", "gate"),
    cases(
        ("g32", "interleaved"),
        ("g64 zeros", "none"),
        ("g128", "chunked"),
        scheme=("g32", "g64 zeros", "g128"),
        gate=("chunked", "interleaved", "none"),
    ),
)
def test_experts(scheme, gate):
    kind = SCHEMES[scheme]
    tokens, hidden, inner = (9, 72, 40) if gate != "chunked" else (6, 128, 64)
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
    found = quant_cuda.moe_experts_quantized_cuda(
        x, *arguments(up, kind), *arguments(down, kind), inner, ids, weights, *biases,
        "silu", gate, int8_activations=True, plan=PLAN, wrap=Interpreted,
    )  # fmt: skip
    wide = [b if b is None else b.double() for b in biases]
    group = kind.group_size
    hidden_rows = moe_up_reference(
        round_activations(x.double(), group), exact(up, kind, hidden), ids, wide[0]
    )
    # The kernels round h to bf16 from fp32: the same but for a few halfway cases.
    h = gated_activation(hidden_rows, "silu", gate).bfloat16()
    reference = moe_down_combine_reference(
        round_activations(h.double(), group), exact(down, kind, inner), ids, weights.double(),
        wide[1],
    )  # fmt: skip
    assert relative_error(found, reference) <= 1.7 * LIMIT


def test_halves_and_skipped_pairs():
    kind = SCHEMES["g32"]
    up = packed((EXPERTS, 48, 72), kind, torch.bfloat16)
    x, ids = torch.randn(4, 72).bfloat16(), torch.randint(-1, EXPERTS + 2, (4, TOP_K))
    ids[0] = torch.tensor([-1, EXPERTS, 2])
    options = {"int8_activations": True, "plan": PLAN, "wrap": Interpreted}
    rows = quant_cuda.moe_up_quantized_cuda(x, *arguments(up, kind), ids, **options)
    reference = moe_up_reference(round_activations(x.double(), 32), exact(up, kind, 72), ids)
    assert relative_error(rows, reference) <= LIMIT
    assert not rows[:2].any()
    down = packed((EXPERTS, 72, 48), kind, torch.bfloat16)
    h = rows.clone()
    h[:2] = math.nan  # rows of skipped pairs hold anything
    found = quant_cuda.moe_down_combine_quantized_cuda(
        h, *arguments(down, kind), ids, None, **options
    )
    reference = moe_down_combine_reference(
        round_activations(rows.double(), 32), exact(down, kind, 48), ids
    )
    assert relative_error(found, reference) <= LIMIT


def test_a_nan_reaches_the_output_of_its_row():
    kind = SCHEMES["g64"]
    x = torch.randn(19, 128).bfloat16()
    x[2, 100], x[4, 3] = math.nan, math.inf
    found = linear(x, packed((32, 128), kind, torch.bfloat16), kind)
    assert not found[[2, 4]].isfinite().any()
    assert found[torch.tensor([0, 1, 3])].isfinite().all()
