"""The C++ that Inductor writes for a CUDA package, on a machine without a GPU."""

from __future__ import annotations

import contextlib
import types
from unittest import mock

import torch
import triton
from torch._dynamo.device_interface import CudaInterface
from torch._dynamo.source import ConstantSource
from torch._inductor import config, scheduler
from torch._inductor.codegen import cpp_wrapper_gpu
from torch._inductor.graph import GraphLowering
from torch._inductor.runtime.hints import DeviceProperties
from torch._inductor.virtualized import V
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import (
    DimDynamic,
    ShapeEnv,
    StatelessSymbolicContext,
)
from triton.backends.compiler import GPUTarget

from inductor_moe import compat, lowerings

HOPPER = types.SimpleNamespace(
    major=9, minor=0, multi_processor_count=132, warp_size=32, regs_per_multiprocessor=65536,
    max_threads_per_multi_processor=2048, total_memory=80 << 30,
)  # fmt: skip


class Driver:
    """As much of a GPU's driver as the generation of code asks for."""

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)


class Drawn:
    """A number of tokens between two bounds, and fake tensors on a GPU."""

    def __init__(self, least, most, hint):
        self.env = ShapeEnv()
        self.mode = FakeTensorMode(shape_env=self.env)
        context = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC])
        given = self.mode.from_tensor(
            torch.empty(hint), symbolic_context=context, source=ConstantSource("tokens")
        )
        self.tokens = given.shape[0]
        self.env.constrain_symbol_range(self.tokens.node.expr, least, most)

    def tensor(self, *shape, dtype=torch.bfloat16):
        with self.mode:
            return torch.empty(shape, dtype=dtype, device="cuda")


def source(drawn, function, tensors, package=True):
    """What a package (or else torch.compile) would run for function(*tensors)."""
    lowerings.install()
    driver = triton.runtime.driver
    driver.set_active(Driver())
    compat.runs_triton_kernels.cache_clear()
    launcher = cpp_wrapper_gpu.DeferredTritonCallWrapper
    properties = {"type": "cuda", "index": 0, "cc": 90, **vars(HOPPER)}
    del properties["minor"], properties["total_memory"]
    known = DeviceProperties(**properties)
    patches = (
        mock.patch.object(torch.cuda, "get_device_capability", lambda *_: (9, 0)),
        mock.patch.object(torch.cuda, "get_device_properties", lambda *_: HOPPER),
        mock.patch.object(CudaInterface.Worker, "get_device_properties", lambda *_: HOPPER),
        mock.patch.object(DeviceProperties, "create", lambda _: known),
        mock.patch.object(scheduler, "has_triton", lambda *_: True),
        # Launchers are written from compiled kernels, and the kernels timed, on the GPU.
        mock.patch.object(launcher, "generate", lambda *_: None),
        mock.patch.object(
            cpp_wrapper_gpu.CppWrapperGpu, "generate_and_run_autotune_block", lambda _: None
        ),
        config.patch({"triton.autotune_at_compile_time": True} if package else {}),
        V.set_fake_mode(drawn.mode),
        V.set_debug_handler(mock.MagicMock()),
        torch._guards.tracing(torch._guards.TracingContext(drawn.mode)),
    )
    try:
        with contextlib.ExitStack() as stack:
            for patch in patches:
                stack.enter_context(patch)
            with drawn.mode:
                traced = make_fx(function)(*tensors)
            graph = GraphLowering(
                traced, example_inputs=tensors, shape_env=drawn.env, aot_mode=package,
                cpp_wrapper=package,
            )  # fmt: skip
            stack.enter_context(V.set_graph_handler(graph))
            graph.run(*tensors)
            code = graph.codegen()[0]
    finally:
        driver.set_active(None)
        compat.runs_triton_kernels.cache_clear()
    return getattr(code, "value", code)
