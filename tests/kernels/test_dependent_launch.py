"""Programmatic dependent launch: what graphs get, what it becomes, and where it stays away."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import triton
import triton.language as tl
from delta_inputs import decode_inputs
from kernels import test_norm_rope_offline_compile as norm_rope_shapes
from kernels.generated import Drawn, source
from kernels.test_attention_offline_compile import record as record_attention
from kernels.test_dispatch_source import packed_experts
from kernels.test_inductor_source import KERNELS
from kernels.test_moe_offline_compile import (
    H100,
    POINTERS,
    Recorder,
    local_memory,
    record,
    record_router,
)
from kernels.test_quant_offline_compile import (
    PARTS,
    SCHEMES,
    record_experts,
    record_linear,
    record_merged,
)
from torch._inductor import config
from torch._inductor.codegen.cpp_wrapper_gpu import CppWrapperGpu, DeferredTritonCallWrapper
from torch._inductor.codegen.cuda.device_op_overrides import CUDADeviceOpOverrides
from torch._inductor.utils import IndentedBuffer
from torch._inductor.virtualized import V
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

from inductor_moe import lowerings
from inductor_moe.compat import launches
from inductor_moe.compat.launches import DEPENDENT, PLAIN
from inductor_moe.config import Options
from inductor_moe.kernels import delta_decode
from inductor_moe.ops import quant_cuda
from inductor_moe.ops.quant import quantized_linear
from inductor_moe.quant_tiles import QuantizedPlan, VectorTile
from inductor_moe.tiles import GemmTile, generic_gpu

BATCH = QuantizedPlan(8, GemmTile(64, 128, 8, 4, 4), GemmTile(64, 128, 8, 4, 4))
VECTOR = QuantizedPlan(0, VectorTile(6, 6, 1), PARTS)
OTHERS_DEPENDENT = tl.constexpr(False)

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1" or sys.platform != "linux",
    reason="needs compiled kernels",
)


def generated(options, package=False):
    drawn = Drawn(1, 8, 4)
    tensors, run = packed_experts(drawn)
    ours = SimpleNamespace(options=options) if options else None
    with config.patch(post_grad_custom_pre_pass=ours):
        return source(drawn, run, tensors, package=package)


def kernels(code):
    return re.findall(r"async_compile\.triton\('\w+', '''(.*?)'''", code, re.S)


def test_a_graph_of_the_backend_launches_its_kernels_dependently():
    found = kernels(generated(Options()))
    assert len(found) >= 2
    for text in found:
        assert DEPENDENT in text and PLAIN not in text
        assert text.count("'launch_pdl': True") == 1


@pytest.mark.parametrize("options", [Options(dependent_launch=False), None])
def test_a_graph_that_does_not_ask_launches_plainly(options):
    found = kernels(generated(options))
    assert len(found) >= 2
    for text in found:
        assert PLAIN in text and DEPENDENT not in text and "launch_pdl" not in text


@pytest.mark.parametrize("asked", [True, False])
def test_a_package_launches_its_kernels_dependently_if_asked(monkeypatch, asked):
    bodies, define = [], CppWrapperGpu._define_kernel_helper

    def helper(self, name, body, *rest, **kwargs):
        bodies.append(body)
        return define(self, name, body, *rest, **kwargs)

    monkeypatch.setattr(CppWrapperGpu, "_define_kernel_helper", helper)
    code = generated(Options(dependent_launch=asked), package=True)
    assert "quantized_up_decode_kernel" in code
    assert len(bodies) >= 2
    for body in bodies:
        assert (DEPENDENT in body) == asked and (PLAIN in body) != asked
        assert body.count("'launch_pdl': True") == asked


@pytest.mark.parametrize("asked", [True, False])
def test_the_cpp_of_a_launch(asked):
    lowerings.install()
    meta = {"constants": {}, "signature": {}, **({"launch_pdl": True} if asked else {})}
    params = {
        "triton_meta": meta, "def_args": [], "call_args": [], "num_warps": 4, "shared_mem": 64,
        "config": {},
    }  # fmt: skip
    wrapper = SimpleNamespace(
        device="cuda", generate_args_decl=lambda *_, **__: "",
        device_codegen=CUDADeviceOpOverrides(),
    )  # fmt: skip
    call = DeferredTritonCallWrapper("call_kernel", "kernel", {}, [])
    written = IndentedBuffer()
    with written.indent():
        call.generate_launch_kernel(written, wrapper, "kernels_.kernel", params)
    launch = written.getvalue().splitlines()[-1]
    name, arguments = re.fullmatch(r" +(\w+)\((.*)\);", launch).groups()
    own = name == "launchDependentKernel"
    known = "kernels_.kernel, grid_0, grid_1, grid_2, 4, 64, kernel_args_, stream_"
    assert arguments in (known, f"{known}, {str(asked).lower()}")
    assert asked == (own or arguments.endswith("true"))


def test_the_launcher_is_cpp(tmp_path):
    lowerings.install()
    driver = CUDADeviceOpOverrides().kernel_driver()
    includes = "cuda.h", "filesystem", "optional", "stdexcept", "string", "vector"
    lines = [
        *(f"#include <{name}>" for name in includes),
        "typedef CUstream cudaStream_t;",
        driver,
    ]
    path = tmp_path / "driver.cpp"
    path.write_text("\n".join(lines))
    folder = Path(triton.__file__).parent / "backends" / "nvidia" / "include"
    command = ["g++", "-std=c++17", "-Wall", "-Werror", "-Wno-unused-function", "-fsyntax-only"]
    subprocess.run([*command, "-I", str(folder), str(path)], check=True)
    assert "CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION" in driver


@triton.jit
def others_kernel(x, out, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(out + at, tl.load(x + at) * (2 if OTHERS_DEPENDENT else 1))


def test_a_kernel_of_others_launches_plainly(monkeypatch):
    """Whatever its constants are called: it does not wait for its inputs."""
    drawn = Drawn(1, 8, 4)

    def run(x):
        out = torch.empty_like(x)
        torch.library.wrap_triton(others_kernel)[(1,)](x, out, N=16)
        return out

    monkeypatch.setattr(launches, "PLAIN", "OTHERS_DEPENDENT = tl.constexpr(False)")
    with config.patch(post_grad_custom_pre_pass=SimpleNamespace(options=Options())):
        code = source(drawn, run, [drawn.tensor(16)], package=False)
    assert launches.PLAIN in code and "launch_pdl" not in code


def test_older_gpus_launch_plainly(monkeypatch):
    graph = SimpleNamespace(get_current_device_or_throw=lambda: torch.device("cuda"))
    ours = SimpleNamespace(options=Options())
    for capability, expected in (((8, 9), False), ((9, 0), True), ((12, 0), True)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, c=capability: c)
        with V.set_graph_handler(graph), config.patch(post_grad_custom_pre_pass=ours):
            assert launches._may_depend() == expected


def dependent(kernel, folder):
    """The kernel of a graph's code, as `launch_dependently` makes it."""
    from torch._inductor.codegen.wrapper import (
        user_defined_triton_kernel_transitive_closure_source_code as closure,
    )

    text = closure(kernel)
    assert text.count(PLAIN) == 1
    name = kernel.fn.__name__
    path = folder / f"{name}.py"
    header = "import triton\nimport triton.language as tl\n"
    path.write_text(f"{header}\n@triton.jit\n{text.replace(PLAIN, DEPENDENT)}")
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, name)


