"""Weights of torchao: repacked with the same values, and then matched."""

from __future__ import annotations

import copy

import pytest
import torch
import zoo
from torch import nn

import inductor_moe
from inductor_moe.errors import QuantizationError
from inductor_moe.testing import capture, fused_layers, relative_error

pytest.importorskip("torchao")
from torchao.quantization import (
    Float8WeightOnlyConfig,
    Int4Tensor,
    Int4TilePackedTo4dTensor,
    Int8DynamicActivationInt8WeightConfig,
    Int8WeightOnlyConfig,
    IntxWeightOnlyConfig,
    MappingType,
    PerGroup,
    PerRow,
    PerTensor,
    quantize_,
)
from torchao.quantization.quantize_.workflows import Int8Tensor

# Weights that torchao makes on a CPU through its own front door.
CONFIGS = {
    "int4 g32": IntxWeightOnlyConfig(torch.int4, PerGroup(32)),
    "int4 g64 zeros": IntxWeightOnlyConfig(torch.int4, PerGroup(64), MappingType.ASYMMETRIC),
    "int4 g128": IntxWeightOnlyConfig(torch.int4, PerGroup(128)),
    "int3 rows": IntxWeightOnlyConfig(torch.int3),
    "int6 g64": IntxWeightOnlyConfig(torch.int6, PerGroup(64), MappingType.ASYMMETRIC),
    "int8 rows": Int8WeightOnlyConfig(granularity=PerRow()),
    "int8 whole": Int8WeightOnlyConfig(granularity=PerTensor()),
    "int8 g32": Int8WeightOnlyConfig(granularity=PerGroup(32)),
}


def linear(inputs, outputs, dtype=torch.bfloat16):
    torch.manual_seed(inputs + outputs)
    return nn.Linear(inputs, outputs).to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("config", CONFIGS)
def test_values_stay_what_they_were(config, dtype):
    model = nn.Sequential(linear(256, 96, dtype), nn.ReLU(), linear(128, 33, dtype))
    quantize_(model, CONFIGS[config])
    before = [model[i].weight.dequantize() for i in (0, 2)]
    result = inductor_moe.repack_(model, verbose=False)
    assert list(result.repacked) == ["0.weight", "2.weight"] and result.skipped == ()
    bits = "int4" if config.startswith(("int3", "int4")) else "int8"
    for i, value in zip((0, 2), before, strict=True):
        assert model[i].weight.dtype == dtype
        assert torch.equal(model[i].weight, value)
        assert result.repacked[f"{i}.weight"].startswith(bits)
        assert (model[i].weight_zeros is not None) == ("zero" in result.repacked[f"{i}.weight"])
        assert (model[i].weight_packed.dtype == torch.int16) == (bits == "int4")
        # torchao's description of the module would read the weight that is gone.
        assert "in_features" in repr(model[i])


def offsets_of(codes, scales, offsets, group):
    """(code - 8) * scale + offset in fp64, where the products of bf16 are exact."""
    per_input = [value.double().repeat_interleave(group, -1) for value in (scales, offsets)]
    return (codes.double() - 8) * per_input[0] + per_input[1]


