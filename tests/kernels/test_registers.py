"""Kernels that a graph compiles for a number of registers."""

from __future__ import annotations

import importlib.util
import os
import pickle
import re
from types import SimpleNamespace

import pytest
from kernels.generated import Drawn, source
from kernels.test_dispatch_source import delta
from torch._inductor import config
from torch._inductor.codegen.cpp_wrapper_gpu import CppWrapperGpu

from inductor_moe.compat.registers import LimitedAutotuner
from inductor_moe.config import Options
from inductor_moe.kernels import delta_chunk, delta_launch

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="needs compiled kernels"
)


def bodies(monkeypatch, package, capability=90, dependent=True):
    """The text of each kernel of a prompt's delta rule."""
    known = delta_launch.Limits(capability, 227 * 1024, 132)
    monkeypatch.setattr(delta_chunk, "limits", lambda _: known)
    found, define = {}, CppWrapperGpu._define_kernel_helper

    def helper(self, name, body, *rest, **kwargs):
        found[re.sub(r"_\d+$", "", name)] = body
        return define(self, name, body, *rest, **kwargs)

    monkeypatch.setattr(CppWrapperGpu, "_define_kernel_helper", helper)
    drawn = Drawn(70, 288, 100)
    tensors, run = delta(drawn)
    ours = SimpleNamespace(options=Options(dependent_launch=dependent))
    with config.patch(post_grad_custom_pre_pass=ours):
        code = source(drawn, run, tensors, package=package)
    if not package:
        return dict(re.findall(r"async_compile\.triton\('(\w+)', '''(.*?)'''", code, re.S))
    return found


@pytest.mark.parametrize("dependent", [True, False])
@pytest.mark.parametrize("package", [True, False])
def test_a_graph_compiles_a_kernel_for_its_registers(monkeypatch, package, dependent):
    found = bodies(monkeypatch, package, dependent=dependent)
    limited = {name for name, text in found.items() if "at_most" in text}
    assert limited == {"delta_chunk_intra_kernel"} < set(found)
    assert "@at_most(168)\n@triton_heuristics." in found["delta_chunk_intra_kernel"]


def test_no_number_is_no_limit(monkeypatch):
    found = bodies(monkeypatch, False, capability=80)
    assert "'REGISTERS': 0" in found["delta_chunk_intra_kernel"]
    assert not any("at_most" in text for text in found.values())


def test_the_compiler_is_told_in_a_worker_and_where_its_kernel_arrives(monkeypatch, tmp_path):
    path = tmp_path / "generated_kernel.py"
    path.write_text(bodies(monkeypatch, False)["delta_chunk_intra_kernel"])
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    tuner = module.delta_chunk_intra_kernel
    (options,) = (
        tuner._create_compile_options(each, tuner._create_compile_meta(each))
        for each in tuner.configs
    )
    assert options["maxnreg"] == 168 and options["num_warps"] == 4
    tuner.prepare_for_pickle()
    arrived = pickle.loads(pickle.dumps(tuner))
    assert isinstance(arrived, LimitedAutotuner) and arrived.registers == 168
