"""Every delta-rule kernel becomes machine code for each architecture, without spills.

The launchers run on CPU tensors with their launches recorded, so the tiles, strides and
flags are those a user gets. No GPU is needed: Triton compiles ahead of time.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import triton
from delta_inputs import decode_inputs
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import (
    DimDynamic,
    ShapeEnv,
    StatelessSymbolicContext,
)
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from inductor_moe.kernels import (
    delta_chunk,
    delta_chunk_channel,
    delta_decode,
    delta_launch,
    delta_recurrent,
)
from inductor_moe.kernels.delta_rule import delta_rule

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="compiles: not under the interpreter"
)

MODULES = (delta_chunk, delta_chunk_channel, delta_decode, delta_recurrent)
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
POINTERS = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.int32: "*i32",
    torch.int64: "*i64",
}


@dataclass
class Launch:
    kernel: JITFunction
    arguments: dict
    options: dict


@dataclass
class Usage:
    name: str
    registers: int
    stack: int
    shared: int


def recorded(monkeypatch, call, *args, **kwargs) -> list[Launch]:
    launches: list[Launch] = []

    class Recorder:
        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            def launch(*args, **kwargs):
                names = {"num_warps", "num_stages"} & kwargs.keys()
                options = {name: kwargs.pop(name) for name in names}
                bound = dict(zip(self.kernel.arg_names, args, strict=False)) | kwargs
                launches.append(Launch(self.kernel, bound, options))

            return launch

    for module in MODULES:
        monkeypatch.setattr(module, "traced", Recorder)
    call(*args, **kwargs)
    return launches


def on_device(monkeypatch, arch: int) -> None:
    known = delta_launch.Limits(arch, SHARED_LIMIT[arch])
    for module in (delta_chunk, delta_chunk_channel):
        monkeypatch.setattr(module, "limits", lambda device: known)


def compiled(launch: Launch, arch: int) -> Usage:
    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(launch.kernel.params):
        value = launch.arguments[parameter.name]
        aligned = isinstance(value, torch.Tensor)
        if parameter.is_constexpr or value is None or (type(value) is int and value == 1):
            signature[parameter.name] = "constexpr"
            constants[parameter.name] = value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = POINTERS[value.dtype]
        elif isinstance(value, float):
            signature[parameter.name] = "fp32"
        else:
            signature[parameter.name] = "i32"
            aligned = value % 16 == 0
        if aligned:
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(launch.kernel, signature, constants, attributes)
    options = dict(launch.options)
    if registers := launch.arguments.get("REGISTERS"):
        options["maxnreg"] = registers
    binary = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    # All that Triton leaves of a kernel that needs too much of Blackwell's tensor memory.
    assert "trap;" not in binary.asm["ptx"], launch.kernel.__name__
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        report = subprocess.run(
            [tool, "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    worst = {
        field: max(int(count) for count in re.findall(rf"{field}:(\d+)", report))
        for field in ("REG", "STACK", "LOCAL")
    }
    stack = worst["STACK"] + worst["LOCAL"]
    name = launch.kernel.fn.__name__
    return Usage(name, worst["REG"], stack, binary.metadata.shared)


def sequence(tokens, per_channel, width=128, heads=2, value_heads=None, dtype=torch.bfloat16):
    value_heads = value_heads or max(4, heads)
    q = torch.empty(1, tokens, heads, width, dtype=dtype)
    v = torch.empty(1, tokens, value_heads, width, dtype=dtype)
    g = torch.empty(1, tokens, value_heads, *([width] if per_channel else []))
    beta = torch.empty(1, tokens, value_heads, dtype=dtype)
    state = torch.empty(1, value_heads, width, width)
    return q, torch.empty_like(q), v, g, beta, state, width**-0.5, 1e-6


CASES = {
    "recurrent": lambda: (delta_recurrent.delta_rule_recurrent, sequence(4, False)),
    "chunk": lambda: (delta_chunk.delta_rule_chunk, sequence(2048, False)),
    "channel": lambda: (delta_chunk_channel.delta_rule_chunk_channel, sequence(2048, True)),
    # with which a program of Hopper's takes 64 and 128 value channels
    "chunk, 54 heads": lambda: (delta_chunk.delta_rule_chunk, sequence(70, False, heads=54)),
    "chunk, 108 heads": lambda: (delta_chunk.delta_rule_chunk, sequence(70, False, heads=108)),
    "channel, 54 heads": lambda: (
        delta_chunk_channel.delta_rule_chunk_channel,
        sequence(70, True, heads=54),
    ),
    "channel, 108 heads": lambda: (
        delta_chunk_channel.delta_rule_chunk_channel,
        sequence(70, True, heads=108),
    ),
    "decode": lambda: (delta_decode.delta_decode, decode_inputs()),
}


@pytest.mark.parametrize("arch", SHARED_LIMIT)
@pytest.mark.parametrize("case", CASES)
def test_qwen_heads_compile_without_spills(case, arch, monkeypatch):
    on_device(monkeypatch, arch)
    call, arguments = CASES[case]()
    launches = recorded(monkeypatch, call, *arguments)
    assert launches
    for launch in launches:
        usage = compiled(launch, arch)
        print(usage, launch.options)
        limit = launch.arguments.get("REGISTERS")
        assert usage.registers <= (limit or 255), usage
        # a limit may cost a few words beside what the other programs of a multiprocessor bring
        assert usage.stack <= (64 if limit else 0), usage
        assert usage.shared <= SHARED_LIMIT[arch], usage


@pytest.mark.parametrize(
    ("gate_dims", "hint", "launches"), [(3, None, 2), (4, None, 3), (3, 4, 1)]
)
def test_launches_trace_with_a_symbolic_token_count(gate_dims, hint, launches):
    shapes = ShapeEnv()
    fake = FakeTensorMode(shape_env=shapes)
    context = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC])
    tokens = fake.from_tensor(torch.empty(70), symbolic_context=context).shape[0]
    with fake:
        half = {"dtype": torch.bfloat16, "device": "cuda"}
        q, k = (torch.empty(1, tokens, 2, 128, **half) for _ in range(2))
        v = torch.empty(1, tokens, 4, 128, **half)
        g = torch.empty(1, tokens, 4, *([128] if gate_dims == 4 else []), device="cuda")
        beta = torch.empty(1, tokens, 4, device="cuda")
        graph = make_fx(lambda *tensors: delta_rule(*tensors, None, 0.1, 1e-6, tokens_hint=hint))(
            q, k, v, g, beta
        )
    names = [str(node.target) for node in graph.graph.nodes]
    assert sum("triton_kernel_wrapper" in name for name in names) == launches
    assert not shapes.guards