def random_codes(*shape, group, dtype=torch.bfloat16):
    generator = torch.Generator().manual_seed(sum(shape))
    codes = torch.randint(0, 16, shape, generator=generator)
    groups = (*shape[:-1], shape[-1] // group)
    scales = (torch.rand(groups, generator=generator) / 50 + 1e-3).to(dtype)
    offsets = (torch.randn(groups, generator=generator) / 20).to(dtype)
    return codes, scales, offsets


def assert_rounded_once(value, exact):
    """fp32 arithmetic and one rounding to the dtype of the weight."""
    # (code - zero) * scale in fp32 cancels: its error is relative to the largest term.
    slack = 2.0**-22 * exact.abs().max()
    limit = exact.abs() * torch.finfo(value.dtype).eps / 2 + slack
    assert ((value.double() - exact).abs() <= limit).all()


@pytest.mark.parametrize("shape", [(48, 256), (3, 48, 128)])
@pytest.mark.parametrize("group", [32, 128])
def test_plain_int4_is_read(shape, group):
    # As mslk packs it, which torchao needs to make one: signed, the even input in the low bits.
    codes, scales, offsets = random_codes(*shape, group=group)
    signed = codes.to(torch.int8) - 8
    data = (signed[..., ::2] & 15) | (signed[..., 1::2] << 4)
    block = [1] * (len(shape) - 1) + [group]
    weight = Int4Tensor(
        data, scales.mT.contiguous(), offsets.mT.contiguous(), block, torch.Size(shape)
    )
    module = holder(weight)
    inductor_moe.repack_(module, verbose=False)
    assert_rounded_once(module.weight, offsets_of(codes, scales, offsets, group))
    no_offsets = Int4Tensor(
        data, scales.mT.contiguous(), torch.zeros_like(offsets.mT), block, torch.Size(shape)
    )
    module = holder(no_offsets)
    inductor_moe.repack_(module, verbose=False)
    assert module.weight_zeros is None
    assert_rounded_once(module.weight, offsets_of(codes, scales, 0 * offsets, group))


def holder(weight):
    module = nn.Module()
    module.weight = nn.Parameter(weight, requires_grad=False)
    return module


def tiles(codes):
    """[N, K] -> [N / 8, K / 128, 32, 4] int32, a word at a time as a lane of a warp packs it."""
    rows, inputs = codes.shape
    out = torch.zeros(rows // 8, inputs // 128, 32, 4, dtype=torch.int64)
    for n in range(rows // 8):
        for k in range(inputs // 128):
            for lane in range(32):
                for word in range(4):
                    first = 128 * k + 32 * word + 2 * (lane % 4)
                    at = [first + step for step in (0, 1, 8, 9, 16, 17, 24, 25)]
                    value = codes[8 * n + lane // 4, at].tolist()
                    order = [value[i] for i in (0, 2, 4, 6, 1, 3, 5, 7)]
                    out[n, k, lane, word] = sum(code << 4 * i for i, code in enumerate(order))
    return torch.where(out >= 2**31, out - 2**32, out).to(torch.int32)


@pytest.mark.parametrize("shape", [(24, 256), (13, 128), (2, 10, 128)])
def test_tiles_are_read(shape):
    *lead, rows, inputs = shape
    group = 64
    # torchao pads the inputs to 1024 and the outputs to 8.
    padded = (*lead, -(-rows // 8) * 8, 1024)
    codes, scales, offsets = random_codes(*padded, group=group)
    parts = codes.reshape(-1, *padded[-2:])
    data = torch.stack([tiles(part) for part in parts]) if lead else tiles(codes)
    packed = torch.stack([scales, offsets], -1).transpose(-3, -2).contiguous()
    weight = Int4TilePackedTo4dTensor(
        data, packed, [1] * len(lead) + [1, group], torch.Size(shape)
    )
    module = holder(weight)
    inductor_moe.repack_(module, verbose=False)
    assert module.weight.shape == shape
    exact = offsets_of(codes, scales, offsets, group)[..., :rows, :inputs]
    assert_rounded_once(module.weight, exact)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape, group", [((64, 1152), 128), ((48, 64), 32)])
def test_the_cpus_own_layout_is_read(shape, group, dtype):
    opaque = pytest.importorskip("torchao.prototype.quantization.int4.int4_opaque_tensor")
    module = linear(*reversed(shape), dtype)
    weight = opaque.Int4OpaqueTensor.from_hp(module.weight.detach(), [1, group])
    module.weight = nn.Parameter(weight, requires_grad=False)
    scales, offsets = (value.mT for value in weight.scale_and_zero.unbind(-1))
    with torch.no_grad():
        theirs = (module(torch.eye(shape[1], dtype=dtype)) - module.bias).mT.double()
    inductor_moe.repack_(module, verbose=False)
    from inductor_moe.reference.quant import unpack_int4

    codes = unpack_int4(module.weight_packed, shape[1])
    assert_rounded_once(module.weight, offsets_of(codes, scales, offsets, group))
    # The bias rounds their values once more.
    limit = (theirs.abs() + module.bias.abs().max()) * torch.finfo(dtype).eps
    assert ((module.weight.double() - theirs).abs() <= limit + 1e-7).all()


def test_what_is_left_is_named(capsys):
    model = nn.Module()
    model.plain = linear(64, 64)
    for name, config in (
        ("read", IntxWeightOnlyConfig(torch.int4, PerGroup(32))),
        ("both", Int8DynamicActivationInt8WeightConfig()),
        ("float8", Float8WeightOnlyConfig()),
        ("odd", IntxWeightOnlyConfig(torch.int4, PerGroup(48))),
    ):
        layer = linear(192, 64)
        quantize_(layer, config)
        setattr(model, name, layer)
    model.table = nn.Embedding(32, 64)
    table = Int8Tensor.from_hp(model.table.weight.detach(), PerRow())
    model.table.weight = nn.Parameter(table, requires_grad=False)
    up = Int8Tensor.from_hp(torch.randn(2, 64, 96), PerRow())
    model.experts = nn.Module()
    model.experts.is_transposed = True
    model.experts.gate_up_proj = nn.Parameter(up, requires_grad=False)
    scaled = linear(64, 64)
    quantize_(scaled, Int8WeightOnlyConfig())
    scaled.weight.act_pre_scale = torch.ones(64)
    model.scaled = scaled
    result = inductor_moe.repack_(model)
    assert list(result.repacked) == ["read.weight"]
    reasons = {skip.name: skip.reason for skip in result.skipped}
    expected = {
        "both.weight": "activations are quantised to int8",
        "float8.weight": "a Float8Tensor of torchao; Int4Tensor, ",
        "odd.weight": "groups of 48; the kernels read 16, 32 and multiples of 64",
        "table.weight": "rows of an embedding",
        "experts.gate_up_proj": "groups run along the outputs",
        "scaled.weight": "act_pre_scale",
    }
    assert reasons.keys() == expected.keys()
    for name, words in expected.items():
        assert words in reasons[name]
    assert str(result) in capsys.readouterr().out
    assert type(model.float8.weight).__name__ == "Float8Tensor"


def test_models_without_weights_of_torchao_are_refused():
    with pytest.raises(QuantizationError, match="no weight of torchao; quantize_ packs"):
        inductor_moe.repack_(nn.Linear(64, 64))
    model = nn.Sequential(linear(64, 64), linear(64, 64))
    quantize_(model[0], Int8WeightOnlyConfig())
    left = inductor_moe.quantize_(model, "int4", verbose=False).skipped
    assert [(skip.name, skip.reason) for skip in left] == [
        ("0.weight", "a Int8Tensor of torchao; repack_ converts it")
    ]


def test_a_shared_weight_stays_shared():
    model = nn.Sequential(linear(64, 64), linear(64, 64))
    quantize_(model[0], Int8WeightOnlyConfig())
    model[1].weight = model[0].weight
    inductor_moe.repack_(model, verbose=False)
    assert model[0].weight_packed is model[1].weight_packed


def test_a_repacked_model_is_saved_and_loaded(tmp_path):
    model = nn.Sequential(linear(128, 64), nn.ReLU(), linear(64, 64))
    empty = copy.deepcopy(model).to("meta")
    quantize_(model, IntxWeightOnlyConfig(torch.int4, PerGroup(32), MappingType.ASYMMETRIC))
    inductor_moe.repack_(model, verbose=False)
    inductor_moe.save_quantized(model, tmp_path / "model.safetensors")
    loaded = inductor_moe.load_quantized(empty, tmp_path / "model.safetensors")
    x = torch.randn(5, 128).bfloat16()
    assert torch.equal(loaded(x), model(x))


def assert_as_exact_as_unpacked(model, plain, expected):
    """Every site is fused, and the error is at most twice that of the unpacked weights."""
    exact = copy.deepcopy(plain).double()
    exact.set_experts_implementation("batched_mm")
    ids = zoo.prompt(model, 16, seed=5)
    with torch.no_grad():
        reference, eager = (m(ids, use_cache=False).logits for m in (exact, plain))
        fused, report = capture(model, ids, use_cache=False)
    assert report.refused == (), str(report)
    assert fused_layers(report) == expected
    error = relative_error(fused.logits, reference)
    assert error <= 2 * relative_error(eager, reference)
    return report


def test_every_linear_layer_of_a_model_is_matched():
    family = next(f for f in zoo.MOE if f.name == "qwen3_moe")
    model, _ = zoo.prepare(family.build(), torch.bfloat16, "grouped_mm")
    plain = copy.deepcopy(model)
    quantize_(model, IntxWeightOnlyConfig(torch.int4, PerGroup(32), MappingType.ASYMMETRIC))
    linears = {
        name: module.weight.dequantize()
        for name, module in model.named_modules()
        if type(module).__name__ == "Linear"
    }
    assert len(linears) >= 4
    for name, value in linears.items():
        plain.get_submodule(name).weight.data = value
    result = inductor_moe.repack_(model, verbose=False)
    assert [name.removesuffix(".weight") for name in result.repacked] == list(linears)
    expected = {**family.expected(), "quantized_linear": len(linears)}
    assert_as_exact_as_unpacked(model, plain, expected)


def test_experts_of_a_model_are_matched():
    family = next(f for f in zoo.MOE if f.name == "qwen3_moe")
    model, _ = zoo.prepare(family.build(), torch.bfloat16, "grouped_mm")
    plain = copy.deepcopy(model)
    for name, parameter in list(model.named_parameters()):
        if parameter.dim() == 3 and ".experts." in name:
            path, _, leaf = name.rpartition(".")
            weight = Int8Tensor.from_hp(parameter.detach(), PerRow())
            setattr(model.get_submodule(path), leaf, nn.Parameter(weight, requires_grad=False))
            plain.get_parameter(name).data = weight.dequantize()
    result = inductor_moe.repack_(model, verbose=False)
    assert len(result.repacked) == 2 * family.moe_layers
    report = assert_as_exact_as_unpacked(model, plain, family.expected())
    assert all("int8" in site.detail for site in report.matched if site.op == "moe_experts")
