"""Every expert kernel becomes machine code for each architecture: no spills, shared memory fits.

The launches are recorded, not run, so the tiles, strides and flags are those a user gets. No GPU
is needed: Triton compiles ahead of time.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from inductor_moe.ops.moe_cuda import moe_experts_cuda
from inductor_moe.ops.moe_route import moe_route_cuda
from inductor_moe.ops.moe_router import moe_router_cuda
from inductor_moe.tiles import Experts, Gpu, choose_plan, generic_gpu

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1" or sys.platform != "linux",
    reason="needs Triton's compiler",
)

H100 = Gpu("NVIDIA H100 80GB HBM3", (9, 0), 132, 232448)
GPUS = [generic_gpu((8, 0)), generic_gpu((8, 6)), H100, generic_gpu((10, 0))]
QWEN = Experts(8, 256, 2048, 512, True, 2)
GPT_OSS = Experts(4, 32, 2880, 2880, True, 2, "n", "n")
LAYERS = {
    "qwen3_5": (QWEN, torch.bfloat16, {}),
    "gpt_oss": (GPT_OSS, torch.bfloat16, {"alpha": 1.702, "up_offset": 1.0, "limit": 7.0}),
    "fp32": (Experts(8, 256, 2048, 512, True, 4), torch.float32, {}),
    "deepseek_v3": (Experts(8, 256, 7168, 2048, True, 2), torch.bfloat16, {}),
    "mixtral": (Experts(2, 8, 4096, 14336, True, 2), torch.bfloat16, {}),
}
POINTERS = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.int32: "*i32",
    torch.int64: "*i64",
}


@dataclass
class Recorder:
    """wrap=Recorder(launches) keeps each launch as a source to compile."""

    launches: dict[str, tuple[ASTSource, dict[str, int]]]

    def __call__(self, kernel: Any) -> Any:
        return _Recording(kernel, self.launches)


@dataclass
class _Recording:
    kernel: Any
    launches: dict[str, tuple[ASTSource, dict[str, int]]]

    def __getitem__(self, grid: Any) -> Any:
        return self.record

    def record(self, *args: Any, **kwargs: Any) -> None:
        options = {
            name: kwargs.pop(name) for name in ("num_warps", "num_stages") if name in kwargs
        }
        names = self.kernel.arg_names
        values = dict(zip(names, args, strict=False)) | kwargs
        signature, constants, attributes = {}, {}, {}
        for position, name in enumerate(names):
            value, parameter = values[name], self.kernel.params[position]
            if isinstance(value, torch.Tensor):
                signature[name] = POINTERS[value.dtype]
                attributes[(position,)] = [["tt.divisibility", 16]]
            elif (
                parameter.is_constexpr
                or value is None
                or (value == 1 and not parameter.do_not_specialize)
            ):
                signature[name] = "constexpr"
                constants[(position,)] = value
            else:
                signature[name] = "i32" if abs(value) < 2**31 else "i64"
                if value % 16 == 0 and not parameter.do_not_specialize:
                    attributes[(position,)] = [["tt.divisibility", 16]]
        source = ASTSource(self.kernel, signature, constants, attributes)
        key = f"{self.kernel.fn.__name__}{signature}{constants}{attributes}{options}"
        self.launches[key] = (source, options)


def record(name: str, tokens: int, gpu: Gpu, launches: dict[str, Any]) -> None:
    layer, dtype, options = LAYERS[name]

    def weight(n: int, k: int, inner: str) -> torch.Tensor:
        shape = (layer.experts, n, k) if inner == "k" else (layer.experts, k, n)
        value = torch.empty(shape, dtype=dtype, device="meta")
        return value if inner == "k" else value.transpose(1, 2)

    bias = name == "gpt_oss"
    moe_experts_cuda(
        torch.empty(tokens, layer.hidden, dtype=dtype, device="meta"),
        weight(2 * layer.inner, layer.hidden, layer.up_inner),
        weight(layer.hidden, layer.inner, layer.down_inner),
        torch.empty(tokens, layer.top_k, dtype=torch.int64, device="meta"),
        torch.empty(tokens, layer.top_k, dtype=dtype, device="meta"),
        torch.empty(layer.experts, 2 * layer.inner, dtype=dtype, device="meta") if bias else None,
        torch.empty(layer.experts, layer.hidden, dtype=dtype, device="meta") if bias else None,
        "silu",
        "interleaved" if bias else "chunked",
        **options,
        plan=choose_plan(layer, tokens, gpu),
        wrap=Recorder(launches),
    )


def assert_fits(kernel: Any, gpu: Gpu, key: str) -> None:
    """A kernel fits the shared memory of a GPU, and nothing in it spills.

    Of one that does not fit Blackwell's tensor memory Triton leaves nothing but a trap, on a line
    of its own, where our assembly has none.
    """
    assert not re.search(r"^\s*trap;", kernel.asm["ptx"], re.MULTILINE), key
    assert kernel.metadata.shared <= gpu.shared_memory, key
    assert local_memory(kernel.asm["cubin"]) == 0, key


def local_memory(cubin: bytes) -> int:
    """Bytes of local memory and stack a thread takes: what spilled."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "-res-usage", file.name]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    usage = dict(item.split(":")[:2] for item in report.splitlines()[-1].split())
    return int(usage["STACK"]) + int(usage["LOCAL"])


