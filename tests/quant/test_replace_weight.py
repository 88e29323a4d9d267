"""replace_weight and unpack_codes: integer codes of any origin become packed weights."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import inductor_moe
from inductor_moe.errors import QuantizationError
from inductor_moe.testing import capture, fused_layers, relative_error

BF16 = torch.bfloat16


def random(*shape, bits=4, group=32, dtype=BF16, zeros="none", seed=0):
    """Codes, scales and zero points (none, of the dtype's own values, or any fp32)."""
    generator = torch.Generator().manual_seed(seed)
    low, high = (0, 16) if bits == 4 else (-128, 128)
    codes = torch.randint(low, high, shape, generator=generator)
    groups = (*shape[:-1], -(-shape[-1] // group) if group else 1)
    scales = (torch.rand(groups, generator=generator) / 50 + 1e-3).to(dtype)
    if zeros == "none":
        return codes, scales, None
    if zeros == "whole":
        return codes, scales, torch.randint(low, high, groups, generator=generator)
    return codes, scales, 9 * torch.rand(groups, generator=generator)


def exact(codes, scales, zeros, group, bits=4):
    """The weight in fp64, by the definition."""
    inputs = codes.shape[-1]
    if zeros is None:
        zeros = torch.full_like(scales, 8 if bits == 4 else 0)
    scales, zeros = (
        value.double().repeat_interleave(group or inputs, -1)[..., :inputs]
        for value in (scales, zeros)
    )
    return (codes.double() - zeros) * scales


def assert_rounded_once(value, weight):
    limit = weight.abs() * torch.finfo(value.dtype).eps / 2 + 2.0**-22 * weight.abs().max()
    assert ((value.double() - weight).abs() <= limit).all()


@pytest.mark.parametrize("zeros", ["none", "whole", "any"])
@pytest.mark.parametrize("bits, group", [(4, 32), (4, 128), (4, 0), (8, 64), (8, 0)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_weight_is_what_the_codes_say(bits, group, zeros, dtype):
    codes, scales, points = random(37, 200, bits=bits, group=group, dtype=dtype, zeros=zeros)
    linear = nn.Linear(200, 37, device="meta", bias=False)
    inductor_moe.replace_weight(
        linear, "weight", codes, scales, points, bits=bits, group_size=group
    )
    weight = exact(codes, scales, points, group, bits)
    assert linear.weight.dtype == dtype and not linear.weight_packed.is_meta
    assert_rounded_once(linear.weight, weight)
    # Zero points that bf16 would round stay as they are.
    if points is not None:
        assert torch.equal(linear.weight_zeros.double(), points.double())


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int64])
def test_codes_of_any_integer_dtype(dtype):
    codes, scales, _ = random(16, 64)
    module = nn.Module()
    inductor_moe.replace_weight(module, "kernel", codes.to(dtype), scales, group_size=32)
    assert_rounded_once(module.kernel, exact(codes, scales, None, 32))
    assert set(module.state_dict()) == {"kernel_packed", "kernel_scales"}


def test_the_callers_tensors_are_copied():
    codes, scales, zeros = random(16, 64, zeros="any", dtype=torch.float32)
    module = nn.Module()
    inductor_moe.replace_weight(module, "kernel", codes, scales, zeros, group_size=32)
    before = module.kernel.clone()
    for tensor in (codes, scales, zeros):
        tensor.zero_()
    assert torch.equal(module.kernel, before)


def test_a_buffer_and_an_attribute_are_replaced():
    codes, scales, _ = random(16, 64)
    module = nn.Module()
    module.register_buffer("one", torch.zeros(3), persistent=False)
    module.two = torch.zeros(3)
    for name in ("one", "two"):
        inductor_moe.replace_weight(module, name, codes, scales, group_size=32)
    assert torch.equal(module.one, module.two) and module.one.shape == (16, 64)


@pytest.mark.parametrize("first", ["low", "high"])
@pytest.mark.parametrize("dtype, each", [(torch.uint8, 2), (torch.int8, 2), (torch.int32, 8)])
def test_codes_are_unpacked(dtype, each, first):
    codes = torch.randint(0, 16, (3, 5, 8 * each), generator=torch.Generator().manual_seed(each))
    expected = codes.unflatten(-1, (-1, each)).tolist()
    words = torch.empty(3, 5, 8, dtype=torch.int64)
    for row, column, word in torch.cartesian_prod(*map(torch.arange, (3, 5, 8))).tolist():
        parts = expected[row][column][word]
        digits = parts[::-1] if first == "low" else parts
        words[row, column, word] = int("".join(f"{code:x}" for code in digits), 16)
    bits = 4 * each
    words = (
        torch.where(words >= 2 ** (bits - 1), words - 2**bits, words)
        if dtype != torch.uint8
        else words
    )
    found = inductor_moe.unpack_codes(words.to(dtype), first=first)
    assert found.dtype == torch.uint8 and torch.equal(found.long(), codes)


def words_along(codes, order):
    """[R, C] codes -> [R, C / 8] int32; nibble i of a word is its code order[i]."""
    words = sum(codes[:, place::8] << 4 * nibble for nibble, place in enumerate(order))
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def test_checkpoints_of_gptq_are_read():
    """As GPTQ stores them: inputs in words, output zero points in words, one less."""
    codes, scales, zeros = random(32, 128, zeros="whole")
    zeros = zeros.clamp(min=1)
    straight = range(8)
    qweight = words_along(codes, straight).mT.contiguous()  # [K / 8, N]
    qzeros = words_along(zeros.mT - 1, straight)  # [G, N / 8]
    module = nn.Linear(128, 32, bias=False, device="meta")
    inductor_moe.replace_weight(
        module, "weight", inductor_moe.unpack_codes(qweight.mT), scales,
        inductor_moe.unpack_codes(qzeros).mT + 1, group_size=32,
    )  # fmt: skip
    assert_rounded_once(module.weight, exact(codes, scales, zeros, 32))


def test_checkpoints_of_awq_are_read():
    """As AWQ stores them: outputs in words, the even ones of eight first."""
    codes, scales, zeros = random(32, 128, zeros="whole")
    interleaved = (0, 2, 4, 6, 1, 3, 5, 7)
    qweight, qzeros = (words_along(t.mT, interleaved) for t in (codes, zeros))  # [K, N / 8]
    order = torch.arange(32).view(-1, 8)[:, [0, 4, 1, 5, 2, 6, 3, 7]].flatten()
    module = nn.Linear(128, 32, bias=False, device="meta")
    inductor_moe.replace_weight(
        module, "weight", inductor_moe.unpack_codes(qweight)[:, order].mT, scales,
        inductor_moe.unpack_codes(qzeros)[:, order].mT, group_size=32,
    )  # fmt: skip
    assert_rounded_once(module.weight, exact(codes, scales, zeros, 32))


class HandWritten(nn.Module):
    """A linear layer that dequantises in its forward, as a model's own code may."""

    def __init__(self, codes, scales, zeros, group):
        super().__init__()
        self.group = group
        self.register_buffer("words", (codes[:, ::2] | codes[:, 1::2] << 4).to(torch.uint8))
        self.register_buffer("scales", scales)
        self.register_buffer("zeros", zeros.to(scales.dtype))

    def forward(self, x):
        codes = torch.stack([self.words & 15, self.words >> 4], -1).flatten(-2)
        groups = codes.to(x.dtype).unflatten(-1, (-1, self.group))
        weight = (groups - self.zeros[..., None]) * self.scales[..., None]
        return F.linear(x, weight.flatten(-2))


def test_a_hand_written_layer_becomes_a_packed_one():
    codes, scales, zeros = random(48, 128, zeros="whole")
    model = nn.Sequential(HandWritten(codes, scales, zeros, 32))
    x = torch.randn(5, 128).to(BF16)
    weight = exact(codes, scales, zeros, 32)
    eager = model(x)
    found, report = capture(model, x)
    assert torch.equal(found, eager)
    (site,) = report.refused
    assert "which the graph dequantises from" in site.reason and "uint8" in site.reason
    assert "replace_weight" in str(report) and "repack_" in str(report)
    for name, module in list(model.named_modules()):
        if isinstance(module, HandWritten):
            read = inductor_moe.unpack_codes(module.words)
            linear = nn.Linear(128, 48, bias=False, device="meta")
            inductor_moe.replace_weight(
                linear, "weight", read, module.scales, module.zeros, group_size=module.group
            )
            model.set_submodule(name, linear)
    found, report = capture(model, x)
    assert fused_layers(report) == {"quantized_linear": 1} and report.refused == ()
    reference = x.double() @ weight.T
    assert relative_error(found, reference) <= 2 * relative_error(eager, reference)


@pytest.mark.parametrize("transposed", [False, True])
def test_experts_with_zero_points_that_bf16_would_round(transposed):
    """Zero points in fp32 beside scales in bf16, through the expert op."""
    torch.manual_seed(0)
    experts, inner, hidden, tokens = 4, 32, 64, 6

    class Experts(nn.Module):
        def forward(self, x, ids, weights):
            up, down = self.up[ids], self.down[ids]
            if transposed:
                up, down = up.mT, down.mT
            h = F.silu(torch.einsum("tkih,th->tki", up, x))
            return (torch.einsum("tkhi,tki->tkh", down, h) * weights[..., None]).sum(1)

    block, plain = Experts(), Experts()
    for name, shape in (("up", (experts, inner, hidden)), ("down", (experts, hidden, inner))):
        codes, scales, zeros = random(*shape, zeros="any", seed=inner)
        inductor_moe.replace_weight(
            block, name, codes, scales, zeros, group_size=32, transposed=transposed
        )
        assert block._buffers[f"{name}_zeros"].dtype == torch.float32
        weight = exact(codes, scales, zeros, 32)
        setattr(plain, name, weight.mT if transposed else weight)
    x = torch.randn(tokens, hidden).to(BF16)
    ids = torch.stack([torch.randperm(experts)[:2] for _ in range(tokens)])
    weights = torch.rand(tokens, 2).to(BF16)
    reference = plain(x.double(), ids, weights.double())
    found, report = capture(block, x, ids, weights)
    assert fused_layers(report) == {"moe_experts": 1} and report.refused == (), str(report)
    assert relative_error(found, reference) <= 2 * relative_error(
        block(x, ids, weights), reference
    )


def held(module):
    """A module's class and the tensors in it."""
    return type(module), {name: id(t) for name, t in module.state_dict(keep_vars=True).items()}


GOOD = dict(zip(("codes", "scales", "zeros"), random(16, 64, zeros="whole"), strict=True))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"codes": GOOD["codes"].float()}, r"codes has shape \[16, 64\] and dtype torch.float32"),
        ({"codes": GOOD["codes"][0]}, r"codes has shape \[64\]"),
        ({"codes": GOOD["codes"][:0]}, "it is empty"),
        ({"codes": GOOD["codes"] - 8}, "from -8 to 7; 4-bit codes are 0 to 15: .* add 8"),
        ({"codes": GOOD["codes"] + 200, "bits": 8}, "from 200 to 215; .* subtract 128"),
        ({"bits": 3}, "bits is 3; it must be 4 or 8"),
        ({"group_size": 48}, "group_size is 48"),
        ({"group_size": 16}, r"scales has shape \[16, 2\]; it must be \[16, 4\]"),
        ({"zeros": GOOD["zeros"][:, :1]}, r"zeros has shape \[16, 1\]; it must be \[16, 2\]"),
        ({"scales": GOOD["scales"].long()}, "scales has dtype torch.int64"),
        ({"scales": GOOD["scales"].to("meta")}, "scales is on meta, codes on cpu"),
        ({"name": "a.b"}, "name is 'a.b'"),
        ({"name": "child"}, "a submodule or packed already"),
        ({"name": "packed"}, "a submodule or packed already"),
        ({"name": "bias"}, r"a weight \[16, 64\]; bias has shape \[16\]"),
        ({"transposed": True}, r"a weight \[64, 16\]; weight has shape \[16, 64\]"),
        ({"module": 3}, "module must be an nn.Module"),
    ],
)
def test_bad_arguments_are_named_and_change_nothing(changes, message):
    module = nn.Linear(64, 16)
    module.child = nn.Identity()
    inductor_moe.replace_weight(module, "packed", **GOOD, group_size=32)
    before = (
        type(module),
        {name: id(value) for name, value in module.state_dict(keep_vars=True).items()},
    )
    arguments = {"module": module, "name": "weight", **GOOD, "group_size": 32, **changes}
    with pytest.raises(QuantizationError, match=message):
        inductor_moe.replace_weight(**arguments)
    after = (
        type(module),
        {name: id(value) for name, value in module.state_dict(keep_vars=True).items()},
    )
    assert after == before


def test_bad_words_are_named():
    with pytest.raises(QuantizationError, match=r"words has dtype torch\.int64"):
        inductor_moe.unpack_codes(torch.zeros(4, dtype=torch.int64))
    with pytest.raises(QuantizationError, match="first is 'middle'"):
        inductor_moe.unpack_codes(torch.zeros(4, dtype=torch.uint8), first="middle")
