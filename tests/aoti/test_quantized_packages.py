"""Packed weights are a package's constants, and the package runs without this package."""

from __future__ import annotations

import zipfile

import forms
import torch
from aoti.test_packaging import run_elsewhere

import inductor_moe
from inductor_moe.backend import collected


def test_a_package_holds_packed_weights(tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(32, 32).bfloat16(), forms.routed(form="grouped"))
    result = inductor_moe.quantize_(model, "int4", group_size=16, verbose=False)
    x = forms.tokens(count=12, seed=1)
    with torch.no_grad(), collected() as reports:
        exported = torch.export.export(model, (x,))
        path = inductor_moe.aoti_compile_and_package(
            exported, package_path=tmp_path / "model.pt2", options={"inductor_moe.strict": True}
        )
        expected = model(x)
    counts = reports[0].counts()
    assert counts["moe_experts"] == counts["quantized_linear"] == 1
    kinds = {name: value.dtype for name, value in exported.state_dict.items()}
    assert kinds["1.experts.up_packed"] == torch.int16 and "1.experts.up" not in kinds
    (found,) = run_elsewhere(path, tmp_path, (x,))
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)
    with zipfile.ZipFile(path) as archive:
        held = b"".join(archive.read(entry) for entry in archive.infolist())
    for name in result.quantized:
        owner, _, leaf = name.rpartition(".")
        unpacked = getattr(model.get_submodule(owner), leaf)
        assert as_bytes(exported.state_dict[f"{name}_packed"]) in held
        for row in unpacked.flatten(0, -2):
            assert as_bytes(row) not in held, f"{name} is there unpacked, too"


def as_bytes(value):
    return value.detach().contiguous().view(torch.uint8).numpy().tobytes()