def compile_all(launches: dict[str, Any], gpu: Gpu) -> None:
    major, minor = gpu.capability
    for key, (source, options) in launches.items():
        target = GPUTarget("cuda", 10 * major + minor, 32)
        kernel = triton.compile(source, target=target, options=options)
        assert_fits(kernel, gpu, key)


@pytest.mark.parametrize("gpu", GPUS, ids=lambda gpu: "sm_{}{}".format(*gpu.capability))
@pytest.mark.parametrize("layer", ["qwen3_5", "gpt_oss"])
def test_kernels_compile_without_spills(layer, gpu):
    launches: dict[str, Any] = {}
    for tokens in (1, 64, 16384):
        record(layer, tokens, gpu, launches)
    compile_all(launches, gpu)


ROUTERS = {
    "qwen3_5": (256, (8, "softmax", True), {}),
    "deepseek_v2": (160, (6, "softmax", False), {"scale": 16.0, "groups": 8, "kept_groups": 3}),
    "deepseek_v3": (
        256,
        (8, "sigmoid", True),
        {"epsilon": 1e-20, "scale": 2.5, "groups": 8, "kept_groups": 4, "group_top": 2},
    ),
}


@pytest.mark.parametrize("gpu", GPUS, ids=lambda gpu: "sm_{}{}".format(*gpu.capability))
@pytest.mark.parametrize("router", ROUTERS)
def test_routers_compile_without_spills(router, gpu):
    experts, arguments, options = ROUTERS[router]
    launches: dict[str, Any] = {}
    logits = torch.empty(64, experts, device="meta")
    bias = torch.empty(experts, device="meta") if router == "deepseek_v3" else None
    for weights in (torch.float32, torch.bfloat16):
        moe_route_cuda(
            logits, *arguments, bias, **options, weights_dtype=weights, wrap=Recorder(launches)
        )
    assert len(launches) == 2
    compile_all(launches, gpu)


def record_router(hidden: int, tokens: int, launches: dict[str, Any]) -> None:
    x, row, weight = (
        torch.empty(n, hidden, dtype=torch.bfloat16, device="meta") for n in (tokens, 1, 256)
    )
    counters = torch.empty(32, dtype=torch.int32, device="meta")
    moe_router_cuda(
        x, x, row[0], 1e-6, 1.0, weight, row, counters, 2, 8, "softmax", True,
        weights_dtype=torch.bfloat16, wrap=Recorder(launches),
    )  # fmt: skip


@pytest.mark.parametrize("gpu", GPUS, ids=lambda gpu: "sm_{}{}".format(*gpu.capability))
@pytest.mark.parametrize("hidden, tokens", [(2048, 1), (2048, 4), (7168, 1), (7168, 16)])
def test_whole_routers_compile_without_spills(hidden, tokens, gpu):
    launches: dict[str, Any] = {}
    record_router(hidden, tokens, launches)
    compile_all(launches, gpu)


@pytest.mark.slow
@pytest.mark.parametrize("gpu", GPUS, ids=lambda gpu: "sm_{}{}".format(*gpu.capability))
@pytest.mark.parametrize("layer", LAYERS)
def test_every_bucket_compiles_without_spills(layer, gpu):
    launches: dict[str, Any] = {}
    for exponent in range(15):
        record(layer, 1 << exponent, gpu, launches)
    compile_all(launches, gpu)
