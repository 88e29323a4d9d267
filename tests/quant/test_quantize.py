"""quantize_, randomize_, and saving and loading, on small modules."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import inductor_moe
from inductor_moe.errors import QuantizationError
from inductor_moe.testing import relative_error


class Experts(nn.Module):
    def __init__(self, transposed: bool = False) -> None:
        super().__init__()
        up, down = (4, 2 * 48, 64), (4, 64, 48)
        if transposed:
            up, down = (4, 64, 2 * 48), (4, 48, 64)
        self.gate_up_proj = nn.Parameter(torch.randn(up) / 8)
        self.down_proj = nn.Parameter(torch.randn(down) / 8)

    def forward(self, x):
        up, down = self.gate_up_proj, self.down_proj
        if up.shape[1] != 96:
            up, down = up.transpose(1, 2), down.transpose(1, 2)
        return (torch.relu(x @ up[0, :48].T)) @ down[0].T


class Model(nn.Module):
    def __init__(self, transposed: bool = False, tied: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 64)
        self.conv = nn.Conv1d(64, 64, 4, groups=64)
        self.proj = nn.Linear(64, 64)
        self.gate = nn.Linear(64, 32, bias=False)
        self.narrow = nn.Linear(64, 1)
        self.experts = Experts(transposed)
        self.lm_head = nn.Linear(64, 50, bias=False)
        if tied:
            self.lm_head.weight = self.embed.weight
        self.register_buffer("frequencies", torch.arange(4.0), persistent=False)

    def forward(self, ids):
        x = self.proj(self.embed(ids))
        return self.lm_head(self.experts(x)) + self.narrow(x) + self.gate(x).sum()


IDS = torch.arange(6)


@pytest.mark.parametrize("dtype", ["int4", "int8"])
@pytest.mark.parametrize("transposed", [False, True])
def test_what_is_packed_and_what_is_left(dtype, transposed, capsys):
    torch.manual_seed(0)
    model = Model(transposed)
    before = model(IDS)
    result = inductor_moe.quantize_(model, dtype)
    assert result.quantized == (
        "proj.weight", "experts.gate_up_proj", "experts.down_proj", "lm_head.weight",
    )  # fmt: skip
    reasons = {skip.name: skip.reason for skip in result.skipped}
    assert reasons == {
        "gate.weight": "routers stay as they are",
        "narrow.weight": "fewer than 16 inputs or outputs",
    }
    assert str(result) in capsys.readouterr().out
    assert result.bytes_before == 4 * (64 * 64 + 4 * 96 * 64 + 4 * 48 * 64 + 50 * 64)
    packed = sum(t.numel() * t.element_size() for n, t in model.named_buffers()
                 if n.endswith(("packed", "scales")))  # fmt: skip
    assert result.bytes_after == packed
    assert relative_error(model(IDS), before) < (0.25 if dtype == "int4" else 0.02)
    # Codes run along the input dim in both layouts.
    assert model.experts.gate_up_proj_packed.shape[1] == 96
    assert "experts.gate_up_proj" not in dict(model.named_parameters())


def test_the_layout_follows_the_module_where_shapes_fit_both():
    experts = Experts()
    experts.gate_up_proj = nn.Parameter(torch.randn(4, 64, 64))
    experts.down_proj = nn.Parameter(torch.randn(4, 32, 64))
    experts.is_transposed = True
    inductor_moe.quantize_(experts, "int4", group_size=64, verbose=False)
    assert experts.down_proj_packed.shape == (4, 64, 16)
    assert experts.down_proj.shape == (4, 32, 64)


def test_skip_by_name_module_and_pattern():
    result = inductor_moe.quantize_(
        Model(), "int4", skip=["lm_head", "*.down_proj", "proj.weight"], verbose=False
    )
    assert result.quantized == ("experts.gate_up_proj",)
    with pytest.raises(QuantizationError, match="'nothing', which no weight"):
        inductor_moe.quantize_(Model(), "int4", skip=["nothing"])


def test_a_tied_head_is_left_and_stays_tied():
    model = Model(tied=True)
    result = inductor_moe.quantize_(model, "int4", verbose=False)
    reasons = {skip.name: skip.reason for skip in result.skipped}
    assert reasons["lm_head.weight"].startswith("tied to embed.weight")
    assert model.lm_head.weight is model.embed.weight


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("int3",), "one of int4, int8"),
        (("int4", {"method": "gptq"}), "one of rtn, hqq"),
        (("int4", {"group_size": 48}), "group_size must be 0, 16, 32 or a multiple of 64"),
        (("int4", {"group_size": "64"}), r"multiple of 64 \(got '64'\)"),
    ],
)
def test_bad_arguments_change_nothing(arguments, message):
    model = Model()
    before = {name: id(p) for name, p in model.named_parameters()}
    with pytest.raises(QuantizationError, match=message):
        inductor_moe.quantize_(model, arguments[0], **(arguments[1:] or ({},))[0])
    assert {name: id(p) for name, p in model.named_parameters()} == before
    with pytest.raises(QuantizationError, match="no weight to quantise"):
        inductor_moe.quantize_(nn.LayerNorm(8), "int4")
    with pytest.raises(QuantizationError, match="of weight and 0 more, fewer than 16 inputs"):
        inductor_moe.quantize_(nn.Linear(8, 8), "int4")
    inductor_moe.quantize_(model, "int4", verbose=False)
    with pytest.raises(QuantizationError, match="those that can be are packed already"):
        inductor_moe.quantize_(model, "int4")


def test_a_copy_and_another_dtype_keep_the_weights():
    model = Model().to(torch.bfloat16)
    inductor_moe.quantize_(model, "int4", method="hqq", verbose=False)
    wide = copy.deepcopy(model).double()
    assert wide.proj.weight.dtype == torch.float64
    assert torch.equal(wide.proj.weight.bfloat16(), model.proj.weight)
    assert isinstance(model.proj, nn.Linear) and "Linear(in_features=64" in repr(model)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype, method", [("int4", "hqq"), ("int4", "rtn"), ("int8", "rtn")])
def test_saved_models_load_on_the_meta_device(tmp_path, dtype, method, tied):
    model = Model(tied=tied).bfloat16()
    inductor_moe.quantize_(model, dtype, method=method, verbose=False)
    inductor_moe.save_quantized(model, tmp_path / "model.safetensors")
    with torch.device("meta"):
        empty = Model(tied=tied)
    loaded = inductor_moe.load_quantized(empty, tmp_path / "model.safetensors")
    assert all(not p.is_meta for p in loaded.parameters())
    assert (loaded.lm_head.weight is loaded.embed.weight) == tied
    assert torch.equal(loaded(IDS), model(IDS))


def test_files_that_do_not_fit_are_refused(tmp_path):
    path = tmp_path / "model.safetensors"
    with pytest.raises(QuantizationError, match="no packed weights"):
        inductor_moe.save_quantized(Model(), path)
    path.write_text("no tensors")
    with pytest.raises(QuantizationError, match="cannot be read to device 'cpu'"):
        inductor_moe.load_quantized(Model(), path)
    small = nn.Sequential(nn.Linear(64, 64))
    inductor_moe.quantize_(small, "int4", verbose=False)
    inductor_moe.save_quantized(small, path)
    model = Model()
    with pytest.raises(QuantizationError, match="which the model does not have"):
        inductor_moe.load_quantized(model, path)
    with pytest.raises(QuantizationError, match=r"missing \['1.bias'"):
        inductor_moe.load_quantized(nn.Sequential(nn.Linear(64, 64), nn.Linear(8, 8)), path)


def test_random_packed_weights_for_a_meta_model():
    with torch.device("meta"):
        model = Model(transposed=True).bfloat16()
    result = inductor_moe.randomize_(model, "int4", "cpu", group_size=64)
    assert len(result.quantized) == 4
    assert all(not p.is_meta for p in model.parameters())
    weight = model.experts.gate_up_proj
    assert weight.shape == (4, 64, 96) and weight.dtype == torch.bfloat16
    assert 0.9 < weight.float().std() / 0.02 < 1.1
    assert model(IDS).isfinite().all()


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dtype", ["int4", "int8"])
def test_random_packed_weights_have_no_mean(dtype, symmetric):
    with torch.device("meta"):
        model = nn.Linear(512, 256, bias=False).bfloat16()
    inductor_moe.randomize_(model, dtype, "cpu", symmetric=symmetric)
    weight = model.weight.double()
    assert abs(weight.mean()) < 5 * 0.02 / weight.numel() ** 0.5
    assert abs(weight.std() / 0.02 - 1) < 0.02
    assert weight.unique().numel() == (15 if dtype == "int4" else 255)
