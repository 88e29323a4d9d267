"""Packages hold our rewrites and run in a process that cannot import this package."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import textwrap

import forms
import pytest
import torch
import zoo
from torch.utils._ordered_set import OrderedSet

import inductor_moe
from inductor_moe import lowerings
from inductor_moe.backend import collected
from inductor_moe.errors import UnknownOptionError
from inductor_moe.testing import fused_layers, relative_error

RUN = """
    import sys, torch
    sys.modules["inductor_moe"] = None
    package, inputs, outputs = sys.argv[1:]
    run = torch._inductor.aoti_load_package(package)
    torch.save([run(*arguments) for arguments in torch.load(inputs)], outputs)
"""


def run_elsewhere(package, folder, *calls):
    """The outputs of a package called with each tuple of arguments, in a fresh process."""
    inputs, outputs = folder / "inputs.pt", folder / "outputs.pt"
    torch.save(list(calls), inputs)
    command = [sys.executable, "-W", "ignore", "-c", textwrap.dedent(RUN)]
    result = subprocess.run(
        [*command, str(package), str(inputs), str(outputs)],
        cwd=folder, env={**os.environ, "PYTHONPATH": ""}, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return torch.load(outputs)


@pytest.mark.parametrize("form, dynamic", [("grouped", True), ("batched", False)])
def test_a_package_runs_without_this_package(tmp_path, form, dynamic):
    model = forms.routed(form=form)
    counts = (12, 2, 33) if dynamic else (12,)
    shapes = ({0: torch.export.Dim("tokens", min=2, max=64)},) if dynamic else None
    calls = [(forms.tokens(count=count, seed=count),) for count in counts]
    with torch.no_grad(), collected() as reports:
        exported = torch.export.export(model, calls[0], dynamic_shapes=shapes)
        path = inductor_moe.aoti_compile_and_package(
            exported, package_path=tmp_path / "model.pt2", options={"inductor_moe.strict": True}
        )
    assert path == str(tmp_path / "model.pt2")
    assert reports[0].counts() == {"moe_experts": 1, "moe_route": 1}
    for found, arguments in zip(run_elsewhere(path, tmp_path, *calls), calls, strict=True):
        with torch.no_grad():
            torch.testing.assert_close(found, model(*arguments), rtol=2e-2, atol=2e-2)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "mixtral"])
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_a_model_packages(tmp_path, name, dynamic):
    family = next(family for family in zoo.MOE if family.name == name)
    model, exact = zoo.prepare(family.build(), torch.bfloat16, "grouped_mm")

    class Logits(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, ids):
            return self.model(ids, use_cache=False).logits

    lengths = (16, 70) if dynamic else (16,)
    shapes = ({1: torch.export.Dim("tokens", min=2, max=128)},) if dynamic else None
    calls = [(zoo.prompt(model, length, seed=length),) for length in lengths]
    with torch.no_grad(), collected() as reports:
        exported = torch.export.export(Logits(), calls[0], dynamic_shapes=shapes, strict=False)
        path = inductor_moe.aoti_compile_and_package(exported, package_path=tmp_path / "m.pt2")
    assert fused_layers(reports[0]) == family.expected()
    for found, (ids,) in zip(run_elsewhere(path, tmp_path, *calls), calls, strict=True):
        with torch.no_grad():
            reference = exact(ids, use_cache=False).logits
            budget = relative_error(model(ids, use_cache=False).logits, reference)
        assert relative_error(found, reference) <= 2 * budget


def test_configs_for_pytorchs_own_packaging():
    configs = inductor_moe.inductor_configs({"inductor_moe.disable": "moe", "max_autotune": False})
    assert configs["max_autotune"] is False
    assert configs["post_grad_custom_pre_pass"].options.disable == ("moe",)


def test_a_bad_option_is_named():
    with pytest.raises(UnknownOptionError, match="valid options"):
        inductor_moe.inductor_configs({"inductor_moe.stict": True})


def test_an_array_is_declared_in_every_buffer_that_uses_it():
    from torch._inductor.codegen.cpp_wrapper_cpu import CppWrapperCpu
    from torch._inductor.utils import IndentedBuffer

    lowerings.install()
    wrapper = CppWrapperCpu.__new__(CppWrapperCpu)
    wrapper.int_array_id = itertools.count()
    wrapper.declared_int_array_vars = OrderedSet()
    wrapper.codegen_int_array_var_cache = {}
    wrapper._int_array_writeline_targets = []  # from torch 2.15 on
    for _ in range(20):  # a dead buffer's address is taken again, a dead method's at once
        buffers = [IndentedBuffer() for _ in range(3)]
        for buffer in buffers:
            names = {
                wrapper.codegen_int_array_var("{4L, 8L}", buffer.writeline, known_statically=True)
                for _ in range(2)
            }
            (name,) = names
            assert buffer.getvalue().count(f" {name}[] = {{4L, 8L}};") == 1