def launches_of_a_decode_step(monkeypatch):
    launches = {}
    monkeypatch.setattr(delta_decode, "traced", Recorder(launches))
    delta_decode.delta_decode(*decode_inputs())
    record("qwen3_5", 1, H100, launches)
    record_router(2048, 1, launches)
    monkeypatch.setitem(POINTERS, torch.bool, "*i1")
    record_attention("qwen3_5", H100, launches, True)
    for found in (
        norm_rope_shapes.record("qwen3_5", True),
        record_experts(SCHEMES["int4"], 1, H100),
        record_linear(SCHEMES["int4"], 1, H100),
        record_linear(SCHEMES["int4"], 4, H100, 512),
        record_merged(SCHEMES["int4"], (8192, 4096), (32, 32)),
        record_merged(SCHEMES["int4"], (8192, 4096, 32, 32), (), VECTOR),
        record_merged(SCHEMES["int4"], (8192, 4096), (32, 32), BATCH, 4),
    ):
        launches |= found
    return {made.fn.fn.__name__: (made, options) for made, options in launches.values()}


PLACING = {
    "attention_combine_kernel", "attention_decode_kernel", "delta_decode_kernel",
    "delta_decode_tail_kernel", "merged_vector_kernel", "norm_rope_kernel",
}  # fmt: skip


