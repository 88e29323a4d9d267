"""Launches of Triton kernels: what they write, and how they are compiled and launched.

Inductor generates and analyses the Triton IR of every launch in a graph, twice. Models repeat
their launches in every layer, and the answer depends on the kernel, its constants and the dtypes:
it is done once for launches that are alike.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import torch

from inductor_moe.compat.passes import graph_passes

ANALYSES = ("identify_accessed_tensors", "identify_mutated_tensors")  # from torch 2.13; before


@functools.cache
def remember_launches() -> None:
    """Analyse launches of this package's kernels that are alike once in a process. Idempotent."""
    from torch._higher_order_ops import triton_kernel_wrap

    for name in ANALYSES:
        if hasattr(triton_kernel_wrap, name):
            setattr(triton_kernel_wrap, name, remembering(getattr(triton_kernel_wrap, name)))


def remembering(analyse: Callable[..., Any]) -> Callable[..., Any]:
    """`analyse`, called once for each kind of launch of this package's kernels."""
    known: dict[Hashable, Any] = {}

    @functools.wraps(analyse)
    def answer(
        kernel: Any, kwargs: dict[str, Any], tma_descriptor_metadata: Any, *rest: Any
    ) -> Any:
        key = None if rest or tma_descriptor_metadata else _launch(kernel, kwargs)
        if key is None:
            return analyse(kernel, kwargs, tma_descriptor_metadata, *rest)
        if key not in known:
            known[key] = analyse(kernel, kwargs, tma_descriptor_metadata)
        found = known[key]
        return list(found) if isinstance(found, list) else found

    return answer


def _launch(kernel: Any, kwargs: Mapping[str, Any]) -> Hashable | None:
    """All that the analysis looks at; None for a kernel of others, or what cannot be compared."""
    configs = getattr(kernel, "configs", None)
    if configs:  # an Autotuner, as which a launch with options comes to the lowering
        kernel, kwargs = kernel.fn, {**kwargs, **configs[0].kwargs}
    function = getattr(kernel, "fn", None)
    if not getattr(function, "__module__", "").startswith("inductor_moe."):
        return None
    try:
        key = (function, tuple((name, _kind(value)) for name, value in sorted(kwargs.items())))
        hash(key)
    except TypeError:
        return None
    return key


def _kind(value: Any) -> Hashable:
    import sympy  # type: ignore[import-untyped]
    from torch._inductor.ir import TensorBox

    if isinstance(value, torch.Tensor | TensorBox):
        return "tensor", value.dtype
    if isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool | sympy.Expr):
        return "symbol", None
    return type(value), value


@functools.cache
def launch_dependently() -> None:
    """Let graphs launch this package's kernels, and those that Inductor generates between them,
    while the kernel before them ends; and compile those with REGISTERS for as many. Idempotent.

    The copy of a kernel that Inductor writes into a graph's code is changed, not the kernel: the
    analysis of what a launch writes gives up on the instructions this takes.
    """
    from torch._inductor.codegen.wrapper import PythonWrapperCodegen

    define = PythonWrapperCodegen.define_kernel

    @functools.wraps(define)
    def define_kernel(self: Any, name: str, body: str, *args: Any, **kwargs: Any) -> Any:
        ours = PLAIN in body and WAIT in body  # others' may have such a constant
        limit = REGISTERS.search(body) if ours and not torch.version.hip else None
        if limit:
            body = body.replace(TUNER, LIMITED.format(limit[1]) + TUNER, 1)
        if ours and _may_depend():
            body = _launched_dependently(body.replace(PLAIN, DEPENDENT))
        elif name.startswith("triton_") and len(GENERATED.findall(body)) == 1 and _may_depend():
            body = _launched_dependently(GENERATED.sub(WAITING, body))
        return define(self, name, body, *args, **kwargs)

    PythonWrapperCodegen.define_kernel = define_kernel  # type: ignore[method-assign, assignment]
    _launch_from_cpp()


