"""The decode kernels with a shared expert compile for each architecture without spills."""

from __future__ import annotations

import os
import re
import sys
from typing import Any

import pytest
import torch
import triton
from kernels.test_moe_offline_compile import GPUS, H100, LAYERS, Recorder, compile_all
from kernels.test_quant_offline_compile import SCHEMES, compiled
from triton.backends.compiler import GPUTarget

from inductor_moe.ops.moe_cuda import _rows_aligned
from inductor_moe.ops.shared_cuda import moe_experts_shared_cuda
from inductor_moe.quant.fit import Scheme, empty
from inductor_moe.quant_tiles import QuantizedExperts, choose_quantized_plan
from inductor_moe.tiles import Experts, Gpu, choose_plan

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1" or sys.platform != "linux",
    reason="needs Triton's compiler",
)


def record(
    layer: Experts, own: int, tokens: int, gpu: Gpu | None, scheme: Scheme | None
) -> dict[str, Any]:
    """The launches of a call, which chooses its plan itself where there is no gpu to plan for."""
    dtype = torch.float32 if layer.itemsize == 4 else torch.bfloat16
    hidden, inner = layer.hidden, layer.inner

    def weight(*shape: int) -> list[torch.Tensor | None]:
        if scheme is None:
            return [torch.empty(shape, dtype=dtype, device="meta"), None, None]
        packed = empty(torch.Size(shape), dtype, torch.device("meta"), scheme)
        return [packed.packed, packed.scales, packed.zeros]

    plan: Any = None
    if gpu is not None and scheme is None:
        plan = choose_plan(layer, tokens, gpu)
    elif gpu is not None:
        kind = (layer.top_k, layer.experts, hidden, inner, True, scheme.bits, scheme.group_size)
        plan = choose_quantized_plan(QuantizedExperts(*kind), tokens, gpu)
    launches: dict[str, Any] = {}
    moe_experts_shared_cuda(
        torch.empty(tokens, hidden, dtype=dtype, device="meta"),
        torch.empty(tokens, layer.top_k, dtype=torch.int64, device="meta"),
        torch.empty(tokens, layer.top_k, dtype=torch.float32, device="meta"),
        torch.empty(tokens, 1, dtype=dtype, device="meta"),
        [*weight(layer.experts, 2 * inner, hidden), *weight(layer.experts, hidden, inner)],
        [*weight(own, hidden), *weight(own, hidden), *weight(hidden, own)],
        0 if scheme is None else scheme.group_size,
        plan=plan,
        wrap=Recorder(launches),
    )
    assert len(launches) == 2
    return launches


@pytest.mark.parametrize("gpu", GPUS, ids=lambda gpu: "sm_{}{}".format(*gpu.capability))
def test_qwen3_5_compiles_without_spills(gpu):
    layer = LAYERS["qwen3_5"][0]
    compile_all(record(layer, 512, 1, gpu, None), gpu)
    assert compiled(record(layer, 512, 1, gpu, SCHEMES["int4"]), gpu)


@pytest.mark.parametrize("gpu", GPUS, ids=lambda gpu: "sm_{}{}".format(*gpu.capability))
def test_weights_come_in_loads_of_16_bytes(gpu):
    """Though a program chooses between the weights of routed and of shared experts."""
    for scheme, scales in ((None, 0), (SCHEMES["int4"], 12)):
        launches = record(LAYERS["qwen3_5"][0], 512, 4, gpu, scheme)
        (source, options), *_ = launches.values()
        target = GPUTarget("cuda", 10 * gpu.capability[0] + gpu.capability[1], 32)
        kernel = triton.compile(source, target=target, options=options)
        widths = re.findall(r"ld\.global[.\w:]*\.b(?:8|16|32)\b", kernel.asm["ptx"])
        narrow = [width for width in widths if ".v4" not in width]
        assert "_up_" in source.fn.fn.__name__ and len(narrow) <= 2 + scales


def test_alignment_of_rows():
    weight = torch.empty(4 * 64 * 24 + 8, dtype=torch.bfloat16)
    assert _rows_aligned(weight[:-8].view(4, 64, 24), weight[8:].view(4 * 64, 24))
    assert not _rows_aligned(weight[4:-4].view(4, 64, 24))
    assert not _rows_aligned(weight[: 4 * 64 * 20].view(4, 64, 20))


@pytest.mark.slow
@pytest.mark.parametrize("gpu", GPUS, ids=lambda gpu: "sm_{}{}".format(*gpu.capability))
@pytest.mark.parametrize("scheme", [None, *SCHEMES])
@pytest.mark.parametrize("layer, own", [("qwen3_5", 512), ("fp32", 1024), ("deepseek_v3", 2048)])
def test_every_layer_compiles_without_spills(layer, own, scheme, gpu):
    if layer == "fp32" and scheme is not None:
        pytest.skip("packed weights have 16-bit inputs")
    for tokens in (1, 8):
        launches = record(LAYERS[layer][0], own, tokens, gpu, scheme and SCHEMES[scheme])
        compile_all(launches, gpu)


@pytest.mark.parametrize("gpu", [H100, None], ids=["planned", "by itself"])
@pytest.mark.parametrize("scheme, prefix", [("int4", "quantized"), (None, "moe")])
def test_a_shared_expert_adds_no_launch(gpu, scheme, prefix):
    launches = record(LAYERS["qwen3_5"][0], 512, 1, gpu, scheme and SCHEMES[scheme])
    names = [source.fn.fn.__name__ for source, _ in launches.values()]
    kind = "vector" if scheme and gpu else "decode"
    assert names == [f"{prefix}_up_{kind}_kernel", f"{prefix}_down_{kind}_kernel"]