@pytest.mark.parametrize("capability", [90, 100])
def test_dependent_kernels_compile_without_spills(capability, tmp_path, monkeypatch):
    found = launches_of_a_decode_step(monkeypatch)
    for name, (made, options) in found.items():
        again = ASTSource(dependent(made.fn, tmp_path), made.signature, made.constants, made.attrs)
        kernel = compile(again, target=GPUTarget("cuda", capability, 32), options=options)
        assert local_memory(kernel.asm["cubin"]) == 0, name
        text = kernel.asm["ptx"]
        early, wait, late = text.partition("griddepcontrol.wait")
        assert wait, name
        # Nothing is written before what earlier kernels wrote is there, and nothing read, but for
        # what the kernel before the last one has read, too.
        read = "" if name == "delta_decode_tail_kernel" else "ld|"
        assert not re.search(rf"\b({read}st|atom|red)\.global|cp\.async", early), name
        assert ("prefetch.global.L2" in early) == (name == "delta_decode_kernel")
        assert ("griddepcontrol.launch_dependents" in late) == (name in PLACING), name
        assert "griddepcontrol.launch_dependents" not in early
    assert {"delta_decode_kernel", "merged_linear_kernel", "moe_up_decode_kernel"} < set(found)
    assert {"merged_rows_kernel", "quantized_slices_kernel"} < set(found)
    assert set(found) > PLACING


EARLY = {"w", "scales", "zeros", "ids", "down_w", "down_scales", "down_zeros", "router", "gate"}


def loaded(ptx, names):
    """The parameters that addresses of loads come from, before the wait and after it."""
    held, found = {}, []
    for part in re.split("griddepcontrol.wait", ptx, maxsplit=1):
        found.append(set())
        for line in re.split(r"[;\n]", part):
            if parameter := re.search(r"ld\.param\S*\s+(%\w+), \[\w+_param_(\d+)\]", line):
                register, index = parameter.groups()
                held[register] = set(names[int(index) : int(index) + 1])
                continue
            if load := re.search(r"ld\.global\S*\s+(.+), *\[([^]]+)\]", line):
                into, of = (re.findall(r"%\w+", side) for side in load.groups())
            else:
                registers = re.findall(r"%\w+", re.sub(r"^\s*@\S+", "", line))
                into, of = registers[:1], registers[1:]
            sources = set().union(*(held.get(register, set()) for register in of))
            if load:
                found[-1] |= sources
            for register in into:
                held[register] = held.get(register, set()) | sources
    return found