def _launched_dependently(body: str) -> str:
    body = body.replace("'launch_pdl': False, ", "", 1)
    return re.sub(r"triton_meta ?= ?\{", "triton_meta={'launch_pdl': True, ", body, count=1)


def _launch_from_cpp() -> None:
    """Teach the C++ of packages these launches, where PyTorch (before 2.15) does not know them."""
    from torch._inductor.codegen.cpp_wrapper_gpu import DeferredTritonCallWrapper
    from torch._inductor.codegen.cuda.device_op_overrides import CUDADeviceOpOverrides
    from torch._inductor.utils import IndentedBuffer

    if torch.version.hip or hasattr(CUDADeviceOpOverrides, "cpp_kernel_launch_supports_pdl"):
        return
    driver = CUDADeviceOpOverrides.kernel_driver
    generate: Callable[..., None] = DeferredTritonCallWrapper.generate_launch_kernel

    @functools.wraps(driver)
    def kernel_driver(self: Any) -> str:
        return driver(self) + LAUNCHER

    @functools.wraps(generate)
    def generate_launch_kernel(self: Any, prefix: Any, *args: Any) -> None:
        *_, params = args
        if not params["triton_meta"].get("launch_pdl"):
            return generate(self, prefix, *args)
        written = IndentedBuffer()
        generate(self, written, *args)
        prefix.splice(written.getvalue().replace("launchKernel(", "launchDependentKernel("))

    CUDADeviceOpOverrides.kernel_driver = kernel_driver  # type: ignore[method-assign]
    DeferredTritonCallWrapper.generate_launch_kernel = generate_launch_kernel  # type: ignore[method-assign]


LAUNCHER = """
static inline void launchDependentKernel(
        CUfunction function, uint32_t gridX, uint32_t gridY, uint32_t gridZ, uint32_t numWarps,
        uint32_t sharedMemBytes, void* args[], cudaStream_t stream) {
    CUlaunchAttribute attribute{};
    attribute.id = CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION;
    attribute.value.programmaticStreamSerializationAllowed = 1;
    CUlaunchConfig config{};
    config.gridDimX = gridX;
    config.gridDimY = gridY;
    config.gridDimZ = gridZ;
    config.blockDimX = 32 * numWarps;
    config.blockDimY = 1;
    config.blockDimZ = 1;
    config.sharedMemBytes = sharedMemBytes;
    config.hStream = stream;
    config.attrs = &attribute;
    config.numAttrs = 1;
    CUDA_DRIVER_CHECK(cuLaunchKernelEx(&config, function, args, nullptr));
}
"""
WAIT = "def wait_for_inputs():"
REGISTERS = re.compile(r"'REGISTERS': ([1-9]\d*)")
TUNER = "@triton_heuristics.user_autotune("
LIMITED = "from inductor_moe.compat.registers import at_most\n\n@at_most({})\n"
GENERATED = re.compile(r"^def triton_\w+\([^()]*\):\n", re.MULTILINE)
# Always: Inductor's own way lets a kernel go without waiting where it reads nothing of the one
# before, which may still run when this one's successor begins.
WAITING = "\\g<0>    tl.extra.cuda.gdc_wait()\n    tl.extra.cuda.gdc_launch_dependents()\n"
PLAIN, DEPENDENT = (f"DEPENDENT = tl.constexpr({value})" for value in (False, True))


def _may_depend() -> bool:
    """Whether the graph in hand is our backend's, wants it, and is for a GPU that can."""
    from torch._inductor import config
    from torch._inductor.virtualized import V

    asked = any(
        getattr(getattr(ours, "options", None), "dependent_launch", False)
        for ours in graph_passes(config.post_grad_custom_pre_pass)
    )
    device = V.graph.get_current_device_or_throw()
    return asked and torch.cuda.get_device_capability(device) >= (9, 0)
