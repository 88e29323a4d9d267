"""Packing and fitting: what the codes stand for, and how near it is to the weight."""

from __future__ import annotations

import pytest
import torch

from inductor_moe.quant.fit import Scheme, quantize_weight
from inductor_moe.reference.quant import dequantize_reference, pack_int4, unpack_int4
from inductor_moe.testing import relative_error

SCHEMES = [
    Scheme(bits, group, symmetric, method)
    for bits, groups in ((4, (16, 32, 64, 128, 0)), (8, (0, 64)))
    for group in groups
    for symmetric in (True, False)
    for method in ("rtn", "hqq")
]
WEIGHTS = {
    "normal": lambda g: torch.randn(24, 256, generator=g) * 0.02,
    "heavy tails": lambda g: torch.randn(24, 256, generator=g) ** 5,
    "large mean": lambda g: torch.randn(24, 256, generator=g) * 0.02 + 0.5,
    "one huge channel": lambda g: (
        torch.randn(24, 256, generator=g) * torch.where(torch.arange(256) == 37, 2.0, 0.02)
    ),
}


def draw(kind: str, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> torch.Tensor:
    return WEIGHTS[kind](torch.Generator().manual_seed(seed)).to(dtype)


def back(weight: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    packed = quantize_weight(weight, scheme)
    return dequantize_reference(
        packed.packed, packed.scales, packed.zeros, scheme.group_size, weight.shape[-1]
    )


@pytest.mark.parametrize("width", [1, 16, 63, 64, 200, 2880])
def test_codes_survive_packing(width):
    codes = torch.randint(0, 16, (3, 5, width))
    packed = pack_int4(codes)
    assert packed.dtype == torch.int16 and packed.shape == (3, 5, -(-width // 64) * 16)
    assert torch.equal(unpack_int4(packed, width).long(), codes)


def test_layout_of_a_chunk():
    """Nibble j of word i is code 16 j + i: the kernels and saved files rely on it."""
    words = pack_int4(torch.arange(64)[None] // 4).int() & 0xFFFF
    for i in range(16):
        expected = sum(((16 * j + i) // 4) << (4 * j) for j in range(4))
        assert words[0, i] == expected


@pytest.mark.parametrize("scheme", SCHEMES, ids=Scheme.describe)
def test_error_of_each_weight_is_half_a_step(scheme):
    """Without outliers no weight is off by more than half a step and what clipping costs."""
    weight = draw("normal", torch.float32)
    group = scheme.group_size or weight.shape[-1]
    grouped = weight.unflatten(-1, (-1, group))
    low, high = grouped.amin(-1), grouped.amax(-1)
    spread = 2 * torch.maximum(-low, high) if scheme.symmetric else high - low
    error = (back(weight, scheme) - weight).unflatten(-1, (-1, group)).abs().amax(-1)
    steps = 2**scheme.bits - 1
    # HQQ gives up the extremes for the rest; a symmetric code lacks one level on one side.
    slack = 4 if scheme.method == "hqq" else 2.1 if scheme.symmetric else 1.05
    assert (error <= slack * spread / steps / 2 + 1e-6).all()


@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.parametrize("symmetric", [True, False])
def test_hqq_is_no_worse_than_rtn(kind, symmetric):
    weight = draw(kind)
    rtn, hqq = (
        back(weight, Scheme(4, 64, symmetric, method)).double() - weight
        for method in ("rtn", "hqq")
    )
    errors = hqq.abs().pow(0.7).mean(), rtn.abs().pow(0.7).mean()
    assert errors[0] <= errors[1]


@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_at_least_as_accurate_as_the_hqq_package(kind, group, dtype):
    quantizer = pytest.importorskip("hqq.core.quantize").Quantizer
    weight = draw(kind, dtype)
    codes, meta = quantizer.quantize(
        weight.clone(), nbits=4, channel_wise=True, group_size=group, optimize=True, axis=1,
        device="cpu", compute_dtype=dtype,
    )  # fmt: skip
    meta |= {key: meta[key].to(dtype) for key in ("scale", "zero")}
    theirs = quantizer.dequantize(codes, meta).double() - weight
    ours = back(weight, Scheme(4, group, False, "hqq")).double() - weight
    errors = ours.abs().pow(0.7).mean(), theirs.abs().pow(0.7).mean()
    print(
        f"{kind}, groups of {group}, {dtype}: mean |error| ** 0.7 {errors[0]:.3e}, hqq "
        f"{errors[1]:.3e}; norm {ours.norm():.3e}, hqq {theirs.norm():.3e}"
    )
    assert errors[0] <= errors[1]
    assert ours.norm() <= 1.01 * theirs.norm()


@pytest.mark.parametrize("width", [24, 100, 200])
@pytest.mark.parametrize("symmetric", [True, False])
def test_a_short_last_group_is_as_good_as_a_whole_one(width, symmetric):
    weight = torch.randn(64, width)
    for method in ("rtn", "hqq"):
        assert relative_error(back(weight, Scheme(4, 64, symmetric, method)), weight) < 0.13


def test_constant_and_zero_groups_are_exact():
    weight = torch.zeros(4, 128)
    weight[1] = 0.5
    weight[2] = -3.0
    for method in ("rtn", "hqq"):
        found = back(weight, Scheme(4, 64, True, method))
        assert found.isfinite().all()
        torch.testing.assert_close(found, weight, rtol=1e-2, atol=0)


def test_strided_weights_are_packed_as_what_they_hold():
    weight = torch.randn(3, 128, 40).transpose(1, 2)
    scheme = Scheme(4, 32, True, "rtn")
    assert torch.equal(back(weight, scheme), back(weight.contiguous(), scheme))


def test_blocks_do_not_change_the_result(monkeypatch):
    weight, scheme = torch.randn(7, 16, 96), Scheme(4, 32, False, "rtn")
    whole = back(weight, scheme)
    monkeypatch.setattr("inductor_moe.quant.fit.BLOCK", 16 * 96 * 2)
    assert torch.equal(back(weight, scheme), whole)