def test_early_kernels_ask_for_weights_alone_before_they_wait(tmp_path, monkeypatch):
    checked = set()
    for name, (made, options) in launches_of_a_decode_step(monkeypatch).items():
        if "EARLY" not in made.fn.arg_names:
            continue
        constants = {**made.constants, (made.fn.arg_names.index("EARLY"),): True}
        again = ASTSource(dependent(made.fn, tmp_path), made.signature, constants, made.attrs)
        kernel = compile(again, target=GPUTarget("cuda", 90, 32), options=options)
        assert local_memory(kernel.asm["cubin"]) == 0, name
        early, _, late = kernel.asm["ptx"].partition("griddepcontrol.wait")
        assert re.search(r"\bld\.global[.\w:]*\.v4\.b32", early), name
        assert not re.search(r"\b(st|atom|red)\.global|launch_dependents", early), name
        assert "ld.global" in late and "st.global" in late and "launch_dependents" in late
        names = [n for n, kind in made.signature.items() if kind != "constexpr"]
        pointers = {n for n in names if made.signature[n].startswith("*")}
        asked, rest = (found & pointers for found in loaded(kernel.asm["ptx"], names))
        assert asked and asked <= EARLY, name
        assert rest & {"x", "h"}, name
        checked.add(name)
    assert checked == {
        "moe_router_kernel", "quantized_down_vector_kernel", "quantized_vector_kernel",
    }  # fmt: skip


@pytest.mark.parametrize("name", KERNELS)
def test_every_kernel_waits_for_its_inputs(name):
    text = KERNELS[name].src
    early = text.count("if EARLY:\n") + text.count("if not EARLY:\n")
    assert text.count("wait_for_inputs()") == max(1, early)
    assert "if not EARLY:\n" in text or not early


SETTLED = {
    "weights of the graph": True,
    "x of the graph": False,
    "a view of the graph's x": False,
    "a part of the graph's x": False,
    "a part of a sum": True,
    "a computed weight": False,
    "a written scale": False,
    "a viewed weight": False,
}


@pytest.mark.parametrize("case", SETTLED)
def test_weights_are_asked_for_early_where_nothing_may_write_them(case, monkeypatch):
    monkeypatch.setattr(quant_cuda, "gpu_of", lambda _: generic_gpu((9, 0)))
    drawn = Drawn(2, 8, 4)

    def run(x, y, w, scales):
        if case == "a view of the graph's x":
            x = x.view(2, 256).view(1, 512)
        elif case == "a part of the graph's x":
            (x,) = x.split(512, 1)
        elif case == "a part of a sum":
            (x,) = (x + y).split(512, 1)
        elif case != "x of the graph":
            x = x + y
        if case == "a computed weight":
            w = w + 1
        out = quantized_linear(x, w, scales, None, None, 128)
        if case == "a written scale":
            scales.add_(1)
        return (out, w.view(-1)) if case == "a viewed weight" else out

    tensors = [
        drawn.tensor(1, 512), drawn.tensor(1, 512),
        drawn.tensor(64, 128, dtype=torch.int16), drawn.tensor(64, 4),
    ]  # fmt: skip
    code = source(drawn, run, tensors, package=False)
    assert "quantized_vector_kernel" in code
    assert re.findall(r"'EARLY': (True|False)", code) == [str(SETTLED[case])]


@pytest.mark.parametrize("asked", [True, False])
@pytest.mark.parametrize("elements", [512, None])
def test_a_generated_kernel_waits_as_ours_do_and_places_the_next(elements, asked):
    drawn = Drawn(2, 8, 4)
    x = drawn.tensor(drawn.tokens if elements is None else elements, 1)
    with config.patch(
        post_grad_custom_pre_pass=SimpleNamespace(options=Options(dependent_launch=asked))
    ):
        code = source(drawn, lambda x: x * 2 + 1, [x], package=False)
    (text,) = kernels(code)
    assert re.findall(r"'launch_pdl': (\w+)", text) == [str(asked)]
    body = text.split("@triton.jit\n")[1]
    first = [f"    tl.extra.cuda.{call}()" for call in ("gdc_wait", "gdc_launch_dependents")]
    assert (body.splitlines()[1:3] == first) == asked
    assert [text.count(line) for line in first] == [asked, asked]
